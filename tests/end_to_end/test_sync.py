"""`flexpert sync`: W&B's own client tells a server what it lacks, each step once, and nothing that is not allowed."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_report import DOMAINS, write_run
from toy import train
from wandb_server import Store, served

from flexpert.config.compose import compose
from flexpert.config.groups import MonitorConfig
from flexpert.errors import UserError
from flexpert.lock import exclusive
from flexpert.monitor.jsonl import MetricsLog, read_metrics
from flexpert.monitor.sync import run
from flexpert.monitor.wandb import WandbRun, kill_service
from flexpert.records import read_json, write_record
from flexpert.stage import comparable

pytestmark = pytest.mark.slow

KEY = "5ec2e7" * 6 + "abcd"
PRIVATE = ["Title of the owner", "LicenseRef-private-terms", "a note beside the numbers"]
STEPS = 6


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "wandb-data"))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with served() as store:
        monkeypatch.setenv("WANDB_BASE_URL", store.address)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        yield store


def sync(path: Path, *overrides: str) -> None:
    run(*compose("sync", [f"run={path}", *overrides]))


def steps(server: Store) -> dict[str, list[int]]:
    """Job type → steps in the order in which they arrived."""
    return {known.facts["jobType"]: known.steps for known in server.runs.values()}


def row(step: int) -> dict[str, Any]:
    return {"step": step, "tokens": step * 100, "loss": 3 - step / 10, "mfu": None}


def write_rows(output: Path, numbers: range) -> None:
    log = MetricsLog(output / "metrics.jsonl", numbers[0] - 1)
    for step in numbers:
        log.write(row(step))
    log.close()


def write_config(output: Path, **settings: Any) -> None:
    """Of a stage with `STEPS` steps."""
    config: dict[str, Any] = {"train": {"steps": STEPS, "tokens": None, "batch_tokens": 100, "device": "cpu"}}
    config |= {"seed": 0, "monitor": {"wandb": "auto", "project": "flexpert", "entity": "me", "group": "demo"}}
    (output / "resolved.yaml").write_text(yaml.safe_dump(config | settings))


def test_what_ran_offline_is_told_once_under_the_ids_that_it_has(
    server: Store, expert_overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    settings = ["router.calibration_steps=3", "train.steps=5", "train.evaluation_interval=2", "monitor.group=demo"]
    train("expert", *expert_overrides, *settings, "monitor.wandb=offline", f"output_dir={output}")
    assert server.bodies == []
    ids = {path.parent.parent.name: path.name.split("-")[-1] for path in output.glob("**/wandb/offline-run-*")}
    capsys.readouterr()

    sync(output)
    assert capsys.readouterr().out.splitlines() == [
        f"{output}: 5 of 5 steps sent, run {ids['run']}",
        f"{output}/calibration: 3 of 3 steps sent, run {ids['calibration']}",
    ]
    assert steps(server) == {"expert": [1, 2, 3, 4, 5], "calibrate": [1, 2, 3]}
    assert list(server.runs) == [ids["run"], ids["calibration"]]
    expert, calibration = server.runs.values()
    assert {known.facts["groupName"] for known in server.runs.values()} == {"demo"}
    assert expert.config["optim.lr"] == 1e-2 and calibration.config["optim.lr"] == 2e-2
    told = [json.loads(line) for line in expert.rows]
    recorded = read_metrics(output / "metrics.jsonl")
    assert [{key: found.get(key) for key in kept} for found, kept in zip(told, recorded, strict=True)] == recorded
    for known in server.runs.values():
        axes = {metric.get("2", metric.get("1")): metric.get("5") for metric in known.config["_wandb"]["m"]}
        assert axes == {"*": 2, "tokens": None}  # of every metric the second one is the x axis
        assert known.exit_codes[-1] == 0
    assert [artifact[1:] for artifact in server.artifacts] == [
        ("made", "public-model"), ("used", "public-model"), ("made", "contribution-letters")
    ]  # fmt: skip

    # From another place, without what W&B's client left, and in the end without checkpoints, the ids stay.
    moved = output.rename(tmp_path / "moved")
    sync(moved)
    for path in [*moved.glob("**/wandb")]:
        shutil.rmtree(path)
    sync(moved)
    moved.rename(output)
    for path in (*output.glob("**/wandb"), *output.glob("**/checkpoints")):
        shutil.rmtree(path)
    sync(output)
    assert list(server.runs) == [ids["run"], ids["calibration"]]
    assert steps(server) == {"expert": [1, 2, 3, 4, 5], "calibrate": [1, 2, 3]}
    assert len(server.artifacts) == 3


def start(output: Path, mode: str) -> WandbRun:
    """As a stage in its directory does."""
    flat = comparable((output / "resolved.yaml").read_text())
    return WandbRun(MonitorConfig(entity="me"), mode, "pretrain", output, flat)


def test_an_interrupted_online_run_gets_the_rest_by_sync_or_when_training_goes_on(
    server: Store, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    output.mkdir()
    write_config(output)
    write_rows(output, range(1, 4))
    stopped = start(output, "online")
    stopped.close(failed=True)
    known = server.runs[stopped.id]
    assert known.steps == [1, 2, 3]
    killed = start(output, "online")
    for step in (4, 5):
        killed.log(row(step))
    write_rows(output, range(4, 6))
    kill_service()  # as the end of a job does
    killed.close()
    assert len(known.steps) < 5
    sync(output)
    assert known.steps == [1, 2, 3, 4, 5]
    assert known.exit_codes[-1] == 1  # the stage has not come to its end

    write_rows(output, range(6, 8))  # without the server
    resumed = start(output, "online")
    resumed.log(row(8))
    resumed.close()
    assert known.steps == [1, 2, 3, 4, 5, 6, 7, 8]
    assert list(server.runs) == [stopped.id]


def test_wandbs_own_sync_and_this_one_do_not_double_each_other(server: Store, tmp_path: Path) -> None:
    for name, first in (("ours", sync), ("theirs", wandb_sync)):
        output = tmp_path / name
        output.mkdir()
        write_config(output)
        write_rows(output, range(1, STEPS + 1))
        offline = start(output, "offline")
        for step in range(1, STEPS + 1):
            offline.log(row(step))
        offline.close()
        first(output)
        assert server.runs[offline.id].steps == list(range(1, STEPS + 1))
        second = wandb_sync if first is sync else sync
        second(output)
        assert server.runs[offline.id].steps == list(range(1, STEPS + 1))


def wandb_sync(output: Path) -> None:
    """W&B's own command, on what its client has recorded below a stage's directory."""
    paths = map(str, output.glob("wandb/offline-run-*"))
    command = [sys.executable, "-m", "wandb", "sync", *paths]
    done = subprocess.run(command, cwd=output, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """A pipeline's run with two stages that trained and something private wherever it fits."""
    path = write_run(tmp_path / "run", title=PRIVATE[0])
    for stage in [path / "dense", *(p for p in (path / "experts").iterdir() if p.name != "math")]:
        shutil.rmtree(stage)
    for stage, settings in (("public", {}), ("experts/math", {"name": "math", "title": PRIVATE[0]})):
        write_config(path / stage, license=PRIVATE[1], **settings)
        rows = [row(step) | {"note": PRIVATE[2]} for step in range(1, STEPS + 1)]
        (path / stage / "metrics.jsonl").write_text("".join(json.dumps(content) + "\n" for content in rows))
    record = path / "experts/math/contribution/contribution.json"
    base = read_json(path / "assembled/assembly.json")["base_digest"]
    write_record(record, "flexpert.contribution", {**read_json(record), "license": PRIVATE[1], "base_digest": base})
    config = yaml.safe_load((path / "pipeline.yaml").read_text())
    config["monitor"] = {"wandb": "auto", "project": "flexpert", "entity": "me", "group": None}
    (path / "pipeline.yaml").write_text(yaml.safe_dump(config))
    return path


def test_a_pipelines_stages_results_and_lineage_are_told_once(
    server: Store, pipeline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sync(pipeline)
    numbers = list(range(1, STEPS + 1))
    assert steps(server) == {"pretrain": numbers, "expert": numbers, "report": [0]}
    jobs = {name: known.facts["jobType"] for name, known in server.runs.items()}
    edges = [(jobs.get(name), what, artifact) for name, what, artifact in server.artifacts]
    assert ("pretrain", "made", "public-model") in edges and ("pretrain", "used", "public-model") not in edges
    assert {("expert", "used", "public-model"), ("expert", "made", "contribution-math")} <= set(edges)
    assert ("report", "made", "assembled-model") in edges and ("report", "used", "contribution-math") in edges
    (results,) = (known for known in server.runs.values() if known.facts["jobType"] == "report")
    told = json.loads(results.rows[0])
    assert (told["bits_per_byte"]["_type"], told["routing"]["_type"]) == ("table-file", "image-file")
    (table,) = (content for name, content in server.files.items() if name.startswith("media/table/bits_per_byte"))
    assert json.loads(table)["columns"] == ["method", *DOMAINS]
    assert any(name.startswith("media/images/routing") for name in server.files)
    capsys.readouterr()
    sent = [*server.bodies, *server.files.values()]
    assert not [text for text in (*PRIVATE, KEY, str(pipeline)) if any(text.encode() in content for content in sent)]

    num_artifacts, num_files = len(server.artifacts), len(server.files)
    sync(pipeline)
    assert steps(server) == {"pretrain": numbers, "expert": numbers, "report": [0]}
    assert (len(server.artifacts), len(server.files)) == (num_artifacts, num_files)
    assert [line.split(": ")[1].split(",")[0] for line in capsys.readouterr().out.splitlines()] == [
        "0 of 6 steps sent", "0 of 6 steps sent", "results were sent before"
    ]  # fmt: skip


def test_a_stage_that_is_off_stays_untold_and_one_at_work_does_not_keep_the_others_back(
    server: Store, pipeline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_config(pipeline / "experts/math", name="math", monitor={"wandb": "off"})
    shutil.rmtree(pipeline / "assembled")
    shutil.rmtree(pipeline / "evaluation")
    with (
        exclusive(pipeline / "public"),
        pytest.raises(UserError, match=f"not all is told: {pipeline}/public is in use"),
    ):
        sync(pipeline)
    assert capsys.readouterr().out == f"{pipeline}/experts/math: not told, its monitor.wandb is off\n"
    assert server.bodies == []


def test_without_a_key_a_server_or_leave_to_use_one_it_is_one_line(
    server: Store, pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    with pytest.raises(UserError, match="WANDB_MODE=offline keeps from it"):
        sync(pipeline)
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY")
    with pytest.raises(UserError, match="sync needs W&B's server: set WANDB_API_KEY"):
        sync(pipeline)
    assert server.bodies == []
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:1")
    monkeypatch.setattr("flexpert.monitor.wandb.INIT_SECONDS", 5.0)
    with pytest.raises(UserError, match=r"sync: W&B: [^\n]*\Z") as caught:
        sync(pipeline)
    assert KEY not in str(caught.value) and "monitor.wandb=offline" not in str(caught.value)
    assert os.environ["WANDB_API_KEY"] == KEY
