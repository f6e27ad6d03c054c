"""Assembly: every tensor exactly once and bit for bit, all of it verified, whole or not at all."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from flexpert.assembly import base as base_module
from flexpert.assembly.assemble import assemble
from flexpert.assembly.record import read_assembly
from flexpert.checkpoint.digest import base_digest
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
    assert differing.pop("rope_parameters")["rope_theta"] == base_module.OLMO2_ROPE_THETA
    assert differing == base_module.OLMO2_DEFAULTS


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
    listed = [record.router, *record.trunk, *record.tokenizer, *(expert.file for expert in record.experts)]
    for file in listed:
        path = model / file.name
        assert (file.bytes, file.sha256) == (path.stat().st_size, sha256_file(path))
    names = {file.name for file in listed}
    others = {"config.json", "generation_config.json", "model.safetensors.index.json", "assembly.json"}
    assert set(content(model)) == names | others
    assert {expert.file.name for expert in record.experts} == {
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


def test_tied_embeddings_stay_tied(base: Path, make_contribution: Maker, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    weights = load_file(base / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    edit_config(base, tie_word_embeddings=True)
    assemble(base, [make_contribution(tmp_path / "math", base)], tmp_path / "model")
    model = load(tmp_path / "model")
    assert torch.equal(model.lm_head.weight, weights["model.embed_tokens.weight"])


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
    edit_config(base, architectures=["LlamaForCausalLM"])
    with refused(base / "config.json", "LlamaForCausalLM", "Olmo2ForCausalLM"):
        assemble(base, contributions, output)
    edit_config(base, architectures=["Olmo2ForCausalLM"])
    assemble(base, contributions, output)


KILLED = """
import os, signal, sys
from pathlib import Path
import flexpert.assembly.assemble, flexpert.assembly.tensors, flexpert.checkpoint.store

module, function, calls = sys.modules[sys.argv[1]], sys.argv[2], int(sys.argv[3])
original = getattr(module, function)

def die_at_last_call(*arguments):
    global calls
    calls -= 1
    if calls == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments)

setattr(module, function, die_at_last_call)
base, *contributions, output = map(Path, sys.argv[4:])
flexpert.assembly.assemble.assemble(base, contributions, output)
"""


@pytest.mark.parametrize(
    "moment",
    [
        ("flexpert.assembly.tensors", "all_finite", 40),  # in the middle of a file
        ("flexpert.assembly.assemble", "write_tensors", 4),  # between two files
        ("flexpert.assembly.assemble", "write_assembly", 1),  # before the record
        ("flexpert.checkpoint.store", "fsync_tree", 1),  # before the rename
    ],
    ids=lambda moment: moment[1],
)
def test_a_kill_leaves_nothing_under_the_final_name_and_the_next_run_succeeds(
    moment: tuple[str, str, int], shared_base: Path, contributions: list[Path], tmp_path: Path
) -> None:
    output = tmp_path / "models" / "model"
    arguments = [*map(str, moment), str(shared_base), *map(str, contributions), str(output)]
    process = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True, check=False)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert not output.exists()
    assert len(list(output.parent.iterdir())) == 1  # the temporary directory: the kill came in the middle
    record = assemble(shared_base, contributions, output)
    assert list(output.parent.iterdir()) == [output]
    assert asdict(record) == asdict(assemble(shared_base, contributions, tmp_path / "again"))
    assert content(output) == content(tmp_path / "again")
