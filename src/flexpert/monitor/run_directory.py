"""What a pipeline's run directory holds, read so that any part of it may be missing: a run may have been interrupted.

Its layout:

    RUN/pipeline.yaml                                  the resolved config of the pipeline
    RUN/data/NAME/manifest.json                        one data set each, but for those of pipeline.prepared
    RUN/public, experts/NAME, dense/NAME, tuned        one training each: metrics.jsonl, resolved.yaml
    RUN/experts/NAME/contribution/contribution.json    those of pipeline.contributions lie elsewhere
    RUN/verified/{base,NAME}.json                      what others have made, and was verified
    RUN/assembled/{config,assembly}.json
    RUN/evaluation/evaluation.json
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from flexpert.checkpoint.layout import model_config
from flexpert.config.groups import ModelConfig
from flexpert.errors import UserError
from flexpert.monitor.jsonl import read_metrics
from flexpert.records import read_json, read_record

PUBLIC = "public"
#: The kinds of training stages, for people.
TRAINING_KINDS = {"public": "public model", "expert": "expert", "dense": "dense fine-tune", "tuned": "router tuning"}


@dataclass(frozen=True)
class Training:
    """One stage that trained.

    Attributes:
        kind: a key of TRAINING_KINDS.
        domain: whose data; None for router tuning, which uses several.
        rows: its metrics, one a step.
        planned_steps: where it was to stop; None where its config is missing.
    """

    kind: str
    domain: str | None
    rows: list[dict[str, Any]]
    planned_steps: int | None

    @property
    def place(self) -> str:
        """The stage's directory below the run directory."""
        return {"expert": f"experts/{self.domain}", "dense": f"dense/{self.domain}"}.get(self.kind, self.kind)

    @property
    def steps(self) -> int:
        return int(self.rows[-1]["step"])

    @property
    def seconds(self) -> float:
        return float(sum(row["step_seconds"] for row in self.rows))

    def last(self, key: str) -> float | None:
        """The last value of a metric that not every row has."""
        values = [row[key] for row in self.rows if row.get(key) is not None]
        return values[-1] if values else None


@dataclass(frozen=True)
class RunDirectory:
    """The readable parts of a run; an absent part is None or not in its dictionary, and named in `missing`.

    Attributes:
        path: the directory.
        pipeline: pipeline.yaml.
        owners: names of the experts, in the pipeline's order; those that others have sent come last.
        data: data set → content of its manifest.
        trainings: public, experts, dense fine-tunes, router tuning, in that order.
        contributions: expert → content of its contribution.json, made here or sent.
        model: shape of the assembled model.
        assembly: content of assembly.json.
        evaluation: content of evaluation.json.
    """

    path: Path
    pipeline: dict[str, Any] | None
    owners: list[str]
    data: dict[str, dict[str, Any]]
    trainings: list[Training]
    contributions: dict[str, dict[str, Any]]
    model: ModelConfig | None
    assembly: dict[str, Any] | None
    evaluation: dict[str, Any] | None

    @property
    def graph(self) -> dict[str, Any]:
        """The group `pipeline` of pipeline.yaml."""
        return self.pipeline["pipeline"] if self.pipeline is not None else {}

    @property
    def name(self) -> str:
        return str(self.graph.get("name") or self.path.resolve().name)

    @property
    def sent(self) -> dict[str, str]:
        """Expert → the contribution that its owner has sent."""
        return self.graph.get("contributions") or {}

    def training(self, kind: str, domain: str | None) -> Training | None:
        return next((part for part in self.trainings if (part.kind, part.domain) == (kind, domain)), None)

    @cached_property
    def missing(self) -> list[str]:
        """What a complete run of this pipeline would also hold, one phrase each."""
        has_public_stage = self.graph.get("base") is None
        has_dense = self.graph.get("dense") is not None or any(part.kind == "dense" for part in self.trainings)
        own = [name for name in self.owners if name not in self.sent]
        prepared = self.graph.get("prepared") or {}
        sets = [PUBLIC, *own] if has_public_stage or self.graph.get("public_data") else own
        manifests = {**{name: f"data/{name}" for name in sets}, **prepared}
        absent = ["pipeline.yaml"] if self.pipeline is None else []
        absent += [f"{place}/manifest.json" for name, place in manifests.items() if name not in self.data]
        absent += [f"{place}/contribution.json" for name, place in self.sent.items() if name not in self.contributions]
        verified = [*(["base"] if "base" in (self.graph.get("digests") or {}) else []), *self.sent]
        records = [f"verified/{name}.json" for name in verified]
        absent += [place for place in records if not (self.path / place).is_file()]
        stages: list[tuple[str, str | None, str]] = [("public", PUBLIC, "public")] if has_public_stage else []
        stages += [("expert", name, f"experts/{name}") for name in own]
        stages += [("dense", name, f"dense/{name}") for name in own] if has_dense else []
        stages += [("tuned", None, "tuned")] if self.graph.get("tune_router") is not None else []
        for kind, domain, place in stages:
            part = self.training(kind, domain)
            if part is None:
                absent.append(f"{place}/metrics.jsonl")
            elif part.planned_steps is not None and part.steps < part.planned_steps:
                absent.append(f"the rest of {place}: it stands at step {part.steps:,} of {part.planned_steps:,}")
            if kind == "expert" and domain not in self.contributions:
                absent.append(f"{place}/contribution/contribution.json")
        parts = {"assembled/config.json": self.model, "assembled/assembly.json": self.assembly}
        parts["evaluation/evaluation.json"] = self.evaluation
        return absent + [name for name, part in parts.items() if part is None]


def read_run(path: Path) -> RunDirectory:
    """Read what is there.

    Raises:
        UserError: the directory does not exist or holds no part of a run, or a file in it cannot be read.
    """
    if not path.is_dir():
        raise UserError(f"{path} is not a directory: give the run directory of a `flexpert pipeline`")
    pipeline = read_yaml(path / "pipeline.yaml")
    graph = pipeline["pipeline"] if pipeline is not None else {}
    sent, prepared = graph.get("contributions") or {}, graph.get("prepared") or {}
    planned = [*(graph.get("experts") or {}), *sent]
    found = {name for folder in ("experts", "dense") for name in subdirectories(path / folder)}
    owners = planned + sorted(found - set(planned))
    sets = {name: path / "data" / name for name in subdirectories(path / "data")}
    sets |= {name: Path(place) for name, place in prepared.items()}
    manifests = {name: sets[name] / "manifest.json" for name in in_order([*sets], [PUBLIC, *owners])}
    stages: list[tuple[str, str | None, Path]] = [("public", PUBLIC, path / "public")]
    stages += [("expert", name, path / "experts" / name) for name in owners]
    stages += [("dense", name, path / "dense" / name) for name in owners]
    trainings = [read_training(*stage) for stage in [*stages, ("tuned", None, path / "tuned")]]
    own = {name: path / "experts" / name / "contribution" for name in owners}
    records = {name: Path(sent.get(name, place)) / "contribution.json" for name, place in own.items()}
    model_file, assembly, evaluation = (
        path / "assembled/config.json",
        path / "assembled/assembly.json",
        path / "evaluation/evaluation.json",
    )
    run = RunDirectory(
        path=path,
        pipeline=pipeline,
        owners=owners,
        data={name: read_record(p, "flexpert.data") for name, p in manifests.items() if p.is_file()},
        trainings=[part for part in trainings if part is not None],
        contributions={n: read_record(p, "flexpert.contribution") for n, p in records.items() if p.is_file()},
        model=read_shape(model_file) if model_file.is_file() else None,
        assembly=read_record(assembly, "flexpert.assembly") if assembly.is_file() else None,
        evaluation=read_record(evaluation, "flexpert.evaluation") if evaluation.is_file() else None,
    )
    parts = (run.pipeline, run.data, run.trainings, run.contributions, run.model, run.assembly, run.evaluation)
    if not any(parts):
        raise UserError(f"{path} holds no part of a run: give the run directory of a `flexpert pipeline`")
    return run


def subdirectories(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir() if entry.is_dir()) if path.is_dir() else []


def in_order(names: list[str], order: list[str]) -> list[str]:
    """`names`, those in `order` first and as there."""
    return [name for name in order if name in names] + [name for name in names if name not in order]


def read_yaml(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    content = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def read_training(kind: str, domain: str | None, path: Path) -> Training | None:
    """None where no step was recorded."""
    rows = read_metrics(path / "metrics.jsonl")
    if not rows:
        return None
    config = read_yaml(path / "resolved.yaml")
    steps = None
    if config is not None:
        train = config["train"]
        steps = train["steps"] if train["steps"] is not None else -(-train["tokens"] // train["batch_tokens"])
    return Training(kind, domain, rows, steps)


def read_shape(path: Path) -> ModelConfig:
    return model_config(read_json(path), path)
