"""What a pipeline's run amounts to, in W&B: its table, its routing map, and which model came from which contributions.

As everywhere, no more leaves than is named here: numbers, ids of experts and digests. A model or a contribution is an
artifact that refers to the digest and holds no file.
"""

import io
import os
import re
from dataclasses import dataclass, fields, replace
from typing import Any

from flexpert.config.groups import MonitorConfig
from flexpert.config.options import EXPERT_ID
from flexpert.monitor.findings import PUBLIC, method_rows, removal_deltas, values
from flexpert.monitor.plots import Matrix, matrix_png
from flexpert.monitor.run_directory import RunDirectory
from flexpert.monitor.wandb import run_id, start_run
from flexpert.records import canonical_json, sha256_file, sha256_hex

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
    recorded = (run.pipeline or {}).get("monitor") or {"wandb": "off"}
    config = MonitorConfig(**{f.name: recorded[f.name] for f in fields(MonitorConfig) if f.name in recorded})
    return replace(config, wandb=wandb or config.wandb, group=config.group or run.graph.get("name"))


def references(run: RunDirectory) -> list[Reference]:
    """The public model and the contributions that the assembled model was made from, then the model."""
    if run.assembly is None:
        return []
    base = run.assembly["base_digest"]
    parts = {entry["id"]: entry["contribution"] for entry in run.assembly["experts"] if entry["id"] != PUBLIC}
    digest = f"sha256:{sha256_file(run.path / 'assembled/assembly.json')}"
    made_from = {"base_digest": base, "contributions": parts, "active_experts": run.assembly["active_experts"]}
    found = [Reference("public-model", "model", base, {"digest": base}, True)]
    for name, part in parts.items():
        metadata = {"digest": part, "base_digest": base}
        found.append(Reference(f"contribution-{name}", "contribution", part, metadata, True))
    found.append(Reference("assembled-model", "model", digest, {"digest": digest, **made_from}, False))
    # The records came with the contributions, from others: what is no id and no digest stays here.
    if not all(map(EXPERT_ID.fullmatch, parts)) or not all(map(DIGEST.fullmatch, (base, *parts.values()))):
        return []
    return found


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
    import wandb
    from PIL import Image

    made = references(run)
    results = [*(reference.metadata for reference in made), run.evaluation]
    identity = run_id(run.path, sha256_hex(canonical_json(results)))
    told = f"{'run' if mode == 'online' else 'offline-run'}-*-{identity}"
    if any((run.path / "wandb").glob(told)):
        return
    # W&B keeps a copy of each table, which would otherwise lie in the user's home.
    os.environ.setdefault("WANDB_DATA_DIR", str(run.path.resolve() / "wandb"))
    flat = {"seed": (run.pipeline or {}).get("seed")}
    recorded = start_run(config, mode, "report", run.path, flat, identity)
    for reference in made:
        artifact = wandb.Artifact(reference.name, type=reference.type, metadata=reference.metadata)
        artifact.add_reference(reference.digest, name="digest", checksum=False)
        # Offline, W&B cannot say that a run uses something: the model's metadata says it in any case.
        log = recorded.use_artifact if reference.is_input and mode == "online" else recorded.log_artifact
        log(artifact)
    row: dict[str, Any] = {}
    if run.evaluation is not None:
        columns, rows = bits_table(run.evaluation)
        row["bits_per_byte"] = wandb.Table(columns=columns, data=rows)
    if routing is not None and all(map(EXPERT_ID.fullmatch, [*routing.rows, *routing.columns])):
        row["routing"] = wandb.Image(Image.open(io.BytesIO(matrix_png(routing, (66, 34), 12))))
    recorded.log(row)
    recorded.finish(exit_code=0)
