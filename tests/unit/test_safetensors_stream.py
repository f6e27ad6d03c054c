"""Streaming safetensors: exact against the library, strict with malformed files, flat in memory."""

import hashlib
import json
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from flexpert.assembly import tensors as stream
from flexpert.assembly.tensors import SafetensorsFile, TensorSource, all_finite, open_tensors, write_tensors
from flexpert.checkpoint.digest import digest_tensor, dtype_name, tensor_bytes
from flexpert.records import sha256_file

Refused = Callable[..., AbstractContextManager[None]]
FLOATS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def random_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {f"{dtype}": torch.randn(3, 5, 7).to(dtype) for dtype in FLOATS} | {"one": torch.tensor([2.0])}


def source(name: str, tensor: torch.Tensor) -> TensorSource:
    return TensorSource(name, dtype_name(tensor), tuple(tensor.shape), lambda: [tensor_bytes(tensor)], f"the {name}")


def test_what_is_written_is_what_the_library_reads(tmp_path: Path) -> None:
    tensors = random_tensors()
    path = tmp_path / "a.safetensors"
    record = write_tensors(path, [source(name, tensor) for name, tensor in tensors.items()])
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert record.tensors == {name: digest_tensor(tensor) for name, tensor in tensors.items()}
    assert (record.name, record.bytes, record.sha256) == (path.name, path.stat().st_size, sha256_file(path))
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_every_value_is_aligned(tmp_path: Path) -> None:
    tensors = {"half": torch.ones(3, dtype=torch.bfloat16), "double": torch.ones(3, dtype=torch.float64)}
    path = tmp_path / "a.safetensors"
    write_tensors(path, [source(name, tensor) for name, tensor in tensors.items()])
    with SafetensorsFile.open(path) as file:
        assert len(file.header) % 8 == 0
        assert all(info.offset % stream.ITEM_BYTES[info.dtype] == 0 for info in file.tensors.values())


def test_what_the_library_writes_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "BUFFER_BYTES", 64)
    tensors = random_tensors()
    path = tmp_path / "a.safetensors"
    save_file(tensors, path)
    with SafetensorsFile.open(path) as file:
        for name, tensor in tensors.items():
            pieces = list(file.read_pieces(name))
            assert len(pieces) == -(-tensor.nbytes // 64)
            assert b"".join(pieces) == bytes(tensor_bytes(tensor))
        whole = b"".join(piece for name in file.tensors for piece in file.read_pieces(name))
        assert file.header + whole == path.read_bytes()


def make_file(path: Path, header: Any, data_bytes: int = 8) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(data_bytes))
    return path


def entry(begin: Any, end: Any, shape: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


MALFORMED = {
    "truncated data": {"a": entry(0, 16, [4])},
    "bytes of no tensor": {"a": entry(0, 4, [1])},
    "gap": {"a": entry(0, 2, [1], "F16"), "b": entry(4, 8, [1])},
    "overlap": {"a": entry(0, 8, [2]), "b": entry(4, 8, [1])},
    "unknown dtype": {"a": entry(0, 8, [2], "F33")},
    "size against shape": {"a": entry(0, 8, [3])},
    "negative offset": {"a": entry(-8, 0, [2])},
    "negative shape": {"a": entry(0, 8, [-1, -2])},
    "true as a size": {"a": entry(0, True, [1], "U8")},
    "shape of text": {"a": entry(0, 8, "2")},
    "no shape": {"a": {"dtype": "F32", "data_offsets": [0, 8]}},
    "entry that is a list": {"a": [0, 8]},
    "list": [1, 2],
    "not JSON": b"{not JSON",
    "not UTF-8": b'{"\xff": 1}',
    "two of one name": b'{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]},"a":{}}',
    "nested without end": b"[" * 100_000,
}


@pytest.mark.parametrize("fault", MALFORMED)
def test_a_malformed_file_is_refused_by_name(fault: str, tmp_path: Path, refused: Refused) -> None:
    path = make_file(tmp_path / "bad.safetensors", MALFORMED[fault])
    with refused(path), SafetensorsFile.open(path):
        pass


@pytest.mark.parametrize("kept_bytes", [0, 5, 8, 100, -1])
def test_a_truncated_file_is_refused_by_name(kept_bytes: int, tmp_path: Path, refused: Refused) -> None:
    path = tmp_path / "short.safetensors"
    save_file(random_tensors(), path)
    path.write_bytes(path.read_bytes()[:kept_bytes])
    with refused(path, "truncated"), SafetensorsFile.open(path):
        pass


def test_a_header_too_long_is_refused_before_it_is_read(tmp_path: Path, refused: Refused) -> None:
    path = tmp_path / "long.safetensors"
    with path.open("wb") as file:
        file.write((stream.HEADER_LIMIT_BYTES + 1).to_bytes(8, "little"))
        file.truncate(stream.HEADER_LIMIT_BYTES + 100)
    with refused(path, "header of 100000001 bytes"), SafetensorsFile.open(path):
        pass


def test_a_missing_file_and_a_directory_are_refused(tmp_path: Path, refused: Refused) -> None:
    for path in (tmp_path / "absent.safetensors", tmp_path):
        with refused(path), SafetensorsFile.open(path):
            pass


def test_a_file_cut_short_while_open_is_refused(tmp_path: Path, refused: Refused) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(1 << 16)}, path)
    with SafetensorsFile.open(path) as file:
        with path.open("r+b") as other:
            other.truncate(1000)
        with refused(path, "cut short"):
            list(file.read_pieces("a"))


def test_a_name_in_two_files_is_refused(tmp_path: Path, refused: Refused) -> None:
    for name in ("x.safetensors", "y.safetensors"):
        save_file({"same": torch.ones(2)}, tmp_path / name)
    paths = [tmp_path / "x.safetensors", tmp_path / "y.safetensors"]
    with refused("'same'", *paths), open_tensors(paths):
        pass


def test_a_tensor_that_is_skipped_or_repeated_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, path)
    with open_tensors([path]) as tensors:
        tensors.read_bytes("a")
        with pytest.raises(AssertionError, match="b was read 0 times"):
            tensors.assert_each_read_once()
        tensors.read_bytes("b")
        tensors.assert_each_read_once()
        tensors.read_bytes("a")
        with pytest.raises(AssertionError, match="a was read 2 times"):
            tensors.assert_each_read_once()


def test_a_target_that_would_be_written_twice_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="a would be written twice"):
        write_tensors(tmp_path / "a.safetensors", [source("a", torch.ones(2)), source("a", torch.ones(3))])


@pytest.mark.parametrize("dtype", FLOATS)
def test_finiteness_agrees_with_torch(dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    finite = [0.0, -0.0, 1.0, limits.max, limits.min, limits.tiny, limits.smallest_normal]
    for value in finite:
        assert all_finite(tensor_bytes(torch.tensor([value], dtype=dtype)), dtype_name(torch.ones(1, dtype=dtype)))
    count = 2 * stream._CHECK_VALUES + 3
    for value in (float("nan"), float("inf"), float("-inf")):
        for place in (0, stream._CHECK_VALUES, count - 1):
            tensor = torch.zeros(count, dtype=dtype)
            tensor[place] = value
            assert not all_finite(tensor_bytes(tensor), dtype_name(tensor))


def test_every_bit_pattern_of_16_bits_is_judged_as_torch_does() -> None:
    patterns = np.arange(1 << 16, dtype=np.uint16)
    for dtype in (torch.bfloat16, torch.float16):
        values = torch.from_numpy(patterns.view(np.int16)).view(dtype)
        finite = torch.isfinite(values).numpy()
        assert all_finite(patterns[finite].tobytes(), dtype_name(values))
        assert not any(all_finite(pattern.tobytes(), dtype_name(values)) for pattern in patterns[~finite])


def test_nan_is_refused_and_its_origin_named(tmp_path: Path, refused: Refused) -> None:
    tensor = torch.ones(9)
    tensor[4] = float("nan")
    with refused("the weights", "NaN"):
        write_tensors(tmp_path / "a.safetensors", [source("weights", tensor)])


def test_memory_does_not_grow_with_the_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "BUFFER_BYTES", 1 << 16)
    num_bytes = 16 << 20

    def zeros() -> Iterator[bytes]:
        for _ in range(num_bytes >> 16):
            yield bytes(1 << 16)

    path, copy = tmp_path / "big.safetensors", tmp_path / "copy.safetensors"
    tracemalloc.start()
    try:
        first = write_tensors(path, [TensorSource("big", "BF16", (num_bytes // 2,), zeros, "zeros")])
        with SafetensorsFile.open(path) as file:
            read = partial(file.read_pieces, "big")
            second = write_tensors(copy, [TensorSource("big", "BF16", (num_bytes // 2,), read, "big")])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert first.sha256 == second.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert peak < 1 << 20
