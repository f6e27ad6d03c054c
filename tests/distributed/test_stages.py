"""The stages that train, in several processes: what they write is what one process writes."""

import contextlib
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks
from safetensors.torch import load_file
from toy import SHAPE, train

from flexpert.cli import PARALLEL, run_stage
from flexpert.config.compose import compose
from flexpert.launch.graph import Node, build_graph
from flexpert.train.loop import Trainer

#: A name, how many processes, and the keys. `test_layouts` has every layout; here each stage is tried in a few.
Case = tuple[str, int, list[str]]
DATA: Case = ("data 2", 2, [])
TENSOR: Case = ("tensor 2", 2, ["parallel.tensor=2"])
EXPERT: Case = ("expert 2", 2, ["parallel.expert=2"])
SEQUENCE: Case = ("tensor 2, sequence, data 2", 4, ["parallel.tensor=2", "parallel.sequence=true"])
BOTH: Case = ("tensor 2, expert 2", 4, ["parallel.tensor=2", "parallel.expert=2"])
WHOLE_EXPERTS = ["parallel.tensor=2", "parallel.expert=2", "parallel.expert_tensor=1", "parallel.sequence=true"]
REPLICAS: Case = ("data 4, 2 replicas", 4, ["parallel.replicas=2"])
ALL: Case = ("tensor 2, expert 2, sequence", 4, WHOLE_EXPERTS)


def cases(*layouts: Case) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("layout", layouts, ids=[name for name, _, _ in layouts])


pytestmark = pytest.mark.slow


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


@cases(TENSOR, SEQUENCE)
def test_pretraining_in_several_processes_equals_pretraining_in_one(road: Path, tmp_path: Path, layout: Case) -> None:
    _, number, keys = layout
    common = [*SHAPE, f"data.dir={road}/data/public", "train.steps=5", "train.evaluation_interval=2"]
    common += ["train.microbatch_sequences=2"]
    train("pretrain", *common, f"output_dir={tmp_path}/alone")
    profiled = ["monitor.profile_steps=[2,3]"]
    run_ranks(train, number, "pretrain", *common, *keys, *profiled, f"output_dir={tmp_path}/together")
    check_equal(tmp_path / "together", tmp_path / "alone", "model/model.safetensors")
    assert ["communication_seconds" in row for row in rows(tmp_path / "together")] == [False, False, True, False, False]
    assert rows(tmp_path / "together")[2]["communication_seconds"] > 0


@pytest.mark.parametrize(
    ("active", "keys"),
    [
        (2, ["train.recompute=full"]),
        (2, ["train.recompute=selective", "train.compile=true"]),
        (4, ["train.recompute=selective"]),
    ],
)
def test_blocks_that_compute_again_or_are_compiled_train_alike_in_several_processes(
    road: Path, assembled: Path, tmp_path: Path, active: int, keys: list[str]
) -> None:
    """Also 2 of 4 experts, whose rows take the way to other processes and back."""
    _, number, layout = ALL
    common = [
        f"model={assembled}",
        f"data.dir={road}/data/letters",
        f"active_experts={active}",
        "train.steps=3",
        "train.microbatch_sequences=2",
    ]
    train("tune_router", *common, f"output_dir={tmp_path}/alone")
    run_ranks(train, number, "tune_router", *common, *layout, *keys, f"output_dir={tmp_path}/together")
    check_equal(tmp_path / "together", tmp_path / "alone", "model/router.safetensors")


@cases(DATA, EXPERT, ALL)
def test_an_expert_trained_in_several_processes_equals_one_trained_in_one(
    road: Path, expert_overrides: list[str], tmp_path: Path, layout: Case
) -> None:
    _, number, keys = layout
    common = [override for override in expert_overrides if not override.startswith("router.init=")] + [
        "router.init=discriminant", "router.bias=true", "public_share=0.25", "router.calibration_steps=2",
        "train.steps=5", "train.microbatch_sequences=2", "train.evaluation_interval=4",
        "train.evaluation_sequences=11",  # which neither microbatches nor processes divide
    ]  # fmt: skip
    train("expert", *common, f"output_dir={tmp_path}/alone")
    run_ranks(train, number, "expert", *common, *keys, f"output_dir={tmp_path}/together")
    check_equal(tmp_path / "together", tmp_path / "alone", "contribution/expert.safetensors")


@cases(EXPERT, BOTH)
def test_tuning_the_router_in_several_processes_equals_tuning_it_in_one(
    road: Path, assembled: Path, tmp_path: Path, layout: Case
) -> None:
    _, number, keys = layout
    common = [f"model={assembled}", f"data.dir={road}/data/letters", "active_experts=2", "train.microbatch_sequences=2"]
    train("tune_router", *common, f"output_dir={tmp_path}/alone")
    run_ranks(train, number, "tune_router", *common, *keys, f"output_dir={tmp_path}/together")
    check_equal(tmp_path / "together", tmp_path / "alone", "model/router.safetensors")


@cases(DATA, EXPERT, ALL)
def test_an_evaluation_in_several_processes_equals_one_in_one(
    road: Path, assembled: Path, tmp_path: Path, layout: Case
) -> None:
    """Of the mixture with 4, 3 and 2 of its experts, of dense models and of their soup."""
    _, number, keys = layout
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


def check_close(ours: Any, alone: Any, where: str = "") -> None:
    """Numbers within 1e-5, everything else equal."""
    if isinstance(alone, dict):
        assert ours.keys() == alone.keys()
        for key, value in alone.items():
            check_close(ours[key], value, f"{where}/{key}")
    elif isinstance(alone, list):
        for one, other in zip(ours, alone, strict=True):
            check_close(one, other, where)
    else:
        assert ours == (pytest.approx(alone, rel=1e-5) if isinstance(alone, float) else alone), where


def printed(stage: str, overrides: list[str]) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as text:
        run_stage(stage, overrides)
    return text.getvalue()


@cases(DATA, TENSOR, ALL)
def test_several_processes_generate_what_one_does(assembled: Path, tmp_path: Path, layout: Case) -> None:
    _, number, keys = layout
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
    for steps, (_, number, keys) in ((2, SEQUENCE), (4, REPLICAS)):
        run_ranks(stopped, number, steps, "pretrain", *common, *keys, output)
    train("pretrain", *common, output)
    check_equal(tmp_path / "moved", tmp_path / "alone", "model/model.safetensors")


def test_an_expert_goes_on_in_another_layout(expert_overrides: list[str], tmp_path: Path) -> None:
    """The owner's FFN over two processes, over four with positions shared, and whole again."""
    common = [*expert_overrides, "router.bias=true", "train.steps=5", "checkpoint.interval=1"]
    common += ["train.microbatch_sequences=2"]
    train("expert", *common, f"output_dir={tmp_path}/alone")
    output = f"output_dir={tmp_path}/moved"
    for steps, (_, number, keys) in ((2, EXPERT), (4, ALL)):
        run_ranks(stopped, number, steps, "expert", *common, *keys, output)
    train("expert", *common, output)
    check_equal(tmp_path / "moved", tmp_path / "alone", "contribution/expert.safetensors")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smoke pipeline's stages up to its evaluation, in one process."""
    output = tmp_path_factory.mktemp("smoke") / "alone"
    for node in smoke_nodes(output):
        run_stage(node.stage, list(node.overrides))
    return output


def smoke_nodes(output: Path) -> list[Node]:
    """AdamW divides a gradient by its own size: in thirty steps, what rounding does to a small one, as router rows have
    them, comes to 1e-4 of their shares. With an epsilon above that, these hold to 1e-5 like everything else.
    """
    training = ["monitor.wandb=off", "optim.eps=1e-4"]
    config, _ = compose("pipeline", ["pipeline=smoke", f"output_dir={output}"])
    nodes = []
    for node in build_graph(config):
        more = training if node.stage in ("pretrain", "expert") else []
        nodes.append(replace(node, overrides=(*node.overrides, *more)))
    return [node for node in nodes if node.stage != "report"]


@cases(DATA, TENSOR, EXPERT)
def test_the_smoke_pipeline_gives_the_same_evaluation(smoke: Path, tmp_path: Path, layout: Case) -> None:
    name, number, keys = layout
    output = tmp_path / "together"
    shutil.copytree(smoke / "data", output / "data")
    for node in smoke_nodes(output):
        if node.stage in PARALLEL:
            shared = [] if name == "expert 2" and node.stage == "pretrain" else keys  # it has no experts to share
            run_ranks(run_stage, number, node.stage, [*node.overrides, *shared])
        elif node.stage != "prepare":
            run_stage(node.stage, list(node.overrides))
    ours, alone = (json.loads((path / "evaluation/evaluation.json").read_text()) for path in (output, smoke))
    assert {"model", "without math", "soup", "btm", "public"} <= alone["methods"].keys()
    check_close(ours["methods"], alone["methods"])
