"""The base digest: over content alone, and over all of it."""

import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from corpus import make_tokenizer
from safetensors.torch import load_file, save_file

from flexpert.checkpoint.digest import base_digest, digest_of, digest_tensor, tensor_digests, tokenizer_digest
from flexpert.data.tokenizer import load_tokenizer

Refused = Callable[..., AbstractContextManager[None]]
INDEX = "model.safetensors.index.json"


@pytest.fixture
def sharded(make_base: Callable[..., Path], tmp_path: Path) -> Path:
    directory = make_base(tmp_path / "sharded", shard_size="10KB")
    assert len(list(directory.glob("model-*.safetensors"))) > 2
    return directory


def test_resharding_keeps_the_digest(shared_base: Path, sharded: Path) -> None:
    assert tensor_digests(sharded) == tensor_digests(shared_base)
    assert base_digest(sharded) == base_digest(shared_base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_in_memory_have_the_digest_of_their_file(
    dtype: torch.dtype, make_base: Callable[..., Path], tmp_path: Path
) -> None:
    directory = make_base(tmp_path / "base", dtype=dtype)
    tensors = {name: digest_tensor(tensor) for name, tensor in load_file(directory / "model.safetensors").items()}
    assert tensors == tensor_digests(directory)
    assert digest_of(dict(reversed(tensors.items())), tokenizer_digest(directory)) == base_digest(directory)


def test_a_tensor_that_is_not_contiguous_is_digested_in_its_logical_order() -> None:
    matrix = torch.arange(6.0).reshape(2, 3)
    assert digest_tensor(matrix.T) == digest_tensor(matrix.T.contiguous())
    assert digest_tensor(matrix.T) != digest_tensor(matrix.reshape(3, 2))


def test_name_dtype_shape_and_every_bit_count(base: Path) -> None:
    before = base_digest(base)
    path = base / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    flipped = tensors[name].clone()
    flipped.view(torch.int32)[0, 0] ^= 1
    seen = {before}
    for change in (
        {name: flipped},
        {name: tensors[name].to(torch.bfloat16)},
        {name: tensors[name].T.contiguous()},
        {name: tensors[name].reshape(20, 48)},
        {"another.name": tensors[name]},
    ):
        save_file({key: tensor for key, tensor in tensors.items() if key != name} | change, path)
        seen.add(base_digest(base))
    assert len(seen) == 6
    save_file(tensors, path)
    assert base_digest(base) == before


def test_the_tokenizer_counts_but_not_its_padding_and_truncation(base: Path) -> None:
    from tokenizers import Tokenizer

    path = base / "tokenizer.json"
    before = base_digest(base)
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding()
    tokenizer.save(str(path))
    assert base_digest(base) == before
    tokenizer.add_tokens(["one-more"])
    tokenizer.save(str(path))
    assert base_digest(base) != before


@pytest.fixture
def bpe(tmp_path: Path) -> Path:
    return make_tokenizer(tmp_path / "bpe").directory / "tokenizer.json"


def test_equal_tokenizers_have_one_digest_whatever_wrote_the_file(bpe: Path) -> None:
    """Merges in the spelling of older libraries, and a post-processor, change no id."""
    before, written = tokenizer_digest(bpe.parent), json.loads(bpe.read_text())
    text = "one two: naïve 3.14"
    ids = load_tokenizer(bpe.parent).encode(text)
    assert all(isinstance(merge, list) for merge in written["model"]["merges"])
    written["model"]["merges"] = [" ".join(merge) for merge in written["model"]["merges"]]
    written["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|pad|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|pad|>": {"id": "<|pad|>", "ids": [1], "tokens": ["<|pad|>"]}},
    }
    bpe.write_text(json.dumps(written))
    assert load_tokenizer(bpe.parent).encode(text) == ids
    assert tokenizer_digest(bpe.parent) == before
    del written["post_processor"]
    bpe.write_text(json.dumps(written))
    assert tokenizer_digest(bpe.parent) == before


@pytest.mark.parametrize("change", ["merge order", "merge", "vocabulary", "pre_tokenizer"])
def test_what_changes_ids_changes_the_digest(change: str, bpe: Path) -> None:
    before, written = tokenizer_digest(bpe.parent), json.loads(bpe.read_text())
    merges, vocabulary = written["model"]["merges"], written["model"]["vocab"]
    if change == "merge order":
        merges[:2] = merges[1::-1]
    elif change == "merge":
        merges.pop()
    elif change == "vocabulary":
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    else:
        written["pre_tokenizer"] = None
    bpe.write_text(json.dumps(written))
    assert tokenizer_digest(bpe.parent) != before


def test_a_missing_tokenizer_is_refused(base: Path, refused: Refused) -> None:
    (base / "tokenizer.json").unlink()
    with refused(base / "tokenizer.json"):
        base_digest(base)


def edit_index(directory: Path, edit: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((directory / INDEX).read_text())
    edit(index["weight_map"])
    (directory / INDEX).write_text(json.dumps(index))


def test_index_and_shards_must_agree(sharded: Path, refused: Refused) -> None:
    name = "model.norm.weight"
    edit_index(sharded, lambda weights: weights.update(ghost=weights[name]))
    with refused("'ghost'"):
        tensor_digests(sharded)
    edit_index(sharded, lambda weights: (weights.pop("ghost"), weights.pop(name)))
    with refused(repr(name), "does not list"):
        tensor_digests(sharded)


def test_a_tensor_in_two_shards_is_refused(sharded: Path, refused: Refused) -> None:
    name = "model.norm.weight"
    index = json.loads((sharded / INDEX).read_text())["weight_map"]
    holder, other = index[name], next(shard for shard in index.values() if shard != index[name])
    tensor = load_file(sharded / holder)[name]
    save_file(load_file(sharded / other) | {name: tensor}, sharded / other)
    with refused(repr(name), holder, other):
        tensor_digests(sharded)


def test_a_shard_that_is_missing_or_outside_is_refused(sharded: Path, refused: Refused) -> None:
    name = "model.norm.weight"
    edit_index(sharded, lambda weights: weights.update({name: "../elsewhere.safetensors"}))
    with refused("../elsewhere.safetensors", INDEX):
        tensor_digests(sharded)
    edit_index(sharded, lambda weights: weights.update({name: "absent.safetensors"}))
    with refused(sharded / "absent.safetensors"):
        tensor_digests(sharded)


def test_a_directory_with_both_layouts_or_none_is_refused(sharded: Path, base: Path, refused: Refused) -> None:
    shutil.copy(base / "model.safetensors", sharded)
    with refused(sharded, "both"):
        tensor_digests(sharded)
    (base / "model.safetensors").unlink()
    with refused(base, "neither"):
        tensor_digests(base)
    with refused(base / "absent"):
        tensor_digests(base / "absent")
