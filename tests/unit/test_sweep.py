"""`--multirun`: which runs there are, that each is the stage's own, and what is said when one fails."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from processes import children, runs
from test_config import one_line_of_status_2

from flexpert.cli import main
from flexpert.config.tree import CONFIG_DIR
from flexpert.launch.sweep import values_of

PLAN = ["plan", "stage=pretrain", "model=olmo2_1b"]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory: two texts, in a directory that Hydra's grammar would take apart."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "")
    monkeypatch.setenv(CONFIG_DIR, "")
    texts = tmp_path / "a, b (c)=${d"
    texts.mkdir()
    for name in ("1.txt", "2.txt"):
        (texts / name).write_text("one two three\n" * 30)
    return tmp_path


@pytest.mark.parametrize(
    ("stage", "override", "values"),
    [
        # numbers, switches, choices: Hydra's grammar, listed ones as typed
        ("pretrain", "optim.lr=1e-3,2e-3", ["1e-3", "2e-3"]),
        ("pretrain", "optim.lr=choice(0.1, 0.2)", ["0.1", "0.2"]),
        ("pretrain", "seed=range(3)", ["0", "1", "2"]),
        ("pretrain", "seed=range(2,7,2)", ["2", "4", "6"]),
        ("pretrain", "optim.lr=range(0.5,1.5,0.5)", ["0.5", "1.0"]),
        ("pretrain", "train.tokens=50e9,60e9", ["50e9", "60e9"]),
        ("pretrain", "data.intra_document_attention=true,false", ["true", "false"]),
        ("pretrain", "optim.grad_clip=null,1", ["null", "1"]),
        ("pretrain", "model=tiny,small", ["tiny", "small"]),
        ("pretrain", "+experiment=a,b", ["a", "b"]),
        ("pretrain", "seed=5", ["5"]),
        # text: commas, unless quotes or brackets keep them
        ("expert", "title=a,b", ["a", "b"]),
        ("expert", "title=a, b = c", ["a", "b = c"]),
        ("expert", 'title="a, b"', ['"a, b"']),
        ("expert", 'title="a, b",c', ['"a, b"', "c"]),
        ("expert", "title=choice(a,b (c,d))", ["a", "b (c,d)"]),
        ("expert", "title=f(a,b)", ["f(a,b)"]),
        ("expert", "title=range(3)", ["range(3)"]),
        ("expert", "title=O'Brien,a", ["O'Brien", "a"]),
        ("expert", "title=Hello,", ["Hello,"]),
        ("evaluate", "model=/m/a,/m/b", ["/m/a", "/m/b"]),
        # what has commas of its own
        ("generate", "prompt=Hello, world", ["Hello, world"]),
        ("evaluate", "exclude=a,b", ["a,b"]),
        ("evaluate", "exclude=[a],[b]", ["[a],[b]"]),
        ("pretrain", "optim.betas=[0.9,0.95]", ["[0.9,0.95]"]),
        ("evaluate", "data.dirs={a:/d,b:/e}", ["{a:/d,b:/e}"]),
        ("evaluate", "data.dirs.a=/d,/e", ["/d,/e"]),
        # mistakes that composing will name
        ("pretrain", "no.key=1,2", ["1,2"]),
    ],
)
def test_an_override_stands_for(stage: str, override: str, values: list[str]) -> None:
    key = override.partition("=")[0]
    assert values_of(stage, override) == [f"{key}={value}" for value in values]


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["optim.lr=interval(0,1)"], ("optim.lr=interval(0,1) is no list of values", "range(FIRST,END,STEP)")),
        (["model=glob(*)"], ("model=glob(*) is no list of values",)),
        (["seed=range(1,3,0)"], ("seed=range(1,3,0)",)),
        (["seed=range(0)"], ("seed=range(0) has no value",)),
        (["seed=("], ("seed=(",)),
        (["seed=1,-1"], ("seed=-1 must be in [0, 2^32)",)),
        (["model=tiny,huge"], ("there is no model=huge",)),
        (["optim.betas=[0.9,0.95],[0.8,0.95]"], ("optim.betas=[0.9,0.95],[0.8,0.95]",)),
        (["data.dir=/none/a,/none/b"], ("data.dir=/none/a does not exist",)),
        (["output_dir=a,b"], ("output_dir=a,b: give one directory",)),
        (["seed=1,2", "output_dir=runs/${seed}"], ("output_dir=runs/${seed}: seed differs",)),
        (["seed=1,2", "hydra.launcher.partition=a"], ("hydra.launcher.partition=a: ",)),
        (["seed=1,2", "hydra/launcher=cloud"], ("hydra/launcher=cloud: ",)),
        (["--config-path=x"], ("unknown key '--config-path'",)),
        (["--cfg"], ("'--cfg' is not an override",)),
    ],
)
def test_a_mistake_in_any_run_is_one_line_before_the_first_one_starts(
    words: list[str], parts: tuple[str, ...], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = place / "data"
    data.mkdir()
    (data / "manifest.json").touch()
    line = one_line_of_status_2(["pretrain", "-m", f"data.dir={data}", "train.steps=1", *words], capsys)
    assert not [part for part in parts if part not in line], line
    assert sorted(path.name for path in place.iterdir()) == ["a, b (c)=${d", "data"]


def test_slurm_without_the_extra_or_without_slurm_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--multirun", "nodes=8,16", "hydra/launcher=submitit_slurm"]
    monkeypatch.setenv("PATH", "")
    assert "there is no sbatch here" in one_line_of_status_2([*PLAN, *words], capsys)
    line = one_line_of_status_2([*PLAN, *words, "hydra.launcher.tasks_per_node=2"], capsys)
    assert "stages of one process" in line
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert "pip install 'flexpert[sweep]'" in one_line_of_status_2([*PLAN, *words], capsys)


def test_torchrun_with_multirun_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "--multirun is for stages of one process" in one_line_of_status_2(
        [*PLAN, "--multirun", "nodes=8,16"], capsys
    )


@pytest.mark.usefixtures("place")
def test_each_combination_runs_by_itself_and_text_arrives_as_typed(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A run's directory has the stage's files alone; the user's directory reaches every run."""
    own = place / "own/data"
    own.mkdir(parents=True)
    (own / "mine.yaml").write_text("text_field: body\n")
    monkeypatch.setenv(CONFIG_DIR, str(place / "own"))
    glob = "a, b (c)=\\${d/1.txt", "a, b (c)=\\${d/2.txt"
    words = ["train_tokenizer.vocab_size=300", "valid_fraction=0", "data=mine"]
    sweep = [f"data.documents=choice('{glob[0]}','{glob[1]}')", "seed=4,5", "output_dir=out", *words]
    main(["prepare", "--multirun", *sweep])
    out = capfd.readouterr().out
    assert sorted(path.name for path in Path("out").iterdir()) == ["0", "1", "2", "3", "sweep", "sweep.yaml"]
    for number, (file, seed) in enumerate([("1", 4), ("1", 5), ("2", 4), ("2", 5)]):
        directory = Path(f"out/{number}")
        assert {path.name for path in directory.iterdir()} == {
            "train.bin", "train.idx", "train.hashes.bin", "valid.bin", "valid.idx", "valid.hashes.bin", "manifest.json",
            "resolved.yaml", "tokenizer",
        }  # fmt: skip
        resolved = yaml.safe_load((directory / "resolved.yaml").read_text())
        assert resolved["data"]["documents"] == f"a, b (c)=${{d/{file}.txt"
        assert (resolved["seed"], resolved["data"]["text_field"]) == (seed, "body")
    record = yaml.safe_load(Path("out/sweep.yaml").read_text())
    assert record["overrides"] == ["output_dir=out", *words]
    assert [run["status"] for run in record["runs"]] == [0, 0, 0, 0]
    rows = out.splitlines()[-4:]
    assert [row.split()[0] for row in rows] == ["0", "1", "2", "3"]
    assert all(row.endswith("done") for row in rows)
    assert "seed=5" in rows[1] and "2.txt" in rows[2]


def test_a_run_that_fails_stops_no_other_and_the_sweep_fails_with_its_status(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["train_tokenizer.vocab_size=300", "valid_fraction=0", "output_dir=out"]
    with pytest.raises(SystemExit) as ended:
        main(["prepare", "-m", f"data.documents={place}/none/*.txt,*/1.txt", *words])
    out, error = capfd.readouterr()
    assert ended.value.code == 2
    assert "1 of 2 runs of prepare have failed: 0;" in error
    rows = out.splitlines()[-2:]
    assert "status 2: " in rows[0] and "none/*.txt" in rows[0].partition("status 2: ")[2]
    assert rows[1].endswith("done")
    assert [run["status"] for run in yaml.safe_load(Path("out/sweep.yaml").read_text())["runs"]] == [2, 0]
    assert "none/*.txt" in Path("out/sweep/0.log").read_text()


def test_another_sweep_in_the_same_directory_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("out").mkdir()
    record = {"stage": "prepare", "overrides": [], "runs": [{"number": 0, "overrides": "seed=3", "status": 0}]}
    Path("out/sweep.yaml").write_text(yaml.safe_dump(record))
    words = ["data.documents=*/1.txt", "train_tokenizer.vocab_size=300", "output_dir=out"]
    assert "out/sweep.yaml is of another sweep" in one_line_of_status_2(["prepare", "-m", "seed=1,2", *words], capsys)
    for foreign in ("program: train.py\n", "", "- [", "runs: [1]\n"):  # as W&B's own sweeps have it, for one
        Path("out/sweep.yaml").write_text(foreign)
        assert "is of another sweep" in one_line_of_status_2(["prepare", "-m", "seed=1,2", *words], capsys)
        assert Path("out/sweep.yaml").read_text() == foreign


def test_a_stage_that_writes_nothing_prints_and_its_output_is_kept(capfd: pytest.CaptureFixture[str]) -> None:
    """Where an expert's default directory would have its name in it, which differs, the place is the same one."""
    main([*PLAN, "-m", "nodes=8,16"])
    out = capfd.readouterr().out
    logs = [Path(f"multirun/plan/sweep/{number}.log").read_text() for number in (0, 1)]
    assert all(log.rpartition("--- run")[0] in out for log in logs)
    assert logs[0] != logs[1]
    assert not Path("multirun/plan/0").exists()
    main([*PLAN, "-m", "nodes=4"])  # what printed only is not in the way
    assert "nodes=4" not in capfd.readouterr().out.splitlines()[-1]  # one run: nothing differs


def test_when_it_is_told_to_stop_the_run_stops_and_no_other_starts(place: Path) -> None:
    """The first run has text for much longer than it is given."""
    with open("long.jsonl", "w") as file:
        for thousand in range(4000):
            numbers = " ".join(str((1000 * thousand + number) ** 2) for number in range(1000))
            file.write(f'{{"text": "{numbers}"}}\n')
    words = ["data.documents=long.jsonl", "train_tokenizer.vocab_size=300", "output_dir=out"]
    command = [sys.executable, "-m", "flexpert", "prepare", "--multirun", "seed=1,2", *words]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (started := children(process.pid)) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 75, error
    assert not any(runs(child) for child in started)
    assert not Path("out/sweep/1.log").exists()


def test_a_run_that_is_being_started_ends_with_the_sweep(place: Path, stopped_in_popen: list[int]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(
            ["prepare", "-m", "seed=1,2", "data.documents=*/*.txt", "train_tokenizer.vocab_size=300", "output_dir=out"]
        )
    assert ended.value.code == 75
    assert len(stopped_in_popen) == 1 and not any(map(runs, stopped_in_popen))
