"""The schema of the groups that say what a pipeline is made of, and how its stages are started."""

from dataclasses import dataclass

from omegaconf import MISSING

from flexpert.config.options import Lockable, check_choice, check_positive, opt, require


@dataclass
class LauncherConfig(Lockable):
    """Group `launcher`: how a pipeline starts its stages."""

    kind: str = opt("local", "local: processes on this machine")
    max_jobs: int = opt(2, "stages that run side by side")
    threads_per_job: int | None = opt(
        None, "CPU threads of a stage; null: cores / max_jobs, all for a stage that is alone"
    )

    def check(self) -> None:
        check_choice("launcher.kind", self.kind, ("local",))
        check_positive("launcher", self, "max_jobs", "threads_per_job")


@dataclass
class PipelineGraphConfig(Lockable):
    """Group `pipeline`: the stages of a run as lists of overrides, written just as on the command line."""

    name: str = opt(MISSING, "name of the run")
    base: str | None = opt(None, "an existing public model; null: pretrain one", path="model")
    public_data: list[str] = opt([], "overrides of `prepare` for the public text")
    public: list[str] = opt([], "overrides of `pretrain` for the public model")
    experts: dict[str, list[str]] = opt({}, "expert id: overrides of `prepare` for its owner's text")
    prepare: list[str] = opt([], "overrides of `prepare` shared by all experts")
    expert: list[str] = opt([], "overrides of `expert` shared by all experts")
    owners: dict[str, list[str]] = opt({}, "expert id: overrides of `expert` for this owner alone")
    dense: list[str] | None = opt(None, "overrides of `pretrain` for dense fine-tunes (baselines); null: none")
    dense_public_share: float = opt(0.0, "share of public sequences in these, as an expert's public_share")
    assemble: list[str] = opt([], "overrides of `assemble`")
    tune_router: list[str] | None = opt(None, "overrides of `tune_router`; null: the router stays as assembled")
    evaluate: list[str] = opt([], "overrides of `evaluate`")
    gates: dict[str, float] = opt(
        {}, "thresholds that the evaluation must meet, by name; see flexpert.evaluation.gates"
    )

    def check(self) -> None:
        share = self.dense_public_share
        require(0 <= share < 1, f"pipeline.dense_public_share={share} must be in [0, 1)")
