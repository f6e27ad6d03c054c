"""Model directories: what does not fit together is found before a weight is read, what was altered when all are."""

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flexpert.assembly.assemble import assemble
from flexpert.assembly.record import read_assembly
from flexpert.assembly.verify import verify_model
from flexpert.checkpoint.directory import ModelDirectory

Refused = Callable[..., AbstractContextManager[None]]
Maker = Callable[..., Path]


@pytest.fixture
def model(shared_base: Path, make_contribution: Maker, tmp_path: Path) -> Path:
    contributions = [
        make_contribution(tmp_path / name, shared_base, seed=seed) for seed, name in enumerate(("news", "math"))
    ]
    assemble(shared_base, contributions, tmp_path / "model", active_experts=2)
    return tmp_path / "model"


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_an_assembled_model_is_read_as_it_was_written(model: Path, shared_base: Path) -> None:
    directory = ModelDirectory.open(model)
    assert directory.experts == ("public", "news", "math")
    assert (directory.config.num_experts, directory.config.active_experts) == (3, 2)
    assert directory.architecture == ModelDirectory.open(shared_base).architecture == read_assembly(model).architecture
    assert directory.stored_dtype() == "F32" and directory.require_one_dtype() == torch.float32
    stored = {name: path.name for path in model.glob("*.safetensors") for name in load_file(path)}
    assert {name: path.name for name, path in directory.files.items()} == stored


def test_a_model_is_read_without_torch(model: Path) -> None:
    program = (
        "import sys; from pathlib import Path; import flexpert.assembly.stages as stages\n"
        f"print(stages.summary(Path({str(model)!r}))); assert 'torch' not in sys.modules"
    )
    output = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert output.startswith("3 experts (public, news, math), ")


@pytest.mark.parametrize("kind", ["single", "sharded", "assembled"])
def test_a_file_that_is_cut_short_or_missing_is_refused(
    kind: str, base: Path, model: Path, make_base: Maker, tmp_path: Path, refused: Refused
) -> None:
    directory = {"single": base, "assembled": model}.get(kind) or make_base(tmp_path / "sharded", shard_size="10KB")
    for path in directory.glob("*.safetensors"):
        whole = path.read_bytes()
        for size in (len(whole) - 1, 100, 0):
            path.write_bytes(whole[:size])
            with refused(path, "truncated"):
                ModelDirectory.open(directory)
        path.unlink()
        with refused(directory if kind == "single" else path):
            ModelDirectory.open(directory)
        path.write_bytes(whole)
    ModelDirectory.open(directory)


def test_stored_types_are_checked_where_one_is_needed(base: Path, refused: Refused) -> None:
    path, name = base / "model.safetensors", "model.norm.weight"
    weights = load_file(path)
    save_file(weights | {name: weights[name].bfloat16()}, path)
    with refused(base, f"BF16 ({name})", "F32 ("):
        ModelDirectory.open(base).stored_dtype()
    save_file({name: tensor.half() for name, tensor in weights.items()}, path)
    with refused(base, "F16"):
        ModelDirectory.open(base).stored_dtype()


def swap(record: dict[str, Any]) -> None:
    experts = record["experts"]
    experts[1], experts[2] = experts[2], experts[1]


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (swap, ("assembly.json", "'math' is number 1", "expert-news.safetensors")),
        (lambda record: record["experts"].pop(), ("config.json", "disagree on the experts")),
        (lambda record: record["experts"][1]["files"][0].update(bytes=7), ("expert-news.safetensors", "says 7")),
        (lambda record: record["tokenizer"][0].update(name="other.json"), ("other.json", "missing")),
        (lambda record: record["trunk"].clear(), ("trunk.safetensors", "not listed")),
        (lambda record: record["router"].update(bias=True), ("config.json", "disagree on the experts")),
        (lambda record: record["architecture"].update(rope_theta=9.5), ("rope_theta 9.5", "1234.0")),
        (lambda record: record.pop("architecture"), ("assembly.json", "'architecture'")),
        (lambda record: record["experts"][1].update(id="x\x1b[2J"), ("assembly.json", "expert id", "invalid")),
        (lambda record: record["experts"][1].update(title="a\nb"), ("assembly.json", "title", "one line")),
        (lambda record: record["trunk"].append(record["trunk"][0]), ("assembly.json", "lists a file twice")),
    ],
    ids=[
        "order",
        "number",
        "size",
        "absent",
        "unlisted",
        "bias",
        "architecture",
        "no architecture",
        "id",
        "title",
        "twice",
    ],
)
def test_a_record_that_disagrees_with_the_files_is_refused(
    change: Callable[[dict[str, Any]], object], parts: tuple[str, ...], model: Path, refused: Refused
) -> None:
    edit(model / "assembly.json", change)
    with refused(model, *parts):
        ModelDirectory.open(model)


def test_a_router_of_another_number_of_rows_is_refused(model: Path, refused: Refused) -> None:
    path, name = model / "router.safetensors", "model.layers.1.mlp.gate.weight"
    rows = load_file(path)
    save_file(rows | {name: rows[name][:2].clone()}, path, metadata={"format": "pt"})
    edit(model / "assembly.json", lambda record: record["router"]["file"].update(bytes=path.stat().st_size))
    with refused(model, name, "[2, 24]", "[3, 24]"):
        ModelDirectory.open(model)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"rope_scaling": "yarn"}, "is not an object"),
        ({"rope_theta": 10**400}, "'rope_theta'"),
        ({"num_hidden_layers": 10**9}, "more layers or experts than there are tensors"),
    ],
    ids=["rope", "huge number", "many layers"],
)
def test_a_config_that_nobody_would_write_is_one_line(
    changes: dict[str, Any], part: str, base: Path, refused: Refused
) -> None:
    edit(base / "config.json", lambda config: config.update(rope_parameters=None) or config.update(changes))
    with refused(base, "config.json", part):
        ModelDirectory.open(base)


def test_k_alone_may_be_changed_by_hand(model: Path, refused: Refused) -> None:
    edit(model / "config.json", lambda config: config.update(num_experts_per_tok=1))
    assert ModelDirectory.open(model).config.active_experts == 1
    edit(model / "config.json", lambda config: config.update(num_experts_per_tok=4))
    with refused(model / "config.json", "num_experts_per_tok=4", "num_experts=3"):
        ModelDirectory.open(model)


def test_a_flipped_byte_of_any_listed_file_is_found(model: Path, refused: Refused) -> None:
    record = verify_model(model)
    assert len(record.files) == 8 == len({entry.name for entry in record.files})
    for entry in record.files:
        path = model / entry.name
        whole = path.read_bytes()
        path.write_bytes(whole[:-4] + bytes([whole[-4] ^ 1]) + whole[-3:])
        ModelDirectory.open(model)
        with refused(path, "altered", "assembly.json"):
            verify_model(model)
        path.write_bytes(whole)
    verify_model(model)
