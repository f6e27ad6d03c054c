"""The stages that train, in several processes: what they write is what one process writes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from toy import SHAPE, train

from flexpert.train.loop import Trainer

LAYOUTS = {
    "data 2": (2, []),
    "tensor 2": (2, ["parallel.tensor=2"]),
    "tensor 2, sequence, data 2": (4, ["parallel.tensor=2", "parallel.sequence=true"]),
}
JOB_LAYOUTS = LAYOUTS | {
    "expert 2": (2, ["parallel.expert=2"]),
    "tensor 2, expert 2, sequence": (
        4, ["parallel.tensor=2", "parallel.expert=2", "parallel.expert_tensor=1", "parallel.sequence=true"],
    ),
}  # fmt: skip


class Stopped(BaseException):
    """In place of a signal that reaches every rank at once."""


def stopped(step: int, stage: str, *overrides: str) -> None:
    """A stage that ends when it has done `step` steps."""

    def stop(trainer: Trainer) -> dict[str, Any]:
        if trainer.step == step:
            raise Stopped
        return optimizer_step(trainer)

    optimizer_step, Trainer.optimizer_step = Trainer.optimizer_step, stop  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        train(stage, *overrides)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def check_equal(found: Path, wanted: Path, weights: str) -> None:
    """Losses, norms of gradients and the weights that were written agree within 1e-5."""
    for ours, alone in zip(rows(found), rows(wanted), strict=True):
        for key in ("loss", "z_loss", "router_z_loss", "grad_norm", "valid_loss"):
            assert ours.get(key) == pytest.approx(alone.get(key), rel=1e-5), (ours["step"], key)
    tensors, references = load_file(found / weights), load_file(wanted / weights)
    assert tensors.keys() == references.keys()
    for name, reference in references.items():
        assert (tensors[name] - reference).norm() <= 1e-5 * reference.norm(), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pretraining_in_several_processes_equals_pretraining_in_one(road: Path, tmp_path: Path, layout: str) -> None:
    number, keys = LAYOUTS[layout]
    common = [*SHAPE, f"data.dir={road}/data/public", "train.steps=5", "train.evaluation_interval=2"]
    common += ["train.microbatch_sequences=2"]
    train("pretrain", *common, f"output_dir={tmp_path}/alone")
    run_ranks(train, number, "pretrain", *common, *keys, f"output_dir={tmp_path}/together")
    check_equal(tmp_path / "together", tmp_path / "alone", "model/model.safetensors")


@pytest.mark.parametrize("layout", JOB_LAYOUTS)
def test_an_expert_trained_in_several_processes_equals_one_trained_in_one(
    road: Path, expert_overrides: list[str], tmp_path: Path, layout: str
) -> None:
    number, keys = JOB_LAYOUTS[layout]
    common = [override for override in expert_overrides if not override.startswith("router.init=")] + [
        "router.init=discriminant", "router.bias=true", "public_share=0.25", "router.calibration_steps=2",
        "train.steps=5", "train.microbatch_sequences=2",
    ]  # fmt: skip
    train("expert", *common, f"output_dir={tmp_path}/alone")
    run_ranks(train, number, "expert", *common, *keys, f"output_dir={tmp_path}/together")
    check_equal(tmp_path / "together", tmp_path / "alone", "contribution/expert.safetensors")


def test_a_run_goes_on_in_another_layout(road: Path, tmp_path: Path) -> None:
    """Two steps in one layout, two in another, the last alone."""
    common = [*SHAPE, f"data.dir={road}/data/public", "train.steps=5", "checkpoint.interval=1"]
    common += ["train.microbatch_sequences=2"]
    train("pretrain", *common, f"output_dir={tmp_path}/alone")
    output = f"output_dir={tmp_path}/moved"
    for steps, number, keys in ((2, *LAYOUTS["tensor 2"]), (4, *LAYOUTS["data 2"])):
        run_ranks(stopped, number, steps, "pretrain", *common, *keys, output)
    train("pretrain", *common, output)
    check_equal(tmp_path / "moved", tmp_path / "alone", "model/model.safetensors")
