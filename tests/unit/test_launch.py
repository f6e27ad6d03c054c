"""The launcher without training: what it refuses before it starts, whose overrides win, what an interrupt leaves."""

import json
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from flexpert.config.compose import compose
from flexpert.config.groups import LauncherConfig
from flexpert.errors import UserError
from flexpert.launch.graph import Node, Records, build_graph
from flexpert.launch.local import LocalLauncher
from flexpert.launch.pipeline import check_evaluable, compose_all, run
from flexpert.launch.walk import Ended, StageFailed, Walk

Refused = Callable[..., AbstractContextManager[None]]


def smoke_nodes(*overrides: str) -> dict[str, Node]:
    config = compose("pipeline", ["pipeline=smoke", "output_dir=run", *overrides])[0]
    return {node.name: node for node in build_graph(config)}


def smoke_configs(*overrides: str) -> dict[str, Any]:
    return compose_all(list(smoke_nodes(*overrides).values()))


def test_the_users_overrides_win_over_the_pipelines_defaults() -> None:
    lists = [
        "pipeline.experts={math:[data=demo_math,seed=3],news:[data=demo_news]}",
        "pipeline.public=[train.steps=1,seed=4,monitor.wandb=off,monitor.group=mine]",
        "pipeline.expert=[train.steps=1,router.public_data=elsewhere,base=no,name=no,output_dir=no]",
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
    assert (expert.router.public_data, expert.monitor.wandb) == ("elsewhere", "offline")
    assert (expert.base, expert.name, expert.output_dir) == ("run/public/model", "math", "run/experts/math")


MISTAKES = [
    (["pipeline.expert=[train.steps=1,optim.lrate=1]"], ("experts/math: unknown key 'optim.lrate'",)),
    (["pipeline.evaluate=[sequence_length=long]"], ("evaluation: sequence_length", "long")),
    (["pipeline.experts.news=[data=demo_newts]"], ("data/news: there is no data=demo_newts",)),
    (["pipeline.tune_router=[train.steps=1]"], ("tuned: tune_router needs data.dir=",)),
    (["pipeline.gates={gain:0}"], ("pipeline.gates.gain is not one of", "gain_over_soup")),
    (["pipeline.gates={gain_over_soup:0}", "pipeline.dense=null"], ("pipeline.gates.gain_over_soup needs a soup",)),
    (["pipeline.gates={removal_on_own:0}", "pipeline.evaluate=[]"], ("removal_on_own needs leave_one_out=true",)),
]


@pytest.mark.parametrize(("overrides", "parts"), MISTAKES)
def test_a_mistake_is_told_before_anything_starts(
    overrides: list[str], parts: tuple[str, ...], tmp_path: Path, refused: Refused
) -> None:
    with refused(*parts):
        run(*compose("pipeline", ["pipeline=smoke", f"output_dir={tmp_path}/run", *overrides]))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("pipeline", ["demo", "smoke"])
def test_the_pipelines_that_come_along_pass_these_checks(pipeline: str) -> None:
    config = compose("pipeline", [f"pipeline={pipeline}"])[0]
    check_evaluable(config.pipeline.gates, compose_all(build_graph(config))["evaluation"])


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "file").touch()
    for place in (f"{tmp_path}/file/x", f"{tmp_path}/file", "/proc/run"):  # /proc refuses everybody, root too
        with refused(f"output_dir={place} cannot be used"):
            run(*compose("pipeline", ["pipeline=smoke", f"output_dir={place}"]))


def test_somebodys_own_files_are_neither_taken_nor_deleted(tmp_path: Path, refused: Refused) -> None:
    own = tmp_path / "data/math/book.txt"
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    for _ in range(2):
        with refused(tmp_path / "data/math", "is no pipeline's"):
            run(*compose("pipeline", ["pipeline=smoke", f"output_dir={tmp_path}"]))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [own]


class WritingLauncher:
    """A launcher of its own kind: a stage is over when it is started, and is told of at the next call."""

    def __init__(self, interrupt: str = "") -> None:
        self.interrupt = interrupt
        self.over: list[Ended] = []
        self.started: list[str] = []

    def has_room(self, node: Node) -> bool:
        return not self.over

    def start(self, node: Node) -> None:
        assert not node.output.exists()
        node.output.mkdir(parents=True)
        (node.output / "weights").write_text(node.name)
        self.started.append(node.name)
        self.over.append(Ended(node, 0, 0.0, "log", ""))

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


def test_what_ended_while_the_walk_was_interrupted_is_recorded(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        walk(tmp_path, WritingLauncher(interrupt="expert"))
    launcher = WritingLauncher()
    walk(tmp_path, launcher)
    assert launcher.started == ["whole"]


def test_an_interrupt_during_hashing_loses_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, calls = Records.write, []

    def interrupted(self: Records, node: Node, graph: dict[str, Node]) -> None:
        calls.append(node.name)
        if calls == ["base"]:
            raise KeyboardInterrupt
        write(self, node, graph)

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


def test_a_link_is_deleted_and_not_what_it_leads_to(tmp_path: Path) -> None:
    node = Node("whole", "assemble", (), tmp_path / "run/whole")
    (tmp_path / "elsewhere").mkdir()
    node.output.parent.mkdir()
    node.output.symlink_to(tmp_path / "elsewhere")
    Records(tmp_path / "run").discard(node)
    assert not node.output.is_symlink() and (tmp_path / "elsewhere").is_dir()
    with pytest.raises(AssertionError):
        Records(tmp_path / "run").discard(Node("whole", "assemble", (), tmp_path / "elsewhere"))


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
        '#!/bin/sh\necho "asked for $3"\nif [ "$3" = bad ]; then echo "it is bad"; exit 3; fi\nexec sleep 60\n'
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
    assert time.monotonic() - before < 10 and launcher.poll() == []


def test_records_hold_the_recipe_and_the_files(tmp_path: Path) -> None:
    walk(tmp_path, WritingLauncher())
    record = json.loads((tmp_path / "stages/expert.json").read_text())
    assert (record["stage"], record["overrides"]) == ("expert", ["b=2"])
    assert record["inputs"].keys() == {"base"} and record["files"].keys() == {"weights"}
