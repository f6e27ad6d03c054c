"""`pipeline.prepare_shards`: a data set that is prepared in parts side by side is the one that a single stage makes."""

import subprocess
import sys
from pathlib import Path

import pytest
from cluster import Cluster, wait_for
from corpus import content, json_lines, make_texts, manifest, prepare

from flexpert.config.compose import compose
from flexpert.launch.graph import Records, build_graph
from flexpert.launch.job import read_job
from flexpert.launch.local import LocalLauncher
from flexpert.launch.submit import units
from flexpert.launch.walk import Walk

pytestmark = pytest.mark.slow

SPLITS = ("train", "valid")
SHARDS = [f"data/math/{part}-of-3" for part in range(3)]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides of a pipeline with two owners, of which one's text is seven files."""
    root = tmp_path_factory.mktemp("texts")
    texts = {"public": make_texts(60), "news": make_texts(40, seed=1), "math": make_texts(140, seed=2)}
    for name, documents in texts.items():
        (root / name).mkdir()
        for index in range(7 if name == "math" else 1):
            own = documents[20 * index : 20 * (index + 1)] if name == "math" else documents
            (root / name / f"{index}.jsonl").write_bytes(json_lines(own))
    return [
        "pipeline=smoke", "pipeline.dense=null", "pipeline.prepare=[valid_fraction=0.2]",
        f"pipeline.public_data=[data.documents={root}/public/*.jsonl,train_tokenizer.vocab_size=320,valid_fraction=0.2]",
        *(f"pipeline.experts.{name}=[data.documents={root}/{name}/*.jsonl]" for name in ("math", "news")),
        "pipeline.prepare_shards={math:3}",
    ]  # fmt: skip


def flexpert(*words: str, environment: dict[str, str] | None = None) -> str:
    command = [sys.executable, "-m", "flexpert", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def local(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pipeline makes on this machine of the sharded text and what that needs."""
    run = tmp_path_factory.mktemp("local") / "run"
    config = compose("pipeline", [*settings, f"output_dir={run}"])[0]
    nodes = [node for node in build_graph(config) if node.name in ("data/public", *SHARDS, "data/math")]
    Walk(nodes, Records(run), LocalLauncher(config.launcher, run), set()).run()
    return run


def test_one_merge_comes_after_all_shards_and_before_the_expert(settings: list[str]) -> None:
    config = compose("pipeline", [*settings, "output_dir=run", "launcher=slurm"])[0]
    nodes = {node.name: node for node in build_graph(config)}
    assert [name for name in nodes if name.startswith("data/math")] == [*SHARDS, "data/math"]
    assert all(nodes[shard].needs == ("data/public",) for shard in SHARDS)
    assert nodes["data/math"].needs == tuple(SHARDS) and "merge=true" in nodes["data/math"].overrides
    assert "data/math" in nodes["experts/math"].needs and not set(SHARDS) & {*nodes["experts/math"].needs}
    assert "data.dir=run/data/math" in nodes["experts/math"].overrides
    assert not [name for name in nodes if name.startswith("data/news/")]


def test_an_array_of_shards_is_submitted_after_what_it_needs_and_before_what_needs_it(settings: list[str]) -> None:
    """A merge has the place of an ordinary data set in the graph, but not its turn."""
    config = compose("pipeline", [*settings, "output_dir=run", "launcher=slurm", "launcher.array=true"])[0]
    submitted: set[str] = set()
    sizes = {}
    for unit in units(build_graph(config), config):
        for node in unit.nodes:
            assert submitted.issuperset((*node.needs, *node.wants)), node.name
        submitted |= {node.name for node in unit.nodes}
        sizes[unit.name] = len(unit.nodes)
    assert sizes["data.math-array"] == 3 and sizes["experts-array"] == 2


def test_the_merged_set_holds_the_documents_of_the_whole(local: Path, settings: list[str], tmp_path: Path) -> None:
    documents = next(word for word in settings if word.startswith("pipeline.experts.math=")).partition("[")[2][:-1]
    whole = prepare(tmp_path / "whole", documents, f"tokenizer={local}/data/public/tokenizer", "valid_fraction=0.2")
    merged = local / "data/math"
    for split in SPLITS:
        assert sorted(content(merged, split)) == sorted(content(whole, split)) != []
        assert [part["prefix"] for part in manifest(merged)["splits"][split]["parts"]] == [
            f"shards/{part}-of-3/{split}" for part in range(3)
        ]


def test_on_slurm_it_is_the_same_set_from_separate_jobs_and_from_an_array(
    cluster: Cluster, local: Path, settings: list[str], tmp_path: Path
) -> None:
    """All else is held back, and cancelled in the end."""
    runs = {array: tmp_path / array for array in ("false", "true")}
    hold = ["launcher=slurm", "launcher.jobs={pretrain:[--hold],data/news:[--hold]}"]
    environment = cluster.environment | {"OMP_NUM_THREADS": "1"}
    for array, run in runs.items():
        words = [*settings, *hold, f"launcher.array={array}", f"output_dir={run}"]
        flexpert("pipeline", *words, environment=environment)
    try:
        for run in runs.values():
            record = run / "stages/data.math.json"
            wait_for(str(record), record.exists, 400)
    finally:
        for run in runs.values():
            flexpert("cancel", f"run={run}", environment=environment)
    jobs = {array: [read_job(run, name) for name in SHARDS] for array, run in runs.items()}
    ids = {array: [record["job"] for record in found if record is not None] for array, found in jobs.items()}
    assert len({job.partition("_")[0] for job in ids["false"]}) == 3
    assert len({job.partition("_")[0] for job in ids["true"]}) == 1
    for run in runs.values():
        for split in SPLITS:
            assert content(run / "data/math", split) == content(local / "data/math", split)
