"""The schema of pipelines: what one is made of, how its stages are started, and what a user says to its run."""

from dataclasses import dataclass

from omegaconf import MISSING

from flexpert.config.options import Lockable, check_choice, check_positive, opt, require


@dataclass
class LauncherConfig(Lockable):
    """Group `launcher`: how a pipeline starts its stages. A site's own choice is a file of its own, found by
    `--config-dir=DIR` as DIR/launcher/NAME.yaml.
    """

    kind: str = opt("local", "local: processes on this machine; slurm: one job of Slurm's for each stage")
    max_jobs: int | None = opt(None, "stages that run side by side; null: as many as there are")
    threads_per_job: int | None = opt(
        None, "local: CPU threads of a stage; null: cores / max_jobs, all for a stage that is alone"
    )
    account: str | None = opt(None, "slurm: account that is charged; null: Slurm's default")
    partition: str | None = opt(None, "slurm: partition; null: Slurm's default")
    options: list[str] = opt([], "slurm: sbatch options of every job: [--qos=normal,--time=4:00:00]")
    jobs: dict[str, list[str]] = opt(
        {}, "slurm: sbatch options of a stage or a node of the graph: {expert:[--nodes=2],experts/math:[--account=b]}"
    )
    setup: list[str] = opt([], "slurm: shell lines that every job runs first: [module load cuda,. /path/bin/activate]")
    run: str | None = opt(None, "slurm: what commands are started by: apptainer exec --nv /path/flexpert.sif")
    array: bool = opt(False, "slurm: jobs of one stage that differ in their data alone are one array")
    check_nodes: bool = opt(
        False, "slurm: look at memory, disk, GPUs and links before a stage; leave a bad node out and start again"
    )
    dry_run: bool = opt(False, "slurm: write all that would be submitted to output_dir/slurm, and submit nothing")

    def check(self) -> None:
        check_choice("launcher.kind", self.kind, ("local", "slurm"))
        check_positive("launcher", self, "max_jobs", "threads_per_job")
        for key, options in [("options", self.options), *((f"jobs.{name}", own) for name, own in self.jobs.items())]:
            check_sbatch_options(f"launcher.{key}", options)
        if self.kind == "local":
            require(not self.dry_run, "launcher.dry_run=true is Slurm's: choose launcher=slurm")


def check_sbatch_options(key: str, options: list[str]) -> None:
    """Raises `UserError` for what is no `--name` or `--name=value`, or is Flexpert's to say."""
    ours = ["dependency", "array", "output", "error", "job-name", "parsable", "wrap", "test-only", "wait"]
    ours += ["requeue", "no-requeue"]
    for option in options:
        name = option.removeprefix("--").partition("=")[0]
        require(
            option.startswith("--") and name.replace("-", "").isalnum() and option.isprintable(),
            f"{key}: '{option}' is not an option of sbatch in its long form: --name or --name=value",
        )
        require(name not in ours, f"{key}: --{name} is said by the pipeline itself; leave it out")
        require(
            name not in ("clusters", "cluster"),
            f"{key}: --{name}: jobs of one pipeline wait for each other, which they do within one cluster only; give "
            "each cluster its own (docs/federation.md)",
        )


@dataclass
class PipelineGraphConfig(Lockable):
    """Group `pipeline`: the stages of a run as lists of overrides, written just as on the command line."""

    name: str = opt(MISSING, "name of the run")
    base: str | None = opt(None, "an existing public model; null: pretrain one", path="model")
    public_data: list[str] = opt([], "overrides of `prepare` for the public text; none, with base: no public text")
    public: list[str] = opt([], "overrides of `pretrain` for the public model")
    experts: dict[str, list[str]] = opt({}, "expert id: overrides of `prepare` for its owner's text")
    prepare: list[str] = opt([], "overrides of `prepare` shared by all experts")
    prepare_shards: dict[str, int] = opt(
        {}, "data set: parts in which it is prepared side by side; {math:16}, or public, which then needs base"
    )
    prepared: dict[str, str] = opt(
        {}, "data sets that `prepare` has made already, to evaluate on; public: the public text", path="data"
    )
    expert: list[str] = opt([], "overrides of `expert` shared by all experts")
    owners: dict[str, list[str]] = opt({}, "expert id: overrides of `expert` for this owner alone")
    contributions: dict[str, str] = opt(
        {}, "expert id: a contribution that its owner has sent; needs base", path="contribution"
    )
    digests: dict[str, str] = opt(
        {}, "base or expert id: the digest that its maker has told of it, compared before it is used"
    )
    required: list[str] | None = opt(
        None, "experts without which nothing is assembled; others are left out where they fail; null: all"
    )
    dense: list[str] | None = opt(None, "overrides of `pretrain` for dense fine-tunes (baselines); null: none")
    dense_public_share: float = opt(0.0, "share of public sequences in these, as an expert's public_share")
    assemble: list[str] = opt([], "overrides of `assemble`")
    tune_router: list[str] | None = opt(None, "overrides of `tune_router`; null: the router stays as assembled")
    evaluate: list[str] = opt([], "overrides of `evaluate`")
    processes: dict[str, int] = opt(
        {}, "processes of a stage or a node of the graph: {expert:2,experts/math:4}; where none is named 1, or on "
        "Slurm one a GPU"
    )  # fmt: skip
    resources: dict[str, list[str]] = opt(
        {}, "sbatch options of a stage or a node: {expert:[--nodes=8,--gpus-per-node=8]}; they win over launcher.jobs"
    )
    gates: dict[str, float] = opt(
        {}, "thresholds that the evaluation must meet, by name; see flexpert.evaluation.gates"
    )

    def check(self) -> None:
        share = self.dense_public_share
        require(0 <= share < 1, f"pipeline.dense_public_share={share} must be in [0, 1)")
        for key in ("processes", "prepare_shards"):
            for name, number in getattr(self, key).items():
                require(number > 0, f"pipeline.{key}.{name}={number} must be positive")
        for name, options in self.resources.items():
            check_sbatch_options(f"pipeline.resources.{name}", options)
        require(not self.contributions or self.base is not None, "pipeline.contributions needs pipeline.base=DIR")


@dataclass
class StatusConfig(Lockable):
    """`flexpert status`: where every stage of a pipeline stands, in one table."""

    run: str = opt(MISSING, "run directory of a pipeline", path="run")


@dataclass
class CancelConfig(Lockable):
    """`flexpert cancel`: end the jobs of a pipeline on Slurm; started again, it goes on where they were."""

    run: str = opt(MISSING, "run directory of a pipeline", path="run")
    stages: list[str] = opt([], "nodes of the graph, as in status: [experts/math]; none: all")


@dataclass
class LogsConfig(Lockable):
    """`flexpert logs`: what a pipeline's stage has printed."""

    run: str = opt(MISSING, "run directory of a pipeline", path="run")
    stage: str | None = opt(None, "node of the graph, as in status: experts/math; null: where the logs are")
    lines: int = opt(40, "lines from the end")
    follow: bool = opt(False, "go on with what is added, until the stage has ended")

    def check(self) -> None:
        check_positive("", self, "lines")


@dataclass
class SyncConfig(Lockable):
    """`flexpert sync`: tell W&B's server what a run's metrics.jsonl have and it does not, one run a stage."""

    run: str = opt(MISSING, "run directory of a pipeline, or output_dir of one stage", path="file")
    project: str | None = opt(None, "W&B's project; null: as the stage's monitor.project")
    entity: str | None = opt(None, "W&B's entity; null: as the stage's monitor.entity")
