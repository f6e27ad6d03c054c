"""`flexpert tune_kernels`: which products it tunes, what it says of them, and of a machine without a GPU."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from flexpert_kernels.tuning import chosen, tune

from flexpert.checkpoint.huggingface import save_model
from flexpert.cli import main
from flexpert.config.compose import compose
from flexpert.config.groups import ModelConfig
from flexpert.data.tokenizer import train_tokenizer
from flexpert.model.transformer import build_on_meta, initialise
from flexpert.train.tune_kernels import Layer, layer_of, lines_of

SHAPE = ModelConfig(
    hidden_size=32, num_layers=1, num_heads=4, intermediate_size=48, vocab_size=384, num_experts=4, active_experts=2
)


@pytest.fixture
def mixture(tmp_path: Path) -> Path:
    """A model directory with experts."""
    model = build_on_meta(SHAPE).to_empty(device="cpu")
    initialise(model, 0)
    directory = tmp_path / "mixture"
    directory.mkdir()
    save_model(model, directory, train_tokenizer(["some text"], 300, tmp_path / "tokenizer"), torch.bfloat16)
    return directory


def layer(*overrides: str) -> Layer:
    return layer_of(compose("tune_kernels", list(overrides))[0])


def test_the_layer_of_a_named_shape() -> None:
    assert layer("model=flex_37b") == Layer(4096, 11008, 8, 4, 4 * 8192)
    assert layer("model=flex_37b", "active_experts=2", "tokens=4096") == Layer(4096, 11008, 8, 2, 2 * 4096)
    assert layer("model=flex_37b", "expert_tensor=2") == Layer(4096, 5504, 8, 4, 4 * 8192)
    assert layer("model=flex_37b", "expert=4") == Layer(4096, 11008, 2, 1, 4 * 8192)


def test_the_layer_of_a_model_directory(mixture: Path) -> None:
    assert layer(f"model={mixture}", "tokens=100") == Layer(32, 48, 4, 2, 200)


@pytest.mark.parametrize("name", ["flex_37b", "directory"])
def test_without_a_gpu_it_is_one_line_of_status_2(
    name: str, mixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(SystemExit) as ended:
        main(["tune_kernels", f"model={mixture if name == 'directory' else name}"])
    out, error = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    assert error == "flexpert: tune_kernels needs a GPU that the kernels run on: there is no GPU\n"
    assert not (tmp_path / "cache").exists()


def test_its_help_says_which_gpus_qualify_and_where_tiles_are_kept(capsys: pytest.CaptureFixture[str]) -> None:
    main(["tune_kernels", "--help"])
    said = capsys.readouterr().out
    assert all(part in said for part in ("sm_80", "or newer", "~/.cache/flexpert/tiles.json", "$XDG_CACHE_HOME"))


def test_each_product_of_the_layer_is_tuned_kept_and_told_in_one_line(
    mixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    hidden, ffn, experts, _, rows = layer(f"model={mixture}", "tokens=64")
    timed = []

    def timer(run: Callable[[], object]) -> float:
        timed.append(run)
        return 0.5

    device, dtype = torch.device("cpu"), torch.float32
    lines = lines_of(tune(hidden, ffn, experts, rows, device, dtype, timer))
    assert [line.partition("  tile ")[0].split(maxsplit=1) for line in lines] == [
        ["up", "96 x 32"],
        ["rows", "32 x 48"],
        ["rows_transposed", "48 x 32"],
        ["rows_transposed", "32 x 96"],
        ["outer_y", "32 x 48"],
        ["outer_x", "96 x 32"],
    ]
    best = chosen("up", 2 * ffn, hidden, dtype, device)
    tile = f"tile {best.block_m} x {best.block_n} x {best.block_k}, {best.group_m} a group"
    assert lines[0].endswith(f"{tile}  {best.num_warps} warps  {best.num_stages} stages  0 TFLOP/s")
    assert len(timed) >= len(lines)
    (kept,) = json.loads((tmp_path / "cache/flexpert/tiles.json").read_text()).values()
    assert len(kept) == len(lines)
