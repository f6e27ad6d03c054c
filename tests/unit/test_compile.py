"""`train.compile`: compiled and eager training agree, it is on where it pays, and off where there is no compiler."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy import SHAPE, train

from flexpert.config.compose import compose
from flexpert.config.groups import ModelConfig
from flexpert.model.loss import router_z_sum
from flexpert.model.transformer import Transformer, initialise
from flexpert.train.compilation import compile_blocks, compiles

pytestmark = pytest.mark.slow

Refused = Callable[..., AbstractContextManager[None]]


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> Iterator[None]:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


def graphs() -> int:
    """Compiled so far; none is broken in two."""
    assert not torch._dynamo.utils.counters["graph_break"]
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def loss_and_gradients(model: Transformer) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    tokens = torch.randint(0, 64, (3, 16), generator=torch.Generator().manual_seed(2))
    hidden = model(tokens, document_ids_BS=torch.arange(16).expand(3, 16) // 6)
    loss = model.head(hidden.stream_BSD).logsumexp(-1).square().mean()
    loss = loss + router_z_sum(hidden.routings) / tokens.numel()
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), gradients


def test_compiled_and_eager_give_the_same_loss_and_gradients() -> None:
    """2 of 4 experts, attention within documents."""
    config = ModelConfig(
        hidden_size=24, num_layers=3, num_heads=3, intermediate_size=20, vocab_size=64, num_experts=4,
        active_experts=2, initializer_range=0.2,
    )  # fmt: skip
    model = Transformer(config)
    initialise(model, seed=1)
    names = list(model.state_dict())
    loss, gradients = loss_and_gradients(model)
    compile_blocks(model)
    compiled_loss, compiled_gradients = loss_and_gradients(model)
    assert graphs() == 1  # for all blocks
    assert list(model.state_dict()) == names
    assert compiled_loss.item() == pytest.approx(loss.item(), rel=1e-5)
    assert compiled_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (compiled_gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_a_compiled_run_evaluates_resumes_exactly_and_calibrates(
    road: Path, expert_overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [
        *expert_overrides, "train.evaluation_interval=2", "train.evaluation_sequences=11", "train.steps=4",
        "router.calibration_steps=2",
    ]  # fmt: skip
    train("expert", *overrides, f"output_dir={tmp_path}/eager")
    assert graphs() == 0
    overrides.append("train.compile=true")
    capsys.readouterr()
    train("expert", *overrides, f"output_dir={tmp_path}/whole")
    assert capsys.readouterr().out.count("note: train.compile: the first step takes longer") == 1
    num_graphs = graphs()
    assert 2 <= num_graphs <= 3  # the trial's and two kinds of block: neither evaluation nor calibration added any
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed/contribution")
    shutil.rmtree(tmp_path / "resumed/calibration")
    shutil.rmtree(tmp_path / "resumed/checkpoints/step-000000004")
    train("expert", *overrides, f"output_dir={tmp_path}/resumed")
    eager, whole, resumed = (
        tmp_path / run / "contribution/expert.safetensors" for run in ("eager", "whole", "resumed")
    )
    assert whole.read_bytes() == resumed.read_bytes()
    for name, value in load_file(eager).items():
        assert (load_file(whole)[name] - value).norm() <= 1e-3 * value.norm(), name  # Adam divides small by small
    eager_rows, rows = (
        [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("eager", "whole")
    )
    for key in ("loss", "grad_norm", "valid_loss"):
        found, wanted = ([row[key] for row in each if key in row] for each in (rows, eager_rows))
        assert len(wanted) >= 2 and found == pytest.approx(wanted, rel=1e-4), key


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """As on a machine that has none; what others compiled lies elsewhere."""
    from torch._inductor import config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    with config.patch({"cpp.cxx": (None, "/nonexistent/c++")}):
        yield


def test_without_a_compiler_true_is_a_mistake_and_nothing_is_written(
    road: Path, tmp_path: Path, no_compiler: None, refused: Refused
) -> None:
    with refused("train.compile=true, but PyTorch needs a C++ compiler", "/nonexistent/c++"):
        train("pretrain", *SHAPE, f"data.dir={road}/data/public", f"output_dir={tmp_path}/run", "train.compile=true")
    assert not (tmp_path / "run").exists()


def test_auto_counts_the_operations_of_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    config = ModelConfig(hidden_size=96, num_layers=3, num_heads=4, intermediate_size=384, vocab_size=1024)
    model = Transformer(config)

    def chosen(*overrides: str) -> bool:
        composed = compose(
            "pretrain", ["data.dir=/d", "train.sequence_length=128", "train.batch_tokens=2048", *overrides]
        )
        return compiles(composed[0].train, model, torch.device("cpu"))

    assert not chosen("train.steps=1200")  # as in the demo
    assert not chosen("train.steps=1000000", "train.compile=false")
    assert capsys.readouterr().out == "" and graphs() == 0
    assert chosen("train.steps=1000000")


def test_auto_without_a_compiler_is_one_note(no_compiler: None, capsys: pytest.CaptureFixture[str]) -> None:
    config = ModelConfig(hidden_size=96, num_layers=3, num_heads=4, intermediate_size=384, vocab_size=1024)
    composed, _ = compose("pretrain", ["data.dir=/d", "train.steps=1000000"])
    assert not compiles(composed.train, Transformer(config), torch.device("cpu"))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("note: train.compile: PyTorch needs a C++ compiler")
    assert lines[0].endswith("the run goes on without")


def test_other_values_are_refused(refused: Refused) -> None:
    with refused("train.compile=yes is not one of auto, true, false"):
        compose("pretrain", ["data.dir=/d", "train.steps=1", "train.compile=yes"])
