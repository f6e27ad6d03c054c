"""Other implementations than PyTorch's: how they are chosen and refused. CI has none of them: none computes here."""

import functools
import sys
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from flexpert.checkpoint.huggingface import olmo2_config, tensor_map
from flexpert.checkpoint.layout import Architecture
from flexpert.cli import main
from flexpert.config.accelerators import IMPLEMENTATIONS, check_usable, names
from flexpert.config.compose import compose
from flexpert.config.groups import ComputeConfig, ModelConfig, OptimConfig
from flexpert.config.schema import leaves_of
from flexpert.config.stages import PretrainConfig
from flexpert.data.tokenizer import train_tokenizer
from flexpert.errors import UserError
from flexpert.model.accelerate import EngineAttention, precision
from flexpert.model.attention import Attention, rotary_tables
from flexpert.model.norm import RMSNorm
from flexpert.model.transformer import Block, build_on_meta
from flexpert.train.optimizer import build_optimizer, counts_to_groups, counts_to_states

STAGES = {
    "pretrain": ["data.dir=/none", "train.steps=1"],
    "expert": ["base=/none", "data.dir=/none", "train.steps=1", "router.init=random", "name=math"],
    "tune_router": ["model=/none", "data.dir=/none", "train.steps=1"],
}
MODEL = ("model.norm", "model.attention")
KEYS = {
    "pretrain": (*MODEL, "model.linear", "optim.adam"),
    "expert": (*MODEL, "optim.adam"),
    "tune_router": ("optim.adam",),
}
#: Of `pretrain`, which has all keys.
CHOICES = [(key, name) for key, known in IMPLEMENTATIONS.items() for name in list(known)[1:]]

SHAPE = ModelConfig(
    hidden_size=24, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=40, vocab_size=32, num_experts=0
)


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a command that ends with status 2."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    out, error = capsys.readouterr()
    assert (ended.value.code, out, error.count("\n")) == (2, "", 1), error
    return error


@pytest.mark.parametrize(
    ("stage", "key", "name"),
    [
        *(("pretrain", *choice) for choice in CHOICES),
        ("expert", "model.norm", "te"),
        ("tune_router", "optim.adam", "apex"),
    ],
)
def test_what_is_not_installed_is_one_line(
    stage: str, key: str, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    implementation = IMPLEMENTATIONS[key][name]
    assert implementation is not None
    package = implementation.package
    if find_spec(package.module) is not None:
        pytest.skip(f"{package.title} is installed")
    monkeypatch.chdir(tmp_path)
    line = refusal([stage, *STAGES[stage], f"{key}={name}"], capsys)
    default = "sdpa" if key == "model.attention" else "torch"
    assert line == (
        f"flexpert: {key}={name} needs {package.title}, which is not installed: {package.remedy}, "
        f"or leave {key}={default}\n"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("stage", "key"), [*(("pretrain", key) for key in IMPLEMENTATIONS), ("expert", "model.norm")])
def test_another_name_is_answered_with_the_choices(stage: str, key: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal([stage, *STAGES[stage], f"{key}=fast"], capsys)
    assert f"{key}=fast is not one of {', '.join(names(key))}" in line


@pytest.mark.parametrize("stage", ["pretrain", "expert", "tune_router", "evaluate", "generate"])
def test_a_stage_takes_the_keys_that_it_can_heed(stage: str) -> None:
    assert tuple(key for key in IMPLEMENTATIONS if key in leaves_of(stage)) == KEYS.get(stage, ())


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["model.norm=te", "parallel.tensor=2"], ("model.norm=te needs parallel.tensor=1, and it is 2",)),
        (["model.norm=apex", "train.compile=true"], ("model.norm=apex is not compiled", "train.compile=auto")),
        (
            ["model.norm=te", "model.attention=te", "data.intra_document_attention=true"],
            ("model.attention=te attends over whole windows", "data.intra_document_attention=true"),
        ),
        (["model.linear=te_fp8", "train.recompute=full"], ("model.linear=te_fp8", "train.recompute=full")),
        (
            ["model.linear=te_fp8", "train.sequence_length=24", "train.batch_tokens=48"],
            ("model.linear=te_fp8 needs a train.sequence_length that divides by 16, not 24",),
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_does_not_go_together_is_one_line(
    overrides: list[str], parts: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    line = refusal(["pretrain", *STAGES["pretrain"], *overrides], capsys)
    assert not [part for part in parts if part not in line], line


@functools.cache
def default_config() -> PretrainConfig:
    config: PretrainConfig = compose("pretrain", STAGES["pretrain"])[0]
    return config


def with_choice(key: str, name: str) -> PretrainConfig:
    """A config that names an implementation; not composed, for that looks for the package."""
    config = default_config()
    group, _, field = key.partition(".")
    return replace(config, **{group: replace(getattr(config, group), **{field: name})})


@pytest.mark.parametrize(("key", "name"), CHOICES)
def test_none_of_them_computes_on_a_cpu(key: str, name: str) -> None:
    with pytest.raises(UserError, match=rf"{key}={name} computes on CUDA devices alone.*leave {key}="):
        check_usable(with_choice(key, name), "cpu", 1)


def test_defaults_need_nothing() -> None:
    check_usable(default_config(), "cpu", 1)
    check_usable(compose("tune_router", STAGES["tune_router"])[0], "cuda", 8)


def test_apex_does_not_step_sharded_parameters() -> None:
    with pytest.raises(UserError, match=r"optim\.adam=apex knows no sharded parameters: run it in one process"):
        check_usable(with_choice("optim.adam", "apex"), "cuda", 2)


@pytest.mark.skipif(find_spec("apex") is not None, reason="apex is installed")
def test_another_package_of_the_same_name_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On PyPI, apex is something else."""
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex/__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=r"model\.norm=apex: NVIDIA's apex cannot be imported: .*normalization"):
        check_usable(with_choice("model.norm", "apex"), "cuda", 1)
    sys.modules.pop("apex")  # other tests look whether it is there


def test_fp8_takes_no_width_that_does_not_divide_by_16() -> None:
    with pytest.raises(UserError, match=r"divide by 16, and blocks\.0\.attention\.q_proj is 24 x 24"):
        build_on_meta(replace(SHAPE, linear="te_fp8"))


def test_the_defaults_build_the_model_of_before() -> None:
    assert [field.default for field in fields(ComputeConfig)] == ["torch", "sdpa"]
    assert not SHAPE.is_accelerated
    model = build_on_meta(SHAPE)
    block = model.blocks[0]
    assert isinstance(block, Block)
    kinds = {type(module) for module in model.modules() if not list(module.children())}
    assert kinds == {nn.Linear, nn.Embedding, RMSNorm}
    assert type(block.attention) is Attention
    assert type(build_optimizer(model, OptimConfig())) is torch.optim.AdamW
    with precision(SHAPE):
        pass


def test_what_a_run_computes_with_is_no_part_of_what_it_saves(tmp_path: Path) -> None:
    run = ComputeConfig(norm="te", attention="te")
    chosen = replace(SHAPE.computed_as(run), linear="te_fp8")
    assert (chosen.norm, chosen.attention, chosen.is_accelerated) == ("te", "te", True)
    assert replace(chosen, linear="torch").computed_as(ComputeConfig()) == SHAPE
    tokenizer = train_tokenizer(["a few words, and a few more"], 300, tmp_path / "tokenizer")
    assert olmo2_config(chosen, tokenizer, torch.float32) == olmo2_config(SHAPE, tokenizer, torch.float32)
    assert tensor_map(chosen) == tensor_map(SHAPE)
    assert Architecture.of(chosen) == Architecture.of(SHAPE)


class DocumentedLayout(nn.Module):
    """Causal attention that takes [B, S, H, C] and gives [B, S, H · C], as transformer-engine says its does."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        assert all(x.is_contiguous() for x in (query, key, value))
        operands = (x.transpose(1, 2) for x in (query, key, value))
        out = nn.functional.scaled_dot_product_attention(*operands, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).flatten(2)


def test_operands_are_handed_over_in_the_documented_layout() -> None:
    """Our transpositions alone, not transformer-engine's arithmetic."""
    torch.manual_seed(0)
    attention, x = Attention(SHAPE), torch.randn(2, 5, SHAPE.hidden_size)
    for norm in (attention.q_norm, attention.k_norm):
        nn.init.uniform_(norm.weight)
    rotary = rotary_tables(SHAPE, torch.arange(5))
    expected = attention(x, rotary)
    names_before = [name for name, _ in attention.named_parameters()]
    attention.__class__ = EngineAttention
    attention.core = DocumentedLayout()  # type: ignore[assignment]
    assert torch.equal(attention(x, rotary), expected)
    assert [name for name, _ in attention.named_parameters()] == names_before


def test_steps_are_counted_where_checkpoints_look_for_them() -> None:
    """transformer-engine and apex count in a group's `step`."""
    first, second, unused = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    optimizer = torch.optim.SGD([{"params": [first, unused]}, {"params": [second]}], lr=1.0)
    optimizer.state[first] = {"step": torch.tensor(7.0), "exp_avg": torch.ones(2)}
    counts_to_groups(optimizer, (), {})
    assert [group["step"] for group in optimizer.param_groups] == [7, 0]
    for group in optimizer.param_groups:
        group["step"] += 1
    optimizer.state[second]["exp_avg"] = torch.ones(2)
    counts_to_states(optimizer, (), {})
    assert [optimizer.state[parameter].get("step") for parameter in (first, second, unused)] == [8.0, 1.0, None]
