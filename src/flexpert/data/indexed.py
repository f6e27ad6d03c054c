"""Megatron's indexed dataset: `NAME.bin` holds token ids end to end, `NAME.idx` where each document lies.

The format is `megatron.core.datasets.indexed_dataset`'s, byte for byte, and the tests read and write each other's
files. It is read here directly because importing megatron-core costs five seconds in every process.

    .idx: b"MMIDIDX\\0\\0" | u64 version=1 | u8 dtype code | u64 sequences | u64 documents+1
          | i32 lengths[sequences] | i64 byte offsets[sequences] | i64 document boundaries[documents+1]
"""

import struct
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flexpert.errors import UserError
from flexpert.records import read_record

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<QBQQ")
DTYPES: dict[int, type[np.integer]] = {
    1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16,
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}
#: Tokens of a raw file that are searched for document ends at a time.
SEARCH_TOKENS = 1 << 24


def token_dtype(vocab_size: int) -> type[np.integer]:
    """The id type that Megatron chooses for a vocabulary."""
    return np.uint16 if vocab_size < 65500 else np.int32


def file_of(prefix: Path, end: str) -> Path:
    """`prefix` with `.bin` or `.idx` added, as Megatron does it: a prefix may hold a dot."""
    return prefix.with_name(prefix.name + end)


class IndexedWriter:
    """Write documents one after another; the index is written when the block ends without an error."""

    def __init__(self, prefix: Path, dtype: type[np.integer]) -> None:
        self.prefix, self.dtype = prefix, dtype
        self.lengths: list[NDArray[np.int32]] = []
        self.file = file_of(prefix, ".bin").open("wb")

    def __enter__(self) -> "IndexedWriter":
        return self

    def add(self, tokens: list[int]) -> None:
        """Append one document."""
        self.extend(np.asarray(tokens, dtype=self.dtype), np.asarray([len(tokens)], np.int32))

    def extend(self, tokens: NDArray[np.integer], lengths: NDArray[np.int32]) -> None:
        """Append documents of these lengths, whose tokens lie end to end."""
        assert len(tokens) == lengths.sum()
        self.file.write(tokens.astype(self.dtype, copy=False).tobytes())
        self.lengths.append(lengths)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()
        if kind is not None:
            return
        lengths = np.concatenate([np.zeros(0, np.int32), *self.lengths])
        ends = np.cumsum(lengths, dtype=np.int64) * np.dtype(self.dtype).itemsize
        offsets = np.concatenate([np.zeros(1, np.int64), ends])[:-1]
        with file_of(self.prefix, ".idx").open("wb") as file:
            file.write(MAGIC + HEADER.pack(1, CODES[self.dtype], len(lengths), len(lengths) + 1))
            file.write(lengths.tobytes() + offsets.tobytes())
            file.write(np.arange(len(lengths) + 1, dtype=np.int64).tobytes())


class TokenFile:
    """Tokens of one file, memory-mapped, and where its documents lie.

    Attributes:
        tokens: all ids end to end.
        lengths: tokens of each document, int64.
        starts: first token of each document, int64.
        mask: 0 for each token that carries no loss as a target, else 1; None: all do.
    """

    tokens: NDArray[np.integer]
    lengths: NDArray[np.int64]
    starts: NDArray[np.int64]
    mask: NDArray[np.uint8] | None = None


class IndexedFile(TokenFile):
    """Megatron's `PREFIX.bin` and `PREFIX.idx`, and `PREFIX.mask.bin` where there is one.

    Raises:
        UserError: a file is missing, is not an indexed dataset, or the files disagree about their size.
    """

    def __init__(self, prefix: Path) -> None:
        index, data = file_of(prefix, ".idx"), file_of(prefix, ".bin")
        for path in (index, data):
            if not path.is_file():
                raise UserError(f"{path} does not exist: write it with `flexpert prepare`")
        content = index.read_bytes()
        start = len(MAGIC) + HEADER.size
        if content[: len(MAGIC)] != MAGIC or len(content) < start:
            raise UserError(f"{index} is not the index of a Megatron indexed dataset")
        version, code, sequences, boundaries = HEADER.unpack_from(content, len(MAGIC))
        if version != 1 or code not in DTYPES or len(content) < start + 12 * sequences + 8 * boundaries:
            raise UserError(f"{index} is damaged or of an unknown version")
        sequence_lengths = np.frombuffer(content, np.int32, sequences, start).astype(np.int64)
        document_ends = np.frombuffer(content, np.int64, boundaries, start + 12 * sequences)
        edges = np.concatenate([np.zeros(1, np.int64), document_ends, np.full(1, sequences)])
        if sequence_lengths.min(initial=0) < 0 or np.diff(edges).min() < 0:
            raise UserError(f"{index} is damaged: its documents are not in order")
        token_ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(sequence_lengths)])
        self.lengths = np.diff(token_ends[document_ends])
        self.starts = token_ends[document_ends][:-1]
        dtype = np.dtype(DTYPES[code])
        if data.stat().st_size != int(sequence_lengths.sum()) * dtype.itemsize:
            raise UserError(f"{data} does not have the size that {index.name} says: one of them is cut or replaced")
        self.tokens = map_file(data, dtype)
        mask = file_of(prefix, ".mask.bin")
        if mask.is_file():
            if mask.stat().st_size != len(self.tokens):
                raise UserError(f"{mask} does not have a byte for each token of {data.name}: one of them is replaced")
            self.mask = map_file(mask, np.dtype(np.uint8))


class RawFile(TokenFile):
    """Ids end to end and nothing else, as OLMo's `.npy` memory maps are, or after the header of a real `.npy` file.

    Args:
        path: the file.
        dtype: type of its ids.
        offset: bytes before the first id.
        eos_id: what ends a document; the file is searched for it when its documents are first asked for.
        num_bytes: size that the file had when it was made part of a data set.

    Raises:
        UserError: the file is missing or has another size.
    """

    def __init__(self, path: Path, dtype: np.dtype[np.integer], offset: int, eos_id: int, num_bytes: int) -> None:
        if not path.is_file():
            raise UserError(f"{path} does not exist any more: put it back, or prepare the data set again")
        if path.stat().st_size != num_bytes:
            raise UserError(
                f"{path} had {num_bytes:,} bytes and has {path.stat().st_size:,}: prepare the data set again"
            )
        self.tokens, self.eos_id = map_file(path, dtype, offset), eos_id

    @cached_property
    def ends(self) -> NDArray[np.int64]:
        """One past the last token of each document; what follows the last end-of-text token is a document too."""
        pieces = [np.zeros(0, np.int64)]
        for start in range(0, len(self.tokens), SEARCH_TOKENS):
            pieces.append(np.flatnonzero(self.tokens[start : start + SEARCH_TOKENS] == self.eos_id) + start + 1)
        ends = np.concatenate(pieces)
        rest = [] if ends[-1:].sum() == len(self.tokens) else [len(self.tokens)]
        return np.concatenate([ends, np.asarray(rest, np.int64)])

    @cached_property
    def starts(self) -> NDArray[np.int64]:  # type: ignore[override]
        return np.concatenate([np.zeros(1, np.int64), self.ends[:-1]])

    @cached_property
    def lengths(self) -> NDArray[np.int64]:  # type: ignore[override]
        return self.ends - self.starts


def map_file(path: Path, dtype: np.dtype[Any], offset: int = 0) -> NDArray[Any]:
    """A memory map, or an empty array for an empty file, which cannot be mapped."""
    return np.memmap(path, dtype, "r", offset) if path.stat().st_size > offset else np.zeros(0, dtype)


def open_parts(prefix: Path) -> list[TokenFile]:
    """The files of a split: `PREFIX.{bin,idx}`, or those that the manifest beside it lists.

    Raises:
        UserError: as `IndexedFile` and `RawFile`.
    """
    directory, manifest = prefix.parent, prefix.parent / "manifest.json"
    if not manifest.is_file() or file_of(prefix, ".idx").is_file():
        return [IndexedFile(prefix)]
    record = read_record(manifest, "flexpert.data")
    parts = record["splits"].get(prefix.name, {}).get("parts")
    if parts is None:
        return [IndexedFile(prefix)]
    return [
        IndexedFile(directory / part["prefix"])
        if "prefix" in part
        else RawFile(Path(part["file"]), np.dtype(part["dtype"]), part["offset"], record["eos_id"], part["bytes"])
        for part in parts
    ]


class IndexedTokens:
    """The documents of one split of a data set, whose directory and name `prefix` is: of one file or of several.

    Raises:
        UserError: as `open_parts`.
    """

    def __init__(self, prefix: Path) -> None:
        self.parts = open_parts(prefix)

    @property
    def num_tokens(self) -> int:
        return sum(len(part.tokens) for part in self.parts)

    @property
    def tokens(self) -> NDArray[np.integer]:
        """All ids end to end, a memory map; only where they are in one file."""
        (part,) = self.parts
        return part.tokens

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document."""
        return np.concatenate([np.zeros(0, np.int64), *(part.lengths for part in self.parts)])

    @cached_property
    def _first_documents(self) -> NDArray[np.int64]:
        return np.cumsum([0, *(len(part.lengths) for part in self.parts)])

    def __len__(self) -> int:
        return int(self._first_documents[-1])

    def document(self, index: int) -> NDArray[np.int64]:
        """Ids of one document, its end-of-text token included."""
        number = int(np.searchsorted(self._first_documents, index, "right")) - 1
        part, place = self.parts[number], index - int(self._first_documents[number])
        start = int(part.starts[place])
        return part.tokens[start : start + int(part.lengths[place])].astype(np.int64)
