"""What W&B is told of a pipeline's results: the right numbers, which model came from what, and nothing else."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import wandb
import yaml
from test_report import BITS, DENSE, DOMAINS, OWNERS, evaluation, write_run

from flexpert.config.compose import compose
from flexpert.monitor.report import run
from flexpert.records import read_json, sha256_file, write_record

pytestmark = pytest.mark.slow

PRIVATE = ["Title of the owner", "LicenseRef-private-terms", "A private note", "The weights"]


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose records hold something private wherever it fits."""
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "wandb-data"))
    path = write_run(tmp_path / "run", title=PRIVATE[0])
    for file in path.rglob("contribution.json"):
        write_record(file, "flexpert.contribution", {**read_json(file), "license": PRIVATE[1]})
    (path / "assembled/expert-math.safetensors").write_text(PRIVATE[3])
    pipeline = yaml.safe_load((path / "pipeline.yaml").read_text())
    pipeline["monitor"] = {"wandb": "offline", "project": "flexpert", "entity": None, "group": None, "later": 1}
    pipeline["pipeline"]["public_data"] = [f"data.documents={PRIVATE[2]}"]
    (path / "pipeline.yaml").write_text(yaml.safe_dump(pipeline))
    return path


def report(path: Path, *overrides: str) -> None:
    run(*compose("report", [f"run={path}", *overrides]))


def test_an_offline_run_holds_the_table_the_map_and_references(finished: Path) -> None:
    report(finished)
    report(finished)  # and nothing is told twice
    wandb.teardown()
    (offline,) = (finished / "wandb").glob("offline-run-*")
    (table,) = offline.glob("files/media/table/*.json")
    content = json.loads(table.read_text())
    assert content["columns"] == ["method", *DOMAINS]
    rows = {row[0]: row[1:] for row in content["data"]}
    assert rows["BTM"] == [pytest.approx(value, abs=1e-4) for value in BITS["btm"]]
    assert rows["Dense fine-tune, own domain"] == [None, *(pytest.approx(value, abs=1e-4) for value in DENSE)]
    without = evaluation()["methods"]["without news"]["domains"]
    assert rows["Flexpert without news"] == [without[name]["bits_per_byte"] for name in DOMAINS]
    (picture,) = offline.glob("files/media/images/routing*.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    (record,) = offline.glob("*.wandb")
    for _ in range(100):  # W&B's own process may still be writing
        if b"assembled-model" in record.read_bytes():
            break
        time.sleep(0.1)
    told = record.read_bytes()
    assembly = finished / "assembled/assembly.json"
    digests = [entry["contribution"] for entry in read_json(assembly)["experts"][1:]]
    for expected in ["public-model", *(f"contribution-{name}" for name in OWNERS), *digests, sha256_file(assembly)]:
        assert expected.encode() in told, expected
    places = [offline, finished.parent / "wandb-data"]
    files = {path: path.read_bytes() for place in places for path in place.rglob("*") if path.is_file()}
    for text in PRIVATE:
        assert not [path for path, content in files.items() if text.encode() in content], text


class Recorder:
    """In place of an online run."""

    def __init__(self, **given: Any) -> None:
        self.given, self.used, self.logged, self.row = given, list[Any](), list[Any](), dict[str, Any]()

    def use_artifact(self, artifact: Any) -> None:
        self.used.append(artifact)

    def log_artifact(self, artifact: Any) -> None:
        self.logged.append(artifact)

    def log(self, row: dict[str, Any]) -> None:
        self.row |= row

    def finish(self, exit_code: int) -> None:
        assert exit_code == 0


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    made: list[Recorder] = []

    def init(**given: Any) -> Recorder:
        made.append(Recorder(**given))
        return made[-1]

    monkeypatch.setattr("wandb.init", init)
    return made


def test_without_the_server_results_are_recorded_offline(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("flexpert.monitor.wandb.INIT_SECONDS", 5.0)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    report(finished, "wandb=online")
    wandb.teardown()
    assert f": this run is recorded offline, and `flexpert sync run={finished}` uploads it" in capsys.readouterr().out
    assert list((finished / "wandb").glob("offline-run-*/files/media/table/*.json"))


def test_online_the_model_is_made_from_base_and_contributions(finished: Path, runs: list[Recorder]) -> None:
    report(finished, "wandb=online")
    report(finished, "wandb=online")
    first, second = runs
    assert [artifact.name for artifact in first.used] == ["public-model", *(f"contribution-{n}" for n in OWNERS)]
    (model,) = first.logged
    assert (model.name, model.type) == ("assembled-model", "model")
    assert list(model.metadata["contributions"]) == OWNERS
    assert [list(artifact.manifest.entries) for artifact in (*first.used, model)] == [["digest"]] * 7
    assert all(entry.ref and entry.local_path is None for entry in model.manifest.entries.values())
    # The same run and the same versions, also when it is told again.
    assert first.given["id"] == second.given["id"] and first.given["config"] == {"seed": 0}
    assert [artifact.digest for artifact in (*first.used, model)] == [
        artifact.digest for artifact in (*second.used, *second.logged)
    ]
    assert len({artifact.digest for artifact in (*first.used, model)}) == 7


def test_other_results_are_another_run(finished: Path, runs: list[Recorder]) -> None:
    report(finished)
    content = evaluation()
    content["methods"]["model"]["domains"]["math"]["bits_per_byte"] -= 0.01
    write_record(finished / "evaluation/evaluation.json", "flexpert.evaluation", content)
    report(finished)
    assert runs[0].given["id"] != runs[1].given["id"]


def test_names_that_are_no_ids_and_records_that_are_no_digests_stay_here(finished: Path, runs: list[Recorder]) -> None:
    content = json.loads(json.dumps(evaluation()).replace('"records"', f'"{PRIVATE[0]}"'))
    write_record(finished / "evaluation/evaluation.json", "flexpert.evaluation", content)
    assembly = read_json(finished / "assembled/assembly.json")
    assembly["experts"][1]["contribution"] = PRIVATE[0]
    write_record(finished / "assembled/assembly.json", "flexpert.assembly", assembly)
    report(finished)
    (told,) = runs
    assert not told.used and not told.logged and list(told.row) == ["bits_per_byte"]
    assert told.row["bits_per_byte"].columns == ["method", *DOMAINS[:-1]]


def test_what_an_interrupted_run_left_is_told(finished: Path, runs: list[Recorder]) -> None:
    shutil.rmtree(finished / "evaluation")
    shutil.rmtree(finished / "assembled")
    report(finished)
    assert [(told.used, told.logged, told.row) for told in runs] == [([], [], {})]


def test_nothing_is_told_where_the_pipeline_says_off(finished: Path, runs: list[Recorder]) -> None:
    report(finished, "wandb=off")
    pipeline = yaml.safe_load((finished / "pipeline.yaml").read_text())
    pipeline["monitor"]["wandb"] = "off"
    (finished / "pipeline.yaml").write_text(yaml.safe_dump(pipeline))
    report(finished)
    assert runs == [] and not (finished / "wandb").exists()
