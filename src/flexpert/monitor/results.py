"""What stages make and a pipeline's run amounts to, in W&B: table, routing map, and which model was made from what.

As everywhere, no more leaves than is named here: numbers, ids of experts and digests. A model or a contribution is an
artifact that refers to the digest and holds no file.
"""

import io
import os
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from flexpert.config.groups import MonitorConfig
from flexpert.config.options import EXPERT_ID
from flexpert.monitor.findings import PUBLIC, method_rows, removal_deltas, values
from flexpert.monitor.plots import Matrix, matrix_png
from flexpert.monitor.run_directory import RunDirectory
from flexpert.monitor.wandb import run_id, start_reachable, start_run
from flexpert.records import canonical_json, read_record, sha256_file, sha256_hex

DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True)
class Reference:
    """An artifact without files.

    Attributes:
        name, type: W&B's.
        digest: what tells one version from another.
        metadata: numbers and digests.
        is_input: the model was made from it.
    """

    name: str
    type: str
    digest: str
    metadata: dict[str, Any]
    is_input: bool


def monitor_config(run: RunDirectory, wandb: str | None) -> MonitorConfig:
    """The pipeline's group `monitor`, with the given `wandb` in place of its own; off where it has no such group."""
    config = monitor_group((run.pipeline or {}).get("monitor") or {"wandb": "off"})
    return replace(config, wandb=wandb or config.wandb, group=config.group or run.graph.get("name"))


def monitor_group(recorded: dict[str, Any]) -> MonitorConfig:
    """Of a recorded config; another version's may have other keys."""
    return MonitorConfig(**{f.name: recorded[f.name] for f in fields(MonitorConfig) if f.name in recorded})


def references(run: RunDirectory) -> list[Reference]:
    """The public model and the contributions that the assembled model was made from, then the model."""
    if run.assembly is None:
        return []
    base = run.assembly["base_digest"]
    parts = {entry["id"]: entry["contribution"] for entry in run.assembly["experts"] if entry["id"] != PUBLIC}
    # The records came with the contributions, from others: what is no id and no digest stays here.
    if not all(map(EXPERT_ID.fullmatch, parts)) or not all(map(DIGEST.fullmatch, (base, *parts.values()))):
        return []
    digest = f"sha256:{sha256_file(run.path / 'assembled/assembly.json')}"
    made_from = {"base_digest": base, "contributions": parts, "active_experts": run.assembly["active_experts"]}
    made = Reference("assembled-model", "model", digest, {"digest": digest, **made_from}, False)
    return [public_model(base), *(contribution(name, part, base) for name, part in parts.items()), made]


def public_model(digest: str) -> Reference:
    return Reference("public-model", "model", digest, {"digest": digest}, True)


def contribution(name: str, digest: str, base: str) -> Reference:
    metadata = {"digest": digest, "base_digest": base}
    return Reference(f"contribution-{name}", "contribution", digest, metadata, True)


def expert_references(output: Path) -> list[Reference]:
    """The public model that an expert was trained against, then its contribution; none where there is none yet."""
    path = output / "contribution/contribution.json"
    if not path.is_file():
        return []
    record = read_record(path, "flexpert.contribution")
    name, digest, base = record["id"], record["digest"], record["base_digest"]
    if not EXPERT_ID.fullmatch(name) or not all(map(DIGEST.fullmatch, (digest, base))):
        return []
    return [public_model(base), replace(contribution(name, digest, base), is_input=False)]


def base_references(run: RunDirectory) -> list[Reference]:
    """The public model that a pipeline has trained; none where nothing that was made from it says its digest yet."""
    records = [*([run.assembly] if run.assembly is not None else []), *run.contributions.values()]
    digests = [record["base_digest"] for record in records if DIGEST.fullmatch(record["base_digest"])]
    return [replace(public_model(digest), is_input=False) for digest in digests[:1]]


def tell_references(recorded: Any, made: list[Reference], online: bool) -> None:
    """Make artifacts of W&B's, inputs or outputs of its run `recorded`."""
    import wandb

    for reference in made:
        artifact = wandb.Artifact(reference.name, type=reference.type, metadata=reference.metadata)
        artifact.add_reference(reference.digest, name="digest", checksum=False)
        # Offline, W&B cannot say that a run uses something: the model's metadata says it in any case.
        log = recorded.use_artifact if reference.is_input and online else recorded.log_artifact
        log(artifact)


def bits_table(content: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows: bits per byte by method and domain."""
    domains = [name for name in content["domains"] if EXPERT_ID.fullmatch(name)]
    bits = {row.label: row.bits for row in method_rows(content)}
    for name in filter(EXPERT_ID.fullmatch, removal_deltas(content)):
        bits[f"Flexpert without {name}"] = values(content, f"without {name}", "bits_per_byte")
    return ["method", *domains], [[label, *(cells.get(name) for name in domains)] for label, cells in bits.items()]


def publish(run: RunDirectory, config: MonitorConfig, mode: str, routing: Matrix | None) -> None:
    """Write the W&B run of a pipeline's results, unless these results have been told from here before.

    Args:
        config: of `monitor_config`.
        mode: offline or online.
        routing: the report's routing map, where there is one.
    """
    told = f"{'run' if mode == 'online' else 'offline-run'}-*-{results_id(run)}"
    if any((run.path / "wandb").glob(told)):
        return
    recorded, mode = start_reachable(lambda mode: start_results(run, config, mode), mode, run.path)
    tell_results(recorded, run, routing, mode == "online")
    recorded.finish(exit_code=0)


def results_id(run: RunDirectory) -> str:
    """Other results of a pipeline are another run of W&B's."""
    results = [*(reference.metadata for reference in references(run)), run.evaluation]
    return run_id(run.path, sha256_hex(canonical_json(results)))


def start_results(run: RunDirectory, config: MonitorConfig, mode: str) -> Any:
    # W&B keeps a copy of each table, which would otherwise lie in the user's home.
    os.environ.setdefault("WANDB_DATA_DIR", str(run.path.resolve() / "wandb"))
    flat = {"seed": (run.pipeline or {}).get("seed")}
    return start_run(config, mode, "report", run.path, flat, results_id(run))


def tell_results(recorded: Any, run: RunDirectory, routing: Matrix | None, online: bool) -> None:
    """Artifacts, and one row with the table and the map."""
    import wandb
    from PIL import Image

    tell_references(recorded, references(run), online)
    row: dict[str, Any] = {}
    if run.evaluation is not None:
        columns, rows = bits_table(run.evaluation)
        row["bits_per_byte"] = wandb.Table(columns=columns, data=rows)
    if routing is not None and all(map(EXPERT_ID.fullmatch, [*routing.rows, *routing.columns])):
        row["routing"] = wandb.Image(Image.open(io.BytesIO(matrix_png(routing, (66, 34), 12))))
    recorded.log(row)
