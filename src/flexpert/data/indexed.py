"""Megatron's indexed dataset: `NAME.bin` holds token ids end to end, `NAME.idx` where each document lies.

The format is `megatron.core.datasets.indexed_dataset`'s, byte for byte, and the tests read and write each other's
files. It is read here directly because importing megatron-core costs five seconds in every process.

    .idx: b"MMIDIDX\\0\\0" | u64 version=1 | u8 dtype code | u64 sequences | u64 documents+1
          | i32 lengths[sequences] | i64 byte offsets[sequences] | i64 document boundaries[documents+1]
"""

import struct
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from flexpert.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<QBQQ")
DTYPES: dict[int, type[np.integer]] = {
    1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16,
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}


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
        self.lengths: list[int] = []
        self.file = file_of(prefix, ".bin").open("wb")

    def __enter__(self) -> "IndexedWriter":
        return self

    def add(self, tokens: list[int]) -> None:
        """Append one document."""
        self.file.write(np.asarray(tokens, dtype=self.dtype).tobytes())
        self.lengths.append(len(tokens))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()
        if kind is not None:
            return
        lengths = np.asarray(self.lengths, dtype=np.int32)
        ends = np.cumsum(lengths, dtype=np.int64) * np.dtype(self.dtype).itemsize
        offsets = np.concatenate([np.zeros(1, np.int64), ends])[:-1]
        with file_of(self.prefix, ".idx").open("wb") as file:
            file.write(MAGIC + HEADER.pack(1, CODES[self.dtype], len(lengths), len(lengths) + 1))
            file.write(lengths.tobytes() + offsets.tobytes())
            file.write(np.arange(len(lengths) + 1, dtype=np.int64).tobytes())


class IndexedTokens:
    """A memory-mapped data set.

    Attributes:
        tokens: all ids end to end, a memory map.
        lengths: tokens of each document, int64.

    Raises:
        UserError: a file is missing, is not an indexed dataset, or the two files disagree about their size.
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
        self.lengths: NDArray[np.int64] = np.diff(token_ends[document_ends])
        self.starts: NDArray[np.int64] = token_ends[document_ends][:-1]
        dtype = np.dtype(DTYPES[code])
        if data.stat().st_size != int(sequence_lengths.sum()) * dtype.itemsize:
            raise UserError(f"{data} does not have the size that {index.name} says: one of them is cut or replaced")
        self.tokens: NDArray[np.integer] = (
            np.memmap(data, dtype=dtype, mode="r") if data.stat().st_size else np.zeros(0, dtype)
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def document(self, index: int) -> NDArray[np.int64]:
        """Ids of one document, its end-of-text token included."""
        start = int(self.starts[index])
        return self.tokens[start : start + int(self.lengths[index])].astype(np.int64)
