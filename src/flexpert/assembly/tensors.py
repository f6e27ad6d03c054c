"""Safetensors files read and written as streams.

A file is the length of its header (8 bytes, little-endian), a JSON header that gives every tensor's dtype, shape and
offsets, and the tensors' bytes one after the other (https://github.com/huggingface/safetensors#format). Tensors pass
through here in pieces of at most `BUFFER_BYTES`, so peak memory does not depend on the size of the model, and what is
written is hashed and checked on the way: there is no gap between checking and copying. Hashing matters because the
safetensors library loads a flipped byte without a word; it refuses only truncation.
"""

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any, BinaryIO, Self

import numpy as np

from flexpert.errors import UserError
from flexpert.fields import FileEntry, plain_name
from flexpert.records import read_json

#: A tensor is read in pieces of this many bytes. Divides by every item size, so that no piece splits a value.
BUFFER_BYTES = 16 << 20
#: Which file of a Hugging Face directory holds which tensor, where there are several.
INDEX_FILE = "model.safetensors.index.json"
#: The safetensors library refuses longer headers; so do we, before reading them.
HEADER_LIMIT_BYTES = 100_000_000

ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip

#: For each dtype that weights may have: the unsigned type of its raw bits and the mask of its exponent. A value is
#: NaN or infinite exactly when all the bits of its exponent are set (IEEE 754; bfloat16 is the upper half of float32).
EXPONENT_BITS = {
    "BF16": ("<u2", 0x7F80),
    "F16": ("<u2", 0x7C00),
    "F32": ("<u4", 0x7F80_0000),
    "F64": ("<u8", 0x7FF0_0000_0000_0000),
}
#: Values checked at a time: small enough that the masked copy stays in the cache.
_CHECK_VALUES = 1 << 18

Piece = bytes | memoryview


def all_finite(piece: Piece, dtype: str) -> bool:
    """Whether no value in these raw bytes is NaN or infinite.

    Args:
        piece: whole values, little-endian.
        dtype: a key of `EXPONENT_BITS`.
    """
    bits_type, exponent = EXPONENT_BITS[dtype]
    bits = np.frombuffer(piece, dtype=bits_type)
    blocks = (bits[start : start + _CHECK_VALUES] for start in range(0, len(bits), _CHECK_VALUES))
    return all(int(np.max(block & exponent)) != exponent for block in blocks)


@dataclass(frozen=True)
class TensorInfo:
    """Where a file keeps a tensor: `num_bytes` bytes from `offset`, counted from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class TensorDigest:
    """What identifies a tensor's content: its dtype (safetensors' name), its shape, the SHA-256 of its bytes."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    def to_json(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "shape": list(self.shape), "sha256": self.sha256}


class SafetensorsFile:
    """One open safetensors file with a valid header.

    Attributes:
        path: the file.
        header: its first bytes, up to where the tensors' bytes begin.
        tensors: name → where it is, in the order of the file. They fill the rest of the file without gap or overlap,
            so `header` followed by every tensor in this order is the whole file.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self._file = file
        self.header, self.tensors = _read_header(file, path)

    @classmethod
    @contextmanager
    def open(cls, path: Path) -> Iterator[Self]:
        """Open a file, with its header checked, for the length of a `with` block.

        Raises:
            UserError: the file is missing, truncated or malformed.
        """
        # Asked first, because opening a named pipe would wait for ever.
        if not path.is_file() or not os.access(path, os.R_OK):
            raise UserError(f"{path} does not exist or is not a readable file; fetch it again")
        with path.open("rb") as file:
            yield cls(path, file)

    def read_pieces(self, name: str) -> Iterator[bytes]:
        """Yield a tensor's bytes in order, in pieces of whole values of at most `BUFFER_BYTES`.

        Threads may read different tensors of one file at the same time.

        Raises:
            UserError: the file cannot be read, or has become shorter since it was opened.
        """
        info = self.tensors[name]
        end = info.offset + info.num_bytes
        for position in range(info.offset, end, BUFFER_BYTES):
            yield self._read(position, min(BUFFER_BYTES, end - position))

    def _read(self, position: int, num_bytes: int) -> bytes:
        descriptor, piece = self._file.fileno(), b""
        # The disk fetches the next piece while this one is hashed.
        _advise(descriptor, position + num_bytes, BUFFER_BYTES, "POSIX_FADV_WILLNEED")
        while len(piece) < num_bytes:  # a read that meets a bad sector ends before it; the next one says why
            try:
                part = os.pread(descriptor, num_bytes - len(piece), position + len(piece))
            except OSError as error:
                raise UserError(f"{self.path} cannot be read ({error.strerror}); fetch it again") from None
            if not part:
                raise UserError(f"{self.path} was cut short while it was read; fetch it again")
            piece = piece + part if piece else part
        return piece


def _advise(descriptor: int, position: int, num_bytes: int, advice: str) -> None:
    """Tell the page cache what comes, where the system has a way to."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, position, num_bytes, getattr(os, advice))


def _read_header(file: BinaryIO, path: Path) -> tuple[bytes, dict[str, TensorInfo]]:
    file_bytes = os.fstat(file.fileno()).st_size
    prefix = file.read(8)
    header_bytes = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or header_bytes > file_bytes - 8:
        raise UserError(f"{path} is truncated or not a safetensors file; fetch it again")
    if header_bytes > HEADER_LIMIT_BYTES:
        raise UserError(f"{path} has a header of {header_bytes} bytes; safetensors allows {HEADER_LIMIT_BYTES}")
    header = file.read(header_bytes)
    return prefix + header, _parse_header(header, 8 + header_bytes, file_bytes, path)


def _parse_header(header: bytes, start: int, file_bytes: int, path: Path) -> dict[str, TensorInfo]:
    """The tensors that a header describes, in the order of their offsets.

    Args:
        header: the JSON text, without the 8 bytes of its length.
        start: where the tensors' bytes begin in the file.
        file_bytes: size of the file.
        path: the file, for errors.
    """
    try:
        fields = json.loads(header.decode(), object_pairs_hook=_object_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} has a header that is not valid JSON ({error}); fetch it again") from None
    if not isinstance(fields, dict):
        raise UserError(f"{path} has a header that is not a JSON object; fetch it again")
    fields.pop("__metadata__", None)
    tensors = {name: _tensor_info(name, field, start, path) for name, field in fields.items()}
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].num_bytes)))
    position = start
    for name, info in tensors.items():
        if info.offset != position:
            fault = "overlaps the tensor before it" if info.offset < position else "leaves a gap before it"
            raise UserError(f"{path}: the tensor {name!r} {fault}; write the file again")
        position += info.num_bytes
    if position > file_bytes:
        raise UserError(f"{path} is truncated: {position} bytes are described, {file_bytes} are there; fetch it again")
    if position < file_bytes:
        raise UserError(f"{path} holds {file_bytes - position} bytes that belong to no tensor; write the file again")
    return tensors


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Two readers could disagree on which of two equal names counts.
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a name occurs twice")
    return value


def _tensor_info(name: str, field: Any, start: int, path: Path) -> TensorInfo:
    match field:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [begin, end]}:
            if dtype not in ITEM_BYTES:
                raise UserError(f"{path}: the tensor {name!r} has the dtype {dtype!r}, which is not known here")
            # `type` and not `isinstance`: JSON's true is an int to Python.
            if all(type(number) is int and number >= 0 for number in [*shape, begin, end]):
                num_bytes = math.prod(shape) * ITEM_BYTES[dtype]
                if end - begin == num_bytes:
                    return TensorInfo(dtype, tuple(shape), start + begin, num_bytes)
    raise UserError(f"{path}: the header's entry of the tensor {name!r} is malformed; write the file again")


class TensorSet:
    """The tensors of one or several open files under one namespace.

    Attributes:
        files: the open files.
        tensors: name → where its file keeps it.
    """

    def __init__(self, files: list[SafetensorsFile]) -> None:
        self.files = files
        self.tensors: dict[str, TensorInfo] = {}
        self._home: dict[str, SafetensorsFile] = {}
        self._num_reads: Counter[str] = Counter()
        for file in files:
            for name, info in file.tensors.items():
                if name in self.tensors:
                    raise UserError(f"the tensor {name!r} is in {self._home[name].path} and in {file.path}; keep one")
                self.tensors[name] = info
                self._home[name] = file

    def path_of(self, name: str) -> Path:
        return self._home[name].path

    def read_pieces(self, name: str) -> Iterator[bytes]:
        """As `SafetensorsFile.read_pieces`; the read is counted."""
        self._num_reads[name] += 1
        return self._home[name].read_pieces(name)

    def read_bytes(self, name: str) -> bytes:
        """A small tensor's bytes as one piece."""
        return b"".join(self.read_pieces(name))

    def source(self, name: str, target: str) -> "TensorSource":
        """A tensor of this set, to be written under the name `target`."""
        info = self.tensors[name]
        origin = f"{self.path_of(name)}: the tensor {name!r}"
        return TensorSource(target, info.dtype, info.shape, lambda: self.read_pieces(name), origin)

    def assert_each_read_once(self) -> None:
        """Converters that skip or repeat a tensor do so silently; this one counts."""
        for name in self.tensors:
            assert self._num_reads[name] == 1, f"{self.path_of(name)}: {name} was read {self._num_reads[name]} times"


@contextmanager
def open_tensors(paths: Iterable[Path]) -> Iterator[TensorSet]:
    """Open several files as one set.

    Raises:
        UserError: as `SafetensorsFile.open`, or two files hold a tensor of the same name.
    """
    with ExitStack() as opened:
        yield TensorSet([opened.enter_context(SafetensorsFile.open(path)) for path in paths])


@contextmanager
def open_model(directory: Path) -> Iterator[TensorSet]:
    """Open the weights of a Hugging Face directory: `model.safetensors`, or the shards that its index lists.

    Raises:
        UserError: the directory or its weights are missing, or the index and the shards disagree on any tensor.
    """
    single, index = directory / "model.safetensors", directory / INDEX_FILE
    if not directory.is_dir():
        raise UserError(f"{directory} does not exist or is not a directory; give the directory of a model")
    if single.exists() and index.exists():
        raise UserError(f"{directory} holds both {single.name} and {index.name}; remove the one that is not meant")
    if not single.exists() and not index.exists():
        raise UserError(f"{directory} holds neither {single.name} nor {index.name}; save the model as safetensors")
    if single.exists():
        with open_tensors([single]) as tensors:
            yield tensors
        return
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise UserError(f"{index} has no weight_map from tensor to file; save the model again")
    shards = sorted({plain_name(shard, index) for shard in weight_map.values()})
    with open_tensors([directory / shard for shard in shards]) as tensors:
        for name, shard in weight_map.items():
            if name not in tensors.tensors or tensors.path_of(name).name != shard:
                raise UserError(f"{index} lists the tensor {name!r} in {shard}, which does not hold it; save it again")
        for name in tensors.tensors:
            if name not in weight_map:
                raise UserError(f"{tensors.path_of(name)} holds the tensor {name!r}, which {index} does not list")
        yield tensors


@dataclass(frozen=True)
class TensorSource:
    """A tensor to write.

    Attributes:
        name: its name in the file that is written.
        dtype: a key of `EXPONENT_BITS`.
        shape: its shape.
        pieces: called once, when its turn comes; yields its bytes in pieces of whole values.
        origin: where it comes from, for errors.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[Piece]]
    origin: str

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class FileRecord(FileEntry):
    """A safetensors file that was written: its entry, and what its tensors hold, in the order of the file."""

    tensors: Mapping[str, TensorDigest]

    @property
    def entry(self) -> FileEntry:
        return FileEntry(self.name, self.bytes, self.sha256)


class Stopped(Exception):
    """Writing was given up because something else failed."""


def write_tensors(path: Path, sources: Iterable[TensorSource], stop: Event | None = None) -> FileRecord:
    """Write a new safetensors file, one source at a time, hashing the bytes that are written; it is then on the disk.

    The same sources in the same order give the same bytes. Tensors are laid out as they come, except that wider dtypes
    go first, as the safetensors library does: every value is then aligned.

    Args:
        path: must not exist yet.
        sources: what to write.
        stop: looked at before each piece.

    Raises:
        UserError: a tensor holds NaN or infinity; the message gives its origin.
        OSError: the file cannot be written.
        Stopped: `stop` was set.
    """
    ordered = sorted(sources, key=lambda source: -ITEM_BYTES[source.dtype])
    header = make_header(ordered)
    file_hash, file_bytes = hashlib.sha256(header), len(header)
    tensors: dict[str, TensorDigest] = {}
    # The two hashes are most of the work, so the file's has a thread to itself.
    with ThreadPoolExecutor(1) as beside, path.open("xb") as file:
        file.write(header)
        for source in ordered:
            tensor_hash, tensor_bytes = hashlib.sha256(), 0
            for piece in source.pieces():
                if stop is not None and stop.is_set():
                    raise Stopped
                hashed = beside.submit(file_hash.update, piece)
                if not all_finite(piece, source.dtype):
                    raise UserError(f"{source.origin} holds NaN or infinity; use a checkpoint from before it diverged")
                file.write(piece)
                # Starts the transfer to the disk now, so that `fsync` finds little left to wait for.
                _advise(file.fileno(), file_bytes + tensor_bytes, len(piece), "POSIX_FADV_DONTNEED")
                tensor_hash.update(piece)
                tensor_bytes += len(piece)
                hashed.result()
            digest = TensorDigest(source.dtype, source.shape, tensor_hash.hexdigest())
            assert tensor_bytes == digest.num_bytes, f"{source.origin} gave {tensor_bytes} bytes for {source.shape}"
            tensors[source.name] = digest
            file_bytes += tensor_bytes
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(path.name, file_bytes, file_hash.hexdigest(), tensors)


def make_header(sources: Iterable[TensorSource]) -> bytes:
    """The first bytes of a file of these tensors, in this order."""
    # transformers reads only files that say which framework wrote them.
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for source in sources:
        assert source.name not in fields, f"{source.name} would be written twice"
        offsets = [position, position + source.num_bytes]
        fields[source.name] = {"dtype": source.dtype, "shape": list(source.shape), "data_offsets": offsets}
        position += source.num_bytes
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
