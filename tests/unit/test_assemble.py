"""Assembly: every tensor exactly once and bit for bit, all of it verified, whole or not at all."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from flexpert.assembly.assemble import assemble
from flexpert.assembly.record import read_assembly
from flexpert.checkpoint import layout
from flexpert.checkpoint.digest import base_digest
from flexpert.cli import run_stage
from flexpert.contribution.verify import read_contribution
from flexpert.records import sha256_file

Refused = Callable[..., AbstractContextManager[None]]
Maker = Callable[..., Path]
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def contributions(shared_base: Path, make_contribution: Maker, tmp_path: Path) -> list[Path]:
    return [make_contribution(tmp_path / name, shared_base, seed=seed) for seed, name in enumerate(("news", "code"), 1)]


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def edit_config(directory: Path, **changes: Any) -> None:
    """Change fields of config.json; None removes one."""
    path = directory / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def load(directory: Path) -> Any:
    """The model as transformers loads it, if it finds a place for every tensor and a tensor for every place."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True, dtype="auto")
    assert not any(info.values()), info
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_finds_every_weight_where_it_belongs(
    dtype: torch.dtype, make_base: Maker, make_contribution: Maker, tmp_path: Path
) -> None:
    base = make_base(tmp_path / "base", dtype=dtype)
    contributions = [make_contribution(tmp_path / name, base, seed=ord(name), dtype=dtype) for name in "xyz"]
    assemble(base, contributions, tmp_path / "model", active_experts=2)

    model, weights = load(tmp_path / "model"), load_file(base / "model.safetensors")
    own = [load_file(path / "expert.safetensors") for path in contributions]
    assert type(model).__name__ == "FlexOlmoForCausalLM"
    assert (model.config.num_experts, model.config.num_experts_per_tok) == (4, 2)
    assert model.dtype == dtype
    for layer in range(3):
        mlp = model.model.layers[layer].mlp
        public = {part: weights.pop(f"model.layers.{layer}.mlp.{part}_proj.weight") for part in ("gate", "up", "down")}
        experts = [public, *({p: e[f"layers.{layer}.{p}_proj.weight"] for p in public} for e in own)]
        for index, expert in enumerate(experts):
            assert torch.equal(mlp.experts.gate_up_proj[index], torch.cat([expert["gate"], expert["up"]]))
            assert torch.equal(mlp.experts.down_proj[index], expert["down"])
        rows = [torch.zeros(24, dtype=dtype), *(expert[f"layers.{layer}.router.weight"] for expert in own)]
        assert torch.equal(mlp.gate.weight, torch.stack(rows))
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize("explicit", [True, False], ids=["config as saved", "fields left to their defaults"])
def test_experts_equal_to_the_public_one_leave_the_model_as_it_was(
    explicit: bool, base: Path, make_contribution: Maker, expert_tensors: Tensors, tmp_path: Path
) -> None:
    if not explicit:
        left_out = ["rms_norm_eps", "rope_parameters", "max_position_embeddings", "pad_token_id", "eos_token_id"]
        edit_config(base, **dict.fromkeys(left_out))
    weights = load_file(base / "model.safetensors")
    for name in expert_tensors:
        _, layer, part, _ = name.split(".")
        if part != "router":
            expert_tensors[name] = weights[f"model.layers.{layer}.mlp.{part}.weight"]
    contribution = make_contribution(tmp_path / "twin", base, tensors=expert_tensors)
    assemble(base, [contribution], tmp_path / "model")
    tokens = torch.arange(100)[None]
    with torch.no_grad():
        before, after = load(base)(tokens).logits, load(tmp_path / "model")(tokens).logits
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_every_default_that_differs_between_the_two_configs_is_written_out() -> None:
    from transformers import FlexOlmoConfig, Olmo2Config

    ours, theirs = Olmo2Config().to_dict(), FlexOlmoConfig().to_dict()
    differing = {key: value for key, value in ours.items() if value != theirs.get(key)}
    del differing["model_type"]
    differing["rope_theta"] = differing.pop("rope_parameters")["rope_theta"]
    assert differing == layout.OLMO2_DEFAULTS
    assert {"rope_theta": theirs["rope_parameters"]["rope_theta"]} == layout.FLEX_OLMO_DEFAULTS


def test_the_record_says_what_is_there(shared_base: Path, contributions: list[Path], tmp_path: Path) -> None:
    model = tmp_path / "model"
    record = assemble(shared_base, contributions, model)
    assert record == read_assembly(model)
    assert record.base_digest == base_digest(shared_base)
    assert record.active_experts == 3
    assert [(expert.id, expert.title, expert.license, expert.contribution) for expert in record.experts] == [
        ("public", "Public", None, None),
        ("news", "Owner of NEWS", "LicenseRef-news", read_contribution(contributions[0]).digest),
        ("code", "Owner of CODE", "LicenseRef-code", read_contribution(contributions[1]).digest),
    ]
    listed = [
        record.router,
        *record.trunk,
        *record.tokenizer,
        *(file for expert in record.experts for file in expert.files),
    ]
    for file in listed:
        path = model / file.name
        assert (file.bytes, file.sha256) == (path.stat().st_size, sha256_file(path))
    names = {file.name for file in listed}
    others = {"config.json", "generation_config.json", "model.safetensors.index.json", "assembly.json"}
    assert set(content(model)) == names | others
    assert {file.name for expert in record.experts for file in expert.files} == {
        f"expert-{e}.safetensors" for e in ("public", "news", "code")
    }
    before, after = (json.loads((path / "config.json").read_text()) for path in (shared_base, model))
    changed = {"architectures", "model_type"}
    assert {key: after[key] for key in before if key not in changed} == {
        key: value for key, value in before.items() if key not in changed
    }


def test_the_same_inputs_give_the_same_bytes_wherever_they_lie(
    shared_base: Path, contributions: list[Path], tmp_path: Path
) -> None:
    assemble(shared_base, contributions, tmp_path / "first")
    moved = [shutil.copytree(path, tmp_path / "elsewhere" / path.name) for path in [shared_base, *contributions]]
    assemble(moved[0], moved[1:], tmp_path / "second")
    assert content(tmp_path / "first") == content(tmp_path / "second")
    for data in content(tmp_path / "first").values():
        assert str(tmp_path).encode() not in data


def test_a_sharded_base_gives_the_same_model(
    shared_base: Path, contributions: list[Path], make_base: Maker, tmp_path: Path
) -> None:
    sharded = make_base(tmp_path / "sharded", shard_size="10KB")
    assert not (sharded / "model.safetensors").exists()
    assemble(shared_base, contributions, tmp_path / "first")
    assemble(sharded, contributions, tmp_path / "second")
    assert content(tmp_path / "first") == content(tmp_path / "second")


@pytest.mark.parametrize(
    ("change", "differing"),
    [
        ({"num_attention_heads": 2, "num_key_value_heads": 1}, ("num_attention_heads 4", "2")),
        ({"rms_norm_eps": 1e-6}, ("rms_norm_eps 3e-05", "1e-06")),
        ({"rope_parameters": None, "rope_theta": 500}, ("rope_theta 1234.0", "500.0")),
        ({"rope_scaling": {"rope_type": "default", "rope_theta": 1e6}}, ("rope_theta 1234.0", "1000000.0")),
    ],
    ids=["heads", "epsilon", "theta", "theta of the older name"],
)
def test_a_base_of_the_same_tensors_that_computes_something_else_is_refused(
    change: dict[str, Any],
    differing: tuple[str, str],
    base: Path,
    contributions: list[Path],
    tmp_path: Path,
    refused: Refused,
) -> None:
    before = base_digest(base)
    edit_config(base, **change)
    assert base_digest(base) == before
    with refused(contributions[0], base, *differing):
        assemble(base, contributions, tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1234.0, "factor": 8.0}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"tie_word_embeddings": True},
        {"attention_bias": True},
        {"head_dim": 8},
        {"hidden_act": "gelu"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_base_that_flexpert_does_not_compute_is_refused(
    change: dict[str, Any], base: Path, contributions: list[Path], tmp_path: Path, refused: Refused
) -> None:
    edit_config(base, **change)
    name = next(iter(change))
    with refused(base / "config.json", "rope_type" if name.startswith("rope") else name, "does not compute"):
        assemble(base, contributions, tmp_path / "model")


def test_a_router_with_bias_keeps_it_and_a_plain_loader_refuses_it(
    shared_base: Path, make_contribution: Maker, tmp_path: Path, refused: Refused
) -> None:
    from transformers import AutoModelForCausalLM

    biased = [make_contribution(tmp_path / name, shared_base, bias=True, seed=ord(name)) for name in "xy"]
    assert assemble(shared_base, biased, tmp_path / "model").biased
    router = load_file(tmp_path / "model" / "router.safetensors")
    own = [load_file(path / "expert.safetensors") for path in biased]
    for layer in range(3):
        expected = torch.cat([torch.zeros(1), *(expert[f"layers.{layer}.router.bias"] for expert in own)])
        assert torch.equal(router[f"model.layers.{layer}.mlp.gate.bias"], expected)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("flex_olmo_biased", ["FlexOlmoBiasedForCausalLM"])
    with pytest.raises(ValueError, match="flex_olmo_biased"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model")

    plain = make_contribution(tmp_path / "plain", shared_base)
    with refused(plain, biased[0], "router.bias"):
        assemble(shared_base, [biased[0], plain], tmp_path / "mixed")


def test_experts_that_do_not_go_together_are_refused(
    shared_base: Path, contributions: list[Path], make_contribution: Maker, tmp_path: Path, refused: Refused
) -> None:
    output = tmp_path / "model"
    twin = make_contribution(tmp_path / "again" / "news", shared_base, seed=9)
    with refused("'news'", contributions[0], twin):
        assemble(shared_base, [*contributions, twin], output)
    for active in (0, -1, 4):
        with refused(f"active_experts={active}", "3"):
            assemble(shared_base, contributions, output, active_experts=active)
    with refused(tmp_path / "absent"):
        assemble(shared_base, [tmp_path / "absent"], output)
    assert not output.exists()
    output.mkdir()
    with refused(output, "exists already"):
        assemble(shared_base, contributions, output)


def test_a_contribution_for_another_base_is_refused_and_nothing_is_left(
    base: Path, contributions: list[Path], tmp_path: Path, refused: Refused
) -> None:
    data = bytearray((base / "model.safetensors").read_bytes())
    data[-4] ^= 1
    (base / "model.safetensors").write_bytes(data)
    before = set(tmp_path.iterdir())
    with refused(contributions[0], base, "another base"):
        assemble(base, contributions, tmp_path / "model")
    assert set(tmp_path.iterdir()) == before


def test_an_altered_or_diverged_contribution_is_refused_and_nothing_is_left(
    shared_base: Path,
    contributions: list[Path],
    forge_contribution: Maker,
    expert_tensors: Tensors,
    tmp_path: Path,
    refused: Refused,
) -> None:
    for name, number in (("layers.2.router.weight", 0), ("layers.1.down_proj.weight", 1)):
        diverged = {key: tensor.clone() for key, tensor in expert_tensors.items()}
        diverged[name].view(-1)[5] = float("nan")
        forged = forge_contribution(tmp_path / f"diverged-{number}", shared_base, diverged)
        with refused(forged, name, "NaN"):
            assemble(shared_base, [forged], tmp_path / "model")

    path = contributions[1] / "expert.safetensors"
    good = path.read_bytes()
    before = set(tmp_path.iterdir())
    for name in ("layers.2.router.weight", "layers.0.gate_proj.weight"):
        place = good.index(load_file(path)[name].numpy().tobytes())
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        with refused(path, repr(name), "altered"):
            assemble(shared_base, contributions, tmp_path / "model")
    path.write_bytes(good[:-10])
    with refused(path):
        assemble(shared_base, contributions, tmp_path / "model")
    assert set(tmp_path.iterdir()) == before


def test_a_base_that_is_not_a_whole_olmo2_is_refused(
    base: Path, contributions: list[Path], tmp_path: Path, refused: Refused
) -> None:
    from safetensors.torch import save_file

    path, output = base / "model.safetensors", tmp_path / "model"
    weights = load_file(path)
    name = "model.layers.2.self_attn.k_norm.weight"
    rest = {key: tensor for key, tensor in weights.items() if key != name}
    for wrong, parts in (
        (rest, (base, repr(name), "missing")),
        (weights | {"model.extra.weight": torch.ones(2)}, (base, "'model.extra.weight'", "does not call for")),
        (rest | {name: torch.ones(24)}, (base, repr(name), "[24]", "[12]")),
        (rest | {name: torch.ones(12, dtype=torch.int32)}, (base, name, "I32")),
        (rest | {name: torch.full((12,), float("nan"))}, (path, name, "NaN")),
    ):
        save_file(wrong, path)
        with refused(*parts):
            assemble(base, contributions, output)
    save_file(weights, path)

    (base / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    with refused(base / "tokenizer.json"):
        assemble(base, contributions, output)
    (tmp_path / "tokenizer.json").rename(base / "tokenizer.json")
    edit_config(base, model_type="llama")
    with refused(base / "config.json", "llama", "olmo2"):
        assemble(base, contributions, output)
    edit_config(base, model_type="olmo2")
    assemble(base, contributions, output)
    with refused(output, "mixture"):
        assemble(output, contributions, tmp_path / "twice")


@pytest.fixture(scope="module")
def wide(make_base: Maker, make_contribution: Maker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, x, y, z: large enough that assembling them takes a while. model: what it must give."""
    folder = tmp_path_factory.mktemp("wide")
    base = make_base(folder / "base", intermediate_size=40_000)
    assemble(base, [make_contribution(folder / name, base, seed=ord(name)) for name in "xyz"], folder / "model")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("begun", "phase", "after"),  # trunk, public, x, y, z are begun in this order
    [
        ("", "assembly", 0),
        ("expert-public.safetensors", "assembly", 2),
        ("expert-y.safetensors", "assembly", 4),
        ("assembly.json", "publish", 0),
    ],
    ids=["nothing", "expert-public", "expert-y", "all"],
)
def test_a_kill_leaves_nothing_under_the_final_name_and_the_next_run_succeeds(
    begun: str, phase: str, after: int, wide: Path, tmp_path: Path
) -> None:
    """The command, which would hang after that, is killed when its temporary directory or this file in it is there."""
    output = tmp_path / "models" / "model"
    overrides = [f"base={wide}/base", f"contributions={wide}/x,{wide}/y,{wide}/z", f"output_dir={output}"]
    command = [sys.executable, "-m", "flexpert", "assemble", *overrides]
    endless = os.environ | {"FLEXPERT_FAULTS": json.dumps([{"action": "hang", "phase": phase, "after": after}])}
    with subprocess.Popen(command, env=endless, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while process.poll() is None and not list(output.parent.glob(f".model.*.partial/{begun}")):
            time.sleep(0.001)
        process.kill()
        _, error = process.communicate()
    assert process.returncode == -signal.SIGKILL, error.decode()
    (leftover,) = output.parent.iterdir()
    assert leftover.name.startswith(".model.")
    assert (leftover / "assembly.json").exists() == (begun == "assembly.json")

    subprocess.run(command, check=True, capture_output=True)
    assert list(output.parent.iterdir()) == [output]
    assert content(output) == content(wide / "model")


def test_the_commands_end_with_a_summary_and_the_path(
    shared_base: Path, contributions: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, removed = tmp_path / "model", tmp_path / "removed"
    paths = ",".join(map(str, contributions))
    run_stage("assemble", [f"base={shared_base}", f"contributions={paths}", f"output_dir={model}"])
    weights = [load_file(path) for path in model.glob("*.safetensors")]
    count = sum(tensor.numel() for file in weights for tensor in file.values())
    *_, summary, last = capsys.readouterr().out.splitlines()
    assert summary == f"3 experts (public, news, code), {count / 1000:.3g}K parameters, 11 files"
    assert last == str(model)
    run_stage("remove", [f"model={model}", "experts=news", f"output_dir={removed}"])
    *_, summary, last = capsys.readouterr().out.splitlines()
    assert summary.startswith("took out news; left: 2 experts (public, code), ")
    assert last == str(removed)
