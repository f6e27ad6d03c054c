"""The launcher without training: what it refuses before it starts, whose overrides win, what an interrupt leaves."""

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from processes import runs

from flexpert import signals
from flexpert.config.compose import compose
from flexpert.config.launcher import LauncherConfig
from flexpert.errors import UserError
from flexpert.launch import display, graph
from flexpert.launch.graph import Node, Records, build_graph, output_files
from flexpert.launch.local import LocalLauncher, last_line
from flexpert.launch.pipeline import check_begun, check_evaluable, compose_all, run
from flexpert.launch.walk import Ended, StageFailed, Walk

Refused = Callable[..., AbstractContextManager[None]]


def smoke_nodes(*overrides: str) -> dict[str, Node]:
    config = compose("pipeline", ["pipeline=smoke", "output_dir=run", *overrides])[0]
    return {node.name: node for node in build_graph(config)}


def smoke_configs(*overrides: str) -> dict[str, Any]:
    return {name: config for name, (config, _) in compose_all(list(smoke_nodes(*overrides).values())).items()}


def test_the_users_overrides_win_over_the_pipelines_defaults() -> None:
    lists = [
        "pipeline.experts={math:[data=demo_math,seed=3],news:[data=demo_news]}",
        "pipeline.public=[train.steps=1,seed=4,monitor.wandb=off,monitor.group=mine]",
        "pipeline.expert=[train.steps=1,public_data=elsewhere,base=no,name=no,output_dir=no]",
        "pipeline.dense=[train.steps=1,monitor=quiet]",
    ]
    configs = smoke_configs("seed=7", "monitor.log_interval=5", "monitor.wandb=offline", *lists)
    assert [configs[f"data/{name}"].seed for name in ("public", "math", "news")] == [7, 3, 7]
    assert configs["public"].seed == 4 and configs["experts/math"].seed == 7
    monitor = configs["public"].monitor
    assert (monitor.wandb, monitor.group, monitor.log_interval) == ("off", "mine", 5)
    monitor = configs["dense/math"].monitor
    assert (monitor.wandb, monitor.group, monitor.log_interval) == ("off", "smoke", 100), "the group that was chosen"
    expert = configs["experts/math"]
    assert (expert.public_data, expert.monitor.wandb) == ("elsewhere", "offline")
    assert (expert.base, expert.name, expert.output_dir) == ("run/public/model", "math", "run/experts/math")


def test_settings_of_the_monitor_that_are_off_are_left_to_the_stage() -> None:
    assert not [word for word in smoke_nodes()["public"].overrides if "profile" in word or "entity" in word]
    chosen = ("monitor.profile_steps=[2,3]", "monitor.memory_snapshot=true")
    monitor = smoke_configs(*chosen)["experts/news"].monitor
    assert (monitor.profile_steps, monitor.memory_snapshot) == ([2, 3], True)


def test_an_owners_own_overrides_come_after_the_shared_ones() -> None:
    shared = "pipeline.expert=[train.steps=1,optim.lr=2e-3,router.init=random,monitor.group=shared]"
    own = "pipeline.owners={math:[title=Sums and proofs,license=CC-BY-4.0,optim.lr=1e-3,name=no,monitor=quiet]}"
    configs = smoke_configs("monitor.log_interval=5", shared, own)
    math, news = configs["experts/math"], configs["experts/news"]
    assert (math.title, math.license, math.optim.lr, math.router.init) == (
        "Sums and proofs", "CC-BY-4.0", 1e-3, "random",
    )  # fmt: skip
    assert (news.title, news.license, news.optim.lr, news.router.init) == (None, None, 2e-3, "random")
    assert (math.name, math.monitor.log_interval, news.monitor.log_interval) == ("math", 100, 5)
    assert configs["dense/math"].optim.lr == 2e-3


@pytest.mark.slow
def test_the_dense_fine_tunes_see_as_much_public_text_as_they_are_told() -> None:
    assert smoke_configs()["dense/math"].data.dir == "run/data/math"
    nodes = smoke_nodes("pipeline.dense_public_share=0.25")
    assert nodes["dense/math"].needs == ("public", "data/math", "data/public")
    data = smoke_configs("pipeline.dense_public_share=0.25")["dense/math"].data
    assert data.dirs == {"own": "run/data/math", "public": "run/data/public"}
    assert data.weights == {"own": 0.75, "public": 0.25}


MISTAKES = [
    (["pipeline.dense_public_share=1"], ("pipeline.dense_public_share=1",)),
    (["pipeline.required=[code]"], ("pipeline.required", "code is not one of math, news")),
    (["pipeline.processes={prepare:2}"], ("pipeline.processes.prepare=2", "runs in one process")),
    (["launcher.jobs={expirt:[--nodes=2]}"], ("launcher.jobs.expirt is neither a stage nor",)),
    (["pipeline.resources={experts/code:[--nodes=2]}"], ("pipeline.resources.experts/code is neither a stage nor",)),
    (["launcher.options=[-N2]"], ("launcher.options: '-N2' is not an option of sbatch in its long form",)),
    (["launcher.jobs={expert:[--array=0-3]}"], ("launcher.jobs.expert: --array is said by the pipeline itself",)),
    (["launcher.dry_run=true"], ("launcher.dry_run=true is Slurm's",)),
    (["pipeline.expert=[train.steps=1,optim.lrate=1]"], ("experts/math: unknown key 'optim.lrate'",)),
    (["pipeline.evaluate=[sequence_length=long]"], ("evaluation: sequence_length", "long")),
    (["pipeline.experts.news=[data=demo_newts]"], ("data/news: there is no data=demo_newts",)),
    (["pipeline.owners={code:[title=Code]}"], ("pipeline.owners.code is not one of math, news",)),
    (["pipeline.owners={news:[optim.lrate=1]}"], ("experts/news: unknown key 'optim.lrate'",)),
    (["pipeline.tune_router=[train.steps=1]"], ("tuned: training needs data.dir=",)),
    (["pipeline.gates={gain:0}"], ("pipeline.gates.gain is not one of", "gain_over_soup")),
    (["pipeline.gates={gain_over_soup:0}", "pipeline.dense=null"], ("pipeline.gates.gain_over_soup needs a soup",)),
    (["pipeline.gates={removal_on_own:0}", "pipeline.evaluate=[]"], ("removal_on_own needs leave_one_out=true",)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("overrides", "parts"), MISTAKES)
def test_a_mistake_is_told_before_anything_starts(
    overrides: list[str], parts: tuple[str, ...], tmp_path: Path, refused: Refused
) -> None:
    with refused(*parts):
        run(*compose("pipeline", ["pipeline=smoke", f"output_dir={tmp_path}/run", *overrides]))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", ["demo", "smoke"])
def test_the_pipelines_that_come_along_pass_these_checks(pipeline: str) -> None:
    config = compose("pipeline", [f"pipeline={pipeline}"])[0]
    check_evaluable(config.pipeline.gates, compose_all(build_graph(config))["evaluation"][0])


@pytest.mark.slow
def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "file").touch()
    for place in (f"{tmp_path}/file/x", f"{tmp_path}/file", "/proc/run"):  # /proc refuses everybody, root too
        with refused(f"output_dir={place} cannot be used"):
            run(*compose("pipeline", ["pipeline=smoke", f"output_dir={place}"]))


@pytest.mark.slow
def test_somebodys_own_files_are_neither_taken_nor_deleted(tmp_path: Path, refused: Refused) -> None:
    own = tmp_path / "data/math/book.txt"
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    for _ in range(2):
        with refused(tmp_path / "data/math", "is no pipeline's"):
            run(*compose("pipeline", ["pipeline=smoke", f"output_dir={tmp_path}"]))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [own]


def test_a_directory_is_one_pipelines(tmp_path: Path, refused: Refused) -> None:
    _, resolved = compose("pipeline", ["pipeline=demo", f"output_dir={tmp_path}"])
    (tmp_path / "pipeline.yaml").write_text(resolved)
    with refused(tmp_path, "is a run of the pipeline demo"):
        run(*compose("pipeline", ["pipeline=smoke", f"output_dir={tmp_path}"]))
    assert (tmp_path / "pipeline.yaml").read_text() == resolved


class WritingLauncher:
    """A launcher of its own kind: a stage is over when it is started, and is told of at the next call."""

    def __init__(self, interrupt: str = "") -> None:
        self.interrupt = interrupt
        self.over: list[Ended] = []
        self.started: list[str] = []

    def has_room(self, node: Node) -> bool:
        return not self.over

    def start(self, node: Node) -> str:
        assert node.always or not node.output.exists()
        node.output.mkdir(parents=True, exist_ok=True)
        (node.output / "weights").write_text(node.name)
        self.started.append(node.name)
        self.over.append(Ended(node, 0, 0.0, "log", ""))
        return f"logs/{node.name}.log"

    def progress(self) -> dict[str, str]:
        return {ended.node.name: "step 1/1" for ended in self.over}

    def poll(self) -> list[Ended]:
        if self.over and self.over[0].node.name == self.interrupt:
            raise KeyboardInterrupt
        return self.stop()

    def stop(self) -> list[Ended]:
        over, self.over = self.over, []
        return over


def chain(run: Path) -> list[Node]:
    return [
        Node("base", "pretrain", ("a=1",), run / "base/model"),
        Node("expert", "expert", ("b=2",), run / "expert/contribution", ("base",)),
        Node("whole", "assemble", ("c=3",), run / "whole", ("base", "expert")),
    ]


def walk(run: Path, launcher: Any, nodes: list[Node] | None = None) -> None:
    nodes = nodes or chain(run)
    records = Records(run)
    Walk(nodes, records, launcher, records.complete(nodes)).run()


def test_each_event_is_a_line_and_what_is_complete_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(display, "PRINT_SECONDS", 0.0)
    nodes = [*chain(tmp_path)[:2], Node("report", "report", (), tmp_path / "page", ("expert",), always=True)]
    walk(tmp_path, WritingLauncher(), nodes)
    lines = [
        "base: started (log logs/base.log)", "base: step 1/1", "base: done in 0 s",
        "expert: started (log logs/expert.log)", "expert: step 1/1", "expert: done in 0 s",
        "report: step 1/1", "report: written",
    ]  # fmt: skip
    assert capsys.readouterr().out.splitlines() == [f"  {line}" for line in lines]
    walk(tmp_path, WritingLauncher(), nodes)
    lines = ["all 2 stages are complete", "report: step 1/1", "report: written"]
    assert capsys.readouterr().out.splitlines() == [f"  {line}" for line in lines]
    (tmp_path / "stages/expert.json").unlink()
    walk(tmp_path, WritingLauncher(), nodes)
    assert capsys.readouterr().out.startswith("  complete: base\n  expert: started")


def test_progress_is_told_when_it_is_due_and_new(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[-1])
    with display.Display() as shown:
        for seconds, step in ((1.0, 1), (14.9, 2), (15.1, 3), (29.0, 4), (31.0, 3), (47.0, 5)):
            clock.append(seconds)
            lines = {"public": f"step {step}/9"}
            shown.update(lines.copy)
    assert capsys.readouterr().out == "  public: step 3/9\n  public: step 5/9\n"


def test_what_ended_while_the_walk_was_interrupted_is_recorded(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        walk(tmp_path, WritingLauncher(interrupt="expert"))
    launcher = WritingLauncher()
    walk(tmp_path, launcher)
    assert launcher.started == ["whole"]


def test_an_interrupt_during_hashing_loses_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, calls = Records.write, []

    def interrupted(self: Records, node: Node) -> None:
        calls.append(node.name)
        if calls == ["base"]:
            raise KeyboardInterrupt
        write(self, node)

    monkeypatch.setattr(Records, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        walk(tmp_path, WritingLauncher())
    assert calls == ["base", "base"]
    assert Records(tmp_path).complete(chain(tmp_path)) == {"base"}


def test_an_output_without_a_record_is_made_again_and_what_lies_beside_it_stays(tmp_path: Path) -> None:
    walk(tmp_path, WritingLauncher())
    (tmp_path / "stages/expert.json").unlink()
    (tmp_path / "expert/contribution/left").touch()
    (tmp_path / "expert/checkpoint").touch()
    launcher = WritingLauncher()
    walk(tmp_path, launcher)
    assert launcher.started == ["expert"]
    assert {path.name for path in (tmp_path / "expert").rglob("*")} == {"contribution", "weights", "checkpoint"}


def test_an_output_that_someone_put_there_is_refused_and_stays(tmp_path: Path) -> None:
    (tmp_path / "expert/contribution").mkdir(parents=True)
    launcher = WritingLauncher()
    with pytest.raises(UserError, match="expert/contribution was not made by this pipeline: move it away"):
        walk(tmp_path, launcher)
    assert not launcher.started and (tmp_path / "expert/contribution").is_dir()


def test_a_link_is_deleted_and_not_what_it_leads_to(tmp_path: Path) -> None:
    node = Node("whole", "assemble", (), tmp_path / "run/whole")
    (tmp_path / "elsewhere").mkdir()
    node.output.parent.mkdir()
    node.output.symlink_to(tmp_path / "elsewhere")
    Records(tmp_path / "run").begin(node, {node.name: node})
    assert not node.output.is_symlink() and (tmp_path / "elsewhere").is_dir()
    other = Node("whole", "assemble", (), tmp_path / "elsewhere")
    with pytest.raises(AssertionError):
        Records(tmp_path / "run").begin(other, {other.name: other})


def test_a_conflict_is_found_behind_a_node_that_must_run(tmp_path: Path) -> None:
    walk(tmp_path, WritingLauncher())
    (tmp_path / "stages/base.json").unlink()
    nodes = chain(tmp_path)
    nodes[2] = Node("whole", "assemble", ("c=4",), tmp_path / "whole", ("base", "expert"))
    with pytest.raises(UserError, match="whole was made with other overrides"):
        Records(tmp_path).complete(nodes)


def test_a_process_that_fails_is_quoted_and_one_that_runs_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "python"  # in place of `python -m flexpert STAGE`: says what it was asked, fails or stays
    script.write_text(
        '#!/bin/sh\necho "asked for $4"\nif [ "$4" = bad ]; then echo "it is bad"; exit 3; fi\nexec sleep 600\n'
    )
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    config = LauncherConfig(kind="local", max_jobs=2)
    for attempt in (1, 2):
        with pytest.raises(StageFailed, match=r"one/bad failed \(status 3, log .*one\.bad\.log\): it is bad"):
            walk(tmp_path, LocalLauncher(config, tmp_path), [Node("one/bad", "bad", (), tmp_path / "bad")])
        log = (tmp_path / "logs/one.bad.log").read_text()
        assert log.count("--- one/bad: started 2") == log.count("it is bad\n") == attempt
    launcher = LocalLauncher(config, tmp_path)
    nodes = [Node(name, "long", (), tmp_path / name) for name in ("a", "b", "c")]
    for node in nodes[:2]:
        assert launcher.has_room(node)
        launcher.start(node)
    assert not launcher.has_room(nodes[2]) and launcher.poll() == []
    before = time.monotonic()
    assert [(ended.node.name, ended.status) for ended in launcher.stop()] == [("a", -15), ("b", -15)]
    assert time.monotonic() - before < 60 and launcher.poll() == []


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("", "it printed nothing"),
        ("note: a\nflexpert: it is wrong\n", "it is wrong"),
        ("0: flexpert: it is wrong\nsrun: error: n[1-2]: tasks 0-1: Exited with exit code 2\n", "it is wrong"),
        ("12: step 3\nsrun: error: n1: task 0: Out Of Memory\n", "srun: error: n1: task 0: Out Of Memory"),
        ("srun: error: n1: task 0: Killed\nsrun: Force Terminated StepId=7.0\n", "srun: error: n1: task 0: Killed"),
    ],
    ids=["silent", "here", "several tasks", "out of memory", "killed"],
)
def test_the_reason_of_a_failure_is_what_the_stage_or_what_ended_it_says(output: str, reason: str) -> None:
    assert last_line(output) == reason


def stage_script(path: Path, body: str) -> Path:
    """In place of `python -m flexpert STAGE`."""
    path.write_text(f"#!/bin/sh\n{body}\nexec sleep 600\n")
    path.chmod(0o755)
    return path


def test_the_newest_progress_of_a_running_stage_is_found_in_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, node = LauncherConfig(kind="local", max_jobs=1), Node("one/long", "expert", (), tmp_path / "long")
    for body, progress in (
        ('echo "expert /a  b/run  step 10/80  loss 3"; echo "expert /a  b/run  step 20/80  loss 2"; echo "a warning"',
         {"one/long": "step 20/80  loss 2"}),
        ('echo "expert /a/run  step 80/80  loss 2"; echo "calibrate /a/run/calibration  step 1/9  loss 3"',
         {"one/long": "calibrate step 1/9  loss 3"}),
        ("", {}),  # what an earlier attempt told is old
    ):  # fmt: skip
        script = stage_script(tmp_path / "python", f'{body}\nprintf "expert /a  step 90/"')
        monkeypatch.setattr(sys, "executable", str(script))
        launcher = LocalLauncher(config, tmp_path)
        log = Path(launcher.start(node))
        assert log == tmp_path / "logs/one.long.log"
        before = time.monotonic()
        while not log.read_text().endswith("90/") and time.monotonic() < before + 60:
            time.sleep(0.01)
        assert launcher.progress() == progress
        launcher.stop()
        log.write_text(log.read_text() + "\n")


KILLED = """
import sys, time
from pathlib import Path
from flexpert.config.launcher import LauncherConfig
from flexpert.launch.graph import Node
from flexpert.launch.local import LocalLauncher
run, sys.executable = Path(sys.argv[1]), sys.argv[2]
launcher = LocalLauncher(LauncherConfig(kind="local", max_jobs=1), run)
launcher.start(Node("long", "long", (), run / "long"))
print(launcher.jobs[0].processes[0].pid, flush=True)
time.sleep(600)
"""


def test_stages_end_with_a_launcher_that_is_killed(tmp_path: Path) -> None:
    script = stage_script(tmp_path / "python", "")
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(script)]
    launcher = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    stage = int(launcher.stdout.readline())
    assert runs(stage)
    launcher.kill()
    launcher.communicate()
    before = time.monotonic()
    while runs(stage):
        assert time.monotonic() < before + 60
        time.sleep(0.01)


def test_a_stage_that_is_being_started_ends_with_the_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped_in_popen: list[int]
) -> None:
    monkeypatch.setattr(sys, "executable", str(stage_script(tmp_path / "python", "")))
    launcher = LocalLauncher(LauncherConfig(kind="local"), tmp_path)
    signals.install()
    with pytest.raises(signals.Stopped):
        launcher.start(Node("long", "long", (), tmp_path / "long"))
    assert [(ended.node.name, ended.status) for ended in launcher.stop()] == [("long", -15)]
    assert len(stopped_in_popen) == 1 and not any(map(runs, stopped_in_popen))


def test_large_files_of_a_data_set_are_known_by_their_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "LARGE_BYTES", 50)
    nodes = [
        Node("data", "prepare", (), tmp_path / "data"),
        Node("public", "pretrain", (), tmp_path / "public/model", ("data",)),
    ]
    contents = {"manifest.json": b"m" * 60, "train.bin": b"t" * 51, "train.idx": b"i" * 50, "tokenizer/t.json": b"j"}
    records, by_name = Records(tmp_path), {node.name: node for node in nodes}
    for node in nodes:
        records.begin(node, by_name)
        for name, content in contents.items():
            (node.output / name).parent.mkdir(parents=True, exist_ok=True)
            (node.output / name).write_bytes(content)
        records.write(node)
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    assert output_files(nodes[0]) == hashes | {"train.bin": "51 bytes"}
    assert output_files(nodes[1]) == hashes
    assert records.complete(nodes) == {"data", "public"}
    changes = [("data/train.bin", b"t" * 52), ("data/manifest.json", b"M" * 60), ("data/tokenizer/t.json", b"k")]
    for path, content in [*changes, ("public/model/train.bin", b"T" * 51)]:
        before = (tmp_path / path).read_bytes()
        (tmp_path / path).write_bytes(content)
        with pytest.raises(UserError, match="was altered after it was made"):
            records.complete(nodes)
        (tmp_path / path).write_bytes(before)
    (tmp_path / "data/more.bin").touch()
    with pytest.raises(UserError, match="data was altered"):
        records.complete(nodes)


def test_records_hold_the_recipe_and_the_files(tmp_path: Path) -> None:
    walk(tmp_path, WritingLauncher())
    record = json.loads((tmp_path / "stages/expert.json").read_text())
    assert (record["stage"], record["overrides"]) == ("expert", ["b=2"])
    assert record["inputs"].keys() == {"base"} and record["files"].keys() == {"weights"}


def test_a_node_is_recorded_with_what_there_was_when_it_began(tmp_path: Path) -> None:
    """What it wants and comes while it runs is not in it: it is made anew."""
    names = ("math", "news")
    experts = [Node(f"experts/{name}", "expert", (), tmp_path / name) for name in names]
    model = Node("assembled", "assemble", (), tmp_path / "model", ("experts/math",), ("experts/news",))
    records, by_name = Records(tmp_path), {node.name: node for node in (*experts, model)}

    def make(node: Node) -> None:
        records.begin(node, by_name)
        node.output.mkdir()
        (node.output / "file").write_text(node.name)
        records.write(node)

    make(experts[0])
    records.begin(model, by_name)
    model.output.mkdir()
    make(experts[1])
    records.write(model)
    assert records.is_stale(model, by_name) and not records.is_complete(model, by_name)
    make(model)
    assert records.complete(list(by_name.values())) == by_name.keys()


def test_training_that_has_begun_with_other_settings_is_told_before_anything_starts(tmp_path: Path) -> None:
    words = ["data.dir=/d", "train.steps=9", f"output_dir={tmp_path}/public"]
    (node,) = nodes = [Node("public", "pretrain", tuple(words), tmp_path / "public/model")]
    node.directory.mkdir()
    (node.directory / "resolved.yaml").write_text(compose("pretrain", words)[1])
    (node.directory / "metrics.jsonl").write_text("{}\n")
    same, other = (compose("pretrain", [*words, word])[1] for word in ("monitor.log_interval=3", "optim.lr=1e-2"))
    check_begun(nodes, set(), {"public": same})
    check_begun(nodes, {"public"}, {"public": other})
    told = rf"public: .* optim.lr was 0.0009 and is 0.01; .*, or delete {node.directory} to begin it anew"
    with pytest.raises(UserError, match=told):
        check_begun(nodes, set(), {"public": other})
