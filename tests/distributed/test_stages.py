"""The stages that train, in several processes: what they write is what one process writes."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks
from safetensors.torch import load_file
from toy import SHAPE, train

from flexpert.cli import run_stage
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


MIXTURE_LAYOUTS = JOB_LAYOUTS | {
    "tensor 2, expert 2": (4, ["parallel.tensor=2", "parallel.expert=2"]),
}


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def check_equal(found: Path, wanted: Path, weights: str) -> None:
    """Losses, norms of gradients and the weights that were written agree within 1e-5."""
    for ours, alone in zip(rows(found), rows(wanted), strict=True):
        for key in ("loss", "z_loss", "router_z_loss", "grad_norm", "valid_loss"):
            assert (ours.get(key) is None) == (alone.get(key) is None)
            if alone.get(key) is not None:
                assert ours[key] == pytest.approx(alone[key], rel=1e-5), (ours["step"], key)
    tensors, references = load_file(found / weights), load_file(wanted / weights)
    assert tensors.keys() == references.keys()
    for name, reference in references.items():
        assert (tensors[name] - reference).norm() <= 1e-5 * reference.norm(), name


@pytest.fixture(scope="module")
def assembled(road: Path, expert_overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A public model and three experts, all of which are active."""
    root = tmp_path_factory.mktemp("assembled")
    for seed, name in enumerate(("one", "two", "three")):
        train("expert", *[o for o in expert_overrides if not o.startswith("name=")], f"name={name}", f"seed={seed}",
              "router.init=random", "router.bias=true", f"output_dir={root}/{name}")  # fmt: skip
    contributions = ",".join(f"{root}/{name}/contribution" for name in ("one", "two", "three"))
    run_stage("assemble", [f"base={road}/public/model", f"contributions=[{contributions}]", f"output_dir={root}/model"])
    return root / "model"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pretraining_in_several_processes_equals_pretraining_in_one(road: Path, tmp_path: Path, layout: str) -> None:
    number, keys = LAYOUTS[layout]
    common = [*SHAPE, f"data.dir={road}/data/public", "train.steps=5", "train.evaluation_interval=2"]
    common += ["train.microbatch_sequences=2"]
    train("pretrain", *common, f"output_dir={tmp_path}/alone")
    run_ranks(train, number, "pretrain", *common, *keys, f"output_dir={tmp_path}/together")
    check_equal(tmp_path / "together", tmp_path / "alone", "model/model.safetensors")


@pytest.mark.parametrize("keys", [["train.recompute=selective"], ["train.recompute=full", "train.compile=true"]])
def test_blocks_that_compute_again_or_are_compiled_train_alike_in_several_processes(
    road: Path, assembled: Path, tmp_path: Path, keys: list[str]
) -> None:
    """2 of 4 experts, whose rows take the way to other processes and back."""
    number, layout = MIXTURE_LAYOUTS["tensor 2, expert 2, sequence"]
    common = [
        f"model={assembled}",
        f"data.dir={road}/data/letters",
        "active_experts=2",
        "train.steps=3",
        "train.microbatch_sequences=2",
    ]
    train("tune_router", *common, f"output_dir={tmp_path}/alone")
    run_ranks(train, number, "tune_router", *common, *layout, *keys, f"output_dir={tmp_path}/together")
    check_equal(tmp_path / "together", tmp_path / "alone", "model/router.safetensors")


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


@pytest.mark.parametrize("layout", MIXTURE_LAYOUTS)
def test_tuning_the_router_in_several_processes_equals_tuning_it_in_one(
    road: Path, assembled: Path, tmp_path: Path, layout: str
) -> None:
    number, keys = MIXTURE_LAYOUTS[layout]
    common = [f"model={assembled}", f"data.dir={road}/data/letters", "active_experts=2", "train.microbatch_sequences=2"]
    train("tune_router", *common, f"output_dir={tmp_path}/alone")
    run_ranks(train, number, "tune_router", *common, *keys, f"output_dir={tmp_path}/together")
    check_equal(tmp_path / "together", tmp_path / "alone", "model/router.safetensors")


@pytest.mark.parametrize("layout", MIXTURE_LAYOUTS)
def test_an_evaluation_in_several_processes_equals_one_in_one(
    road: Path, assembled: Path, tmp_path: Path, layout: str
) -> None:
    """Of the mixture with 4, 3 and 2 of its experts, of dense models and of their soup."""
    number, keys = MIXTURE_LAYOUTS[layout]
    common = [
        f"model={assembled}", f"data.dirs.letters={road}/data/letters", f"data.dirs.public={road}/data/public",
        "batch_sequences=3", "leave_one_out=true", "sweep_active_experts=[2]",
        f"baselines.dense.a={road}/public/model", f"baselines.dense.b={road}/public/model",
    ]  # fmt: skip
    run_stage("evaluate", [*common, f"output_dir={tmp_path}/alone"])
    run_ranks(run_stage, number, "evaluate", [*common, *keys, f"output_dir={tmp_path}/together"])
    ours, alone = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("together", "alone"))
    assert alone["methods"]["model"]["domains"]["letters"]["routing"] and "soup" in alone["methods"]
    check_close(ours["methods"], alone["methods"])


def check_close(ours: Any, alone: Any) -> None:
    if isinstance(alone, dict):
        assert ours.keys() == alone.keys()
        for key, value in alone.items():
            check_close(ours[key], value)
    elif isinstance(alone, list):
        for one, other in zip(ours, alone, strict=True):
            check_close(one, other)
    else:
        assert ours == (pytest.approx(alone, rel=1e-5) if isinstance(alone, float) else alone)


def printed(stage: str, overrides: list[str]) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as text:
        run_stage(stage, overrides)
    return text.getvalue()


@pytest.mark.parametrize("layout", MIXTURE_LAYOUTS)
def test_several_processes_generate_what_one_does(assembled: Path, tmp_path: Path, layout: str) -> None:
    number, keys = MIXTURE_LAYOUTS[layout]
    prompts = ["dear sir", "the cat sat on a mat and saw", "regarding nine", "yours"]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    for active in (4, 2):
        common = [f"model={assembled}", f"prompts_file={tmp_path}/prompts.jsonl", "batch_size=3", "max_new_tokens=7",
                  "temperature=0.8", f"active_experts={active}"]  # fmt: skip
        alone = printed("generate", common)
        assert run_ranks(printed, number, "generate", [*common, *keys]) == [alone] * number


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
