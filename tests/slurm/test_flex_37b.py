"""The 37B run on paper: its layouts, intervals and limits are those of `flexpert plan`, and Slurm takes its scripts."""

import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster, missing, running
from omegaconf import OmegaConf

from flexpert.cli import main
from flexpert.config.compose import compose
from flexpert.config.stages import ClusterConfig, EvaluateConfig, PipelineConfig, PlanConfig, TrainingStage
from flexpert.config.tree import conf_directory
from flexpert.launch.graph import build_graph
from flexpert.launch.pipeline import compose_all
from flexpert.launch.submit import node_options
from flexpert.parallel.layout import Layout, for_inference, problem
from flexpert.planning.goodput import saving_of
from flexpert.planning.job import jobs_of
from flexpert.planning.plan import days, model_bytes, num_steps
from flexpert.planning.search import GIB, Choice, choices_of

pytestmark = pytest.mark.slow

PATH = conf_directory() / "pipeline/flex_37b.yaml"
PUBLIC = "data.tokens=/text/public/train-*.npy,data.valid_tokens=/text/public/valid-*.npy,data.token_dtype=uint32"
OWNERS = ("news", "creative", "code", "academic", "educational", "math", "reddit")
#: What a user must say.
PATHS = [
    f"pipeline.public_data=[{PUBLIC},tokenizer=/text/tokenizer]",
    *(f"pipeline.experts.{name}=[data.documents=/text/{name}/*.jsonl.zst]" for name in OWNERS),
]
#: A node that stands for its stage.
TRAINED = {"pretrain": "public", "expert": "experts/math", "tune_router": "tuned"}
#: Tokens a second that a core makes of text: two thirds of benchmarks/results/prepare.md's.
TOKENS_A_CORE = 250_000
#: Weights that `assemble` copies a second: the least of benchmarks/results/assemble.md.
BYTES_COPIED = 0.29e9


class Paper:
    """Attributes:
    config: of the pipeline.
    nodes: by name.
    configs: of their stages.
    """

    def __init__(self) -> None:
        self.config: PipelineConfig = compose("pipeline", ["pipeline=flex_37b", "launcher=slurm", *PATHS])[0]
        nodes = build_graph(self.config)
        self.nodes = {node.name: node for node in nodes}
        self.configs: dict[str, Any] = {name: config for name, (config, _) in compose_all(nodes).items()}

    def options(self, node: str) -> dict[str, str | None]:
        return node_options(self.config, self.nodes[node])

    def num_nodes(self, node: str) -> int:
        return int(self.options(node).get("nodes") or 1)

    def seconds(self, node: str) -> int:
        """Its time limit."""
        hours, minutes, seconds = map(int, str(self.options(node)["time"]).split(":"))
        return 3600 * hours + 60 * minutes + seconds

    def training(self, stage: str) -> TrainingStage:
        config = self.configs[TRAINED[stage]]
        assert isinstance(config, TrainingStage)
        return config

    def plan(self, stage: str) -> PlanConfig:
        """`flexpert plan` of a stage as this pipeline starts it, on any layout."""
        train = self.training(stage).train
        tokens = {"pretrain": "public", "expert": "expert", "tune_router": "router"}[stage]
        words = [
            "model=flex_37b", "cluster=h100", f"stage={stage}", f"nodes={self.num_nodes(TRAINED[stage])}",
            f"{tokens}_tokens={train.tokens}", f"batch_tokens={train.batch_tokens}",
            f"sequence_length={train.sequence_length}", f"microbatch_sequences={train.microbatch_sequences}",
            f"loss_chunk_tokens={train.loss_chunk_tokens}", f"recompute={train.recompute}",
        ]  # fmt: skip
        plan: PlanConfig = compose("plan", words)[0]
        return plan

    def layout(self, stage: str) -> Layout:
        """As the stage makes it of its keys."""
        parallel, plan = self.training(stage).parallel, self.plan(stage)
        expert_tensor = parallel.expert_tensor
        if expert_tensor is None:
            expert_tensor = 1 if stage == "pretrain" else parallel.tensor
        assert (parallel.data, parallel.replicas) == (-1, 1)
        return Layout(
            plan.nodes * plan.cluster.gpus_per_node, parallel.tensor, parallel.expert, expert_tensor, parallel.sequence
        )


@pytest.fixture(scope="module")
def paper() -> Paper:
    return Paper()


@pytest.fixture(scope="module")
def choices(paper: Paper) -> dict[str, tuple[PlanConfig, list[Choice]]]:
    """For each stage its plan, and the layouts that fit, the fastest first."""
    plans = {stage: paper.plan(stage) for stage in TRAINED}
    return {stage: (plan, choices_of(jobs_of(plan)[0], plan)) for stage, plan in plans.items()}


@pytest.fixture(scope="module")
def chosen(paper: Paper, choices: dict[str, tuple[PlanConfig, list[Choice]]]) -> dict[str, tuple[PlanConfig, Choice]]:
    """The pipeline's own layout among them."""
    found = {}
    for stage, (plan, fitting) in choices.items():
        layout = paper.layout(stage)
        assert layout in [choice.layout for choice in fitting], f"{stage}: {layout} does not fit"
        found[stage] = plan, next(choice for choice in fitting if choice.layout == layout)
    return found


def test_it_is_the_papers_recipe(paper: Paper) -> None:
    public, expert, router = (paper.training(stage) for stage in TRAINED)
    assert [node for node in paper.nodes if node.startswith("experts/")] == [f"experts/{name}" for name in OWNERS]
    assert [stage.train.tokens for stage in (public, expert, router)] == [10**12, 5 * 10**10, 5 * 10**9]
    assert {stage.train.batch_tokens for stage in (public, expert, router)} == {4_194_304}
    assert {stage.train.sequence_length for stage in (public, expert, router)} == {4096}
    assert [stage.optim.lr for stage in (public, expert, router)] == [9e-4, 9e-4, 2e-3]
    assert [stage.optim.warmup_steps for stage in (public, expert, router)] == [2000, 2000, 100]
    assert [stage.optim.weight_decay for stage in (public, expert, router)] == [0.1, 0.0, 0.1]
    assert public.optim.horizon_steps == math.ceil(5e12 / 4_194_304)
    assert (paper.configs["tuned"].active_experts, paper.configs["assembled"].active_experts) == (4, 4)
    assert router.data.dirs.keys() == {"public", *OWNERS} and set(router.data.weights.values()) == {1.0}
    assert router.data.dirs == paper.configs["evaluation"].data.dirs


def test_a_path_that_is_missing_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    for words, line in (
        ([], "data/public: prepare needs data.tokens=…, data.valid_tokens=…, tokenizer=…"),
        (PATHS[:1], "data/news/0-of-8: prepare needs data.documents=…"),
        (PATHS[:-1], "data/reddit: prepare needs data.documents=…"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["pipeline", "pipeline=flex_37b", "launcher=slurm", "launcher.dry_run=true", *words])
        assert (ended.value.code, capsys.readouterr().err) == (2, f"flexpert: {line}\n")


@pytest.mark.parametrize("stage", TRAINED)
def test_the_layout_fits_and_none_is_faster(
    stage: str, paper: Paper, chosen: dict[str, tuple[PlanConfig, Choice]],
    choices: dict[str, tuple[PlanConfig, list[Choice]]],
) -> None:  # fmt: skip
    plan, choice = chosen[stage]
    limit = (plan.cluster.memory_gib - plan.reserve_gib) * GIB
    assert choice.memory.total <= limit
    assert choice.cost.seconds <= 1.001 * choices[stage][1][0].cost.seconds
    config = paper.configs["public"].model
    assert choice.job.model.num_experts or choice.job.model.num_params() == config.num_params()
    options = paper.options(TRAINED[stage])
    assert options["gpus-per-node"] == str(plan.cluster.gpus_per_node) and "exclusive" in options
    for name in OWNERS if stage == "expert" else ():
        assert paper.options(f"experts/{name}") == options
        assert paper.configs[f"experts/{name}"].parallel == paper.training(stage).parallel


@pytest.mark.parametrize("stage", TRAINED)
def test_the_checkpoint_interval_is_the_plans(
    stage: str, paper: Paper, chosen: dict[str, tuple[PlanConfig, Choice]]
) -> None:
    """Twice the best, to a twentieth: 0.2% of the time lost, and less than a third of the file system's rate taken."""
    plan, choice = chosen[stage]
    saving, interval = saving_of(choice, plan), paper.training(stage).checkpoint.interval
    assert interval is not None
    assert interval == pytest.approx(2 * saving.best_interval(), rel=0.05)
    assert saving.goodput(interval) >= saving.goodput(saving.best_interval()) - 0.002
    assert choice.job.count * saving.write / (interval * saving.step) < 1 / 3


@pytest.mark.parametrize("stage", TRAINED)
def test_the_time_limit_costs_little_and_leaves_time_to_save(
    stage: str, paper: Paper, chosen: dict[str, tuple[PlanConfig, Choice]]
) -> None:
    plan, choice = chosen[stage]
    saving, side_by_side = saving_of(choice, plan), choice.job.count
    assert (saving.restart + side_by_side * saving.write) / paper.seconds(TRAINED[stage]) < 0.01
    script = (Path(__file__).parents[2] / f"slurm/{stage}.sbatch").read_text(encoding="utf-8")
    found = re.search(r"^#SBATCH --signal=USR1@(\d+)$", script, re.MULTILINE)
    assert found is not None and "signal" not in paper.options(TRAINED[stage])
    # A step ends, what is being written is written, and then the newest step; all experts may do so at once.
    assert saving.step + saving.stall + 2 * side_by_side * saving.write < int(found[1])


def test_what_has_no_checkpoints_ends_within_half_its_time_limit(
    paper: Paper, chosen: dict[str, tuple[PlanConfig, Choice]]
) -> None:
    weights = OmegaConf.load(conf_directory() / "mixture/flexmix.yaml").weights
    for name in OWNERS:
        shards = [node for node in paper.nodes if node.startswith(f"data/{name}/")] or [f"data/{name}"]
        cores = int(str(paper.options(shards[0])["cpus-per-task"]))
        assert 1e9 * weights[name] / len(shards) / cores / TOKENS_A_CORE < paper.seconds(shards[0]) / 2, name
    mixture = chosen["tune_router"][1].job.model
    assert model_bytes(mixture) / BYTES_COPIED < paper.seconds("assembled") / 2


def test_the_models_that_are_evaluated_can_be_held(paper: Paper, chosen: dict[str, tuple[PlanConfig, Choice]]) -> None:
    """Whole, with an expert taken out, and the public one: each in bf16 on one node's GPUs, in half of their memory."""
    evaluate = paper.configs["evaluation"]
    assert isinstance(evaluate, EvaluateConfig) and evaluate.leave_one_out
    cluster: ClusterConfig = chosen["expert"][0].cluster
    parallel = evaluate.parallel
    ranks = paper.num_nodes("evaluation") * cluster.gpus_per_node
    layout = for_inference(Layout(ranks, parallel.tensor, parallel.expert, parallel.expert_tensor or parallel.tensor))
    mixture = chosen["tune_router"][1].job.model
    for experts in (8, 7):
        assert problem(layout, mixture, (experts,), mixture.max_sequence_length) is None
    assert problem(Layout(ranks, layout.tensor), chosen["pretrain"][1].job.model, (), 4096) is None
    ways = layout.tensor * layout.expert
    assert model_bytes(mixture) / ways < cluster.memory_gib * GIB / 2


def test_the_figures_in_its_comments_are_the_plans(paper: Paper, chosen: dict[str, tuple[PlanConfig, Choice]]) -> None:
    text = PATH.read_text(encoding="utf-8")
    rows = re.findall(r"^# +(pretrain|expert|tune_router) +(.+)$", text, re.MULTILINE)
    assert [stage for stage, _ in rows] == list(TRAINED)
    for stage, told in rows:
        plan, choice = chosen[stage]
        figures = (
            f"{plan.nodes}", f"{choice.job.count}", f"{choice.cost.seconds:.2f}", f"{days(choice, plan):.2f}",
            f"{choice.memory.total / GIB:.1f}", f"{saving_of(choice, plan).best_interval()}",
            f"{paper.training(stage).checkpoint.interval}",
        )  # fmt: skip
        assert told.split() == list(figures), stage
        assert paper.training(stage).train.num_steps == num_steps(choice.job, plan)


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`slurm/` of the dry run."""
    run = tmp_path_factory.mktemp("paper") / "flex_37b"
    words = ["pipeline=flex_37b", "launcher=slurm", "launcher.dry_run=true", *PATHS, f"output_dir={run}"]
    command = [sys.executable, "-m", "flexpert", "pipeline", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return run / "slurm"


def test_a_dry_run_writes_a_script_for_every_node(scripts: Path, paper: Paper) -> None:
    names = {name.replace("/", ".") for name in paper.nodes}
    assert {path.stem for path in scripts.glob("*.sbatch")} == {path.stem for path in scripts.glob("*.yaml")} == names
    assert not list((scripts / "jobs").iterdir())
    for script in scripts.glob("*.sbatch"):
        subprocess.run(["bash", "-n", script], check=True)


@pytest.fixture(scope="module")
def large(paper: Paper) -> Iterator[Cluster]:
    """As many nodes as the largest job takes, each of 64 CPUs and eight pretended GPUs."""
    if reason := missing():
        pytest.skip(reason)
    with running(num_nodes=max(paper.num_nodes(node) for node in paper.nodes), cpus=64, gpus=8) as cluster:
        yield cluster


def test_slurm_would_start_every_script_on_the_nodes_that_it_asks_for(
    large: Cluster, scripts: Path, paper: Paper
) -> None:
    for name in paper.nodes:
        script = scripts / f"{name.replace('/', '.')}.sbatch"
        done = subprocess.run(
            ["sbatch", "--test-only", script], env=large.environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{name}: {done.stderr}"
        found = re.search(r"on nodes? (\S+) in partition main", done.stderr)
        assert found is not None, done.stderr
        nodes = large.run("scontrol", "show", "hostnames", found[1]).split()
        assert len(nodes) == paper.num_nodes(name), name
    assert large.run("squeue", "--noheader") == ""
