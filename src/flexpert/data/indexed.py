"""Megatron's indexed dataset: `NAME.bin` holds token ids end to end, `NAME.idx` where each document lies.

The format is `megatron.core.datasets.indexed_dataset`'s, byte for byte, and the tests read and write each other's
files. It is read here directly because importing megatron-core costs five seconds in every process.

    .idx: b"MMIDIDX\\0\\0" | u64 version=1 | u8 dtype code | u64 sequences | u64 documents+1
          | i32 lengths[sequences] | i64 byte offsets[sequences] | i64 document boundaries[documents+1]
"""

import struct
from bisect import bisect_right
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
#: Entries of an index that are checked at a time.
CHECKED_AT_A_TIME = 1 << 18


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
    """Tokens of one file, memory-mapped, and where its documents lie, which is looked for when it is asked for.

    Attributes:
        tokens: all ids end to end.
        mask: 0 for each token that carries no loss as a target, else 1; None: all do.
    """

    tokens: NDArray[np.integer]
    mask: NDArray[np.uint8] | None = None

    @property
    def num_documents(self) -> int:
        raise NotImplementedError

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document."""
        raise NotImplementedError

    def span(self, index: int) -> tuple[int, int]:
        """First token of a document, and one past its last."""
        raise NotImplementedError


class IndexedFile(TokenFile):
    """Megatron's `PREFIX.bin` and `PREFIX.idx`, and `PREFIX.mask.bin` where there is one.

    To open it costs the same for any number of documents: the index is mapped, and only its last entry is compared.

    Raises:
        UserError: a file is missing, is not an indexed dataset, or the files disagree about their size; where the
            documents are asked for, they are not in order.
    """

    def __init__(self, prefix: Path) -> None:
        index, data = file_of(prefix, ".idx"), file_of(prefix, ".bin")
        for path in (index, data):
            if not path.is_file():
                raise UserError(f"{path} does not exist: write it with `flexpert prepare`")
        self.index, content = index, map_file(index, np.dtype(np.uint8))
        start = len(MAGIC) + HEADER.size
        head = content[:start].tobytes()
        if len(head) < start or not head.startswith(MAGIC):
            raise UserError(f"{index} is not the index of a Megatron indexed dataset")
        version, code, sequences, boundaries = HEADER.unpack_from(head, len(MAGIC))
        if version != 1 or code not in DTYPES or len(content) < start + 12 * sequences + 8 * boundaries:
            raise UserError(f"{index} is damaged or of an unknown version")
        self.sequence_lengths = np.frombuffer(content, np.int32, sequences, start)
        self.offsets = np.frombuffer(content, np.int64, sequences, start + 4 * sequences)
        self.boundaries = np.frombuffer(content, np.int64, boundaries, start + 12 * sequences)
        dtype = np.dtype(DTYPES[code])
        last = self.sequence_lengths[-1:].sum(dtype=np.int64) * dtype.itemsize
        if data.stat().st_size != self.offsets[-1:].sum() + last:
            raise UserError(f"{data} does not have the size that {index.name} says: one of them is cut or replaced")
        self.tokens = map_file(data, dtype)
        mask = file_of(prefix, ".mask.bin")
        if mask.is_file():
            if mask.stat().st_size != len(self.tokens):
                raise UserError(f"{mask} does not have a byte for each token of {data.name}: one of them is replaced")
            self.mask = map_file(mask, np.dtype(np.uint8))

    @property
    def num_documents(self) -> int:
        return max(0, len(self.boundaries) - 1)

    def check_order(self) -> None:
        """Raises `UserError` unless every sequence begins where the one before ends, and so every document."""
        num_sequences, size = len(self.sequence_lengths), self.tokens.itemsize
        in_order = self.boundaries[:1].sum() >= 0 and self.boundaries[-1:].sum() <= num_sequences
        for start in range(0, max(num_sequences, len(self.boundaries)), CHECKED_AT_A_TIME):
            some = slice(start, start + CHECKED_AT_A_TIME + 1)
            steps = np.diff(self.offsets[some])
            lengths, boundaries = self.sequence_lengths[some], self.boundaries[some]
            in_order &= bool((lengths >= 0).all() and (np.diff(boundaries) >= 0).all())
            in_order &= bool((steps == lengths[: len(steps)].astype(np.int64) * size).all())
        if not (in_order and self.offsets[:1].sum() == 0):
            raise self.damaged()

    def damaged(self) -> UserError:
        return UserError(f"{self.index} is damaged: its documents are not in order")

    def first_tokens(self, sequences: NDArray[np.int64]) -> NDArray[np.int64]:
        """First token of each sequence; of the one after the last, where the tokens end."""
        result = np.full(len(sequences), len(self.tokens), np.int64)
        inside = sequences < len(self.offsets)
        result[inside] = self.offsets[sequences[inside]] // self.tokens.itemsize
        return result

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        self.check_order()
        result = np.empty(self.num_documents, np.int64)
        for start in range(0, len(result), CHECKED_AT_A_TIME):
            some = slice(start, start + CHECKED_AT_A_TIME)
            result[some] = np.diff(self.first_tokens(self.boundaries[start : some.stop + 1]))
        return result

    def span(self, index: int) -> tuple[int, int]:
        first, last = self.boundaries[index : index + 2].tolist()
        if not 0 <= first <= last <= len(self.offsets):
            raise self.damaged()
        start, end = self.first_tokens(np.asarray([first, last])).tolist()
        if not 0 <= start <= end <= len(self.tokens):
            raise self.damaged()
        return start, end

    def document_of(self, token: int) -> int:
        return bisect_right(range(self.num_documents), token, key=lambda index: self.span(index)[0]) - 1


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

    @property
    def num_documents(self) -> int:
        return len(self.ends)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.ends, prepend=0)

    def span(self, index: int) -> tuple[int, int]:
        return int(self.ends[index - 1]) if index else 0, int(self.ends[index])


def end_of_document(tokens: NDArray[np.integer], eos_id: int, start: int, stop: int) -> int:
    """One past the first end-of-text token in [start, stop), or `stop`; it reads no further than it must."""
    stop, size = min(stop, len(tokens)), 1 << 12
    while start < stop:
        found = np.flatnonzero(tokens[start : min(start + size, stop)] == eos_id)
        if len(found):
            return start + int(found[0]) + 1
        start, size = start + size, min(2 * size, SEARCH_TOKENS)
    return stop


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

    @property
    def eos_id(self) -> int:
        """What ends a document; only where there are raw files."""
        return next(part.eos_id for part in self.parts if isinstance(part, RawFile))

    @cached_property
    def _first_documents(self) -> NDArray[np.int64]:
        return np.cumsum([0, *(part.num_documents for part in self.parts)])

    def __len__(self) -> int:
        return int(self._first_documents[-1])

    def document(self, index: int, max_tokens: int | None = None) -> NDArray[np.int64]:
        """Ids of one document, its end-of-text token included, or the first `max_tokens` of them."""
        number = int(np.searchsorted(self._first_documents, index, "right")) - 1
        part, place = self.parts[number], index - int(self._first_documents[number])
        start, end = part.span(place)
        return part.tokens[start : end if max_tokens is None else min(end, start + max_tokens)].astype(np.int64)

    def document_from(self, number: int, start: int, max_tokens: int) -> NDArray[np.int64]:
        """Up to `max_tokens` ids of the document that begins at this token of this part; see `sample_starts`."""
        tokens = self.parts[number].tokens
        return tokens[start : end_of_document(tokens, self.eos_id, start, start + max_tokens)].astype(np.int64)

    def sample_starts(self, count: int) -> list[tuple[int, int]] | None:
        """Up to `count` documents that begin after evenly spaced tokens, each as (number of its part, first token).

        None where the documents are known without a long search, and can be counted instead. Documents are as likely
        as the one before them is long, which for a shuffled data set is all alike.
        """
        if sum(len(part.tokens) for part in self.parts if isinstance(part, RawFile)) <= SEARCH_TOKENS:
            return None
        first_tokens = np.cumsum([0, *(len(part.tokens) for part in self.parts)])
        positions = np.linspace(0, self.num_tokens, count, endpoint=False).astype(np.int64)
        found = []
        for number, part in enumerate(self.parts):
            first, last = first_tokens[number : number + 2]
            start = -1
            for position in (positions[(positions >= first) & (positions < last)] - first).tolist():
                if position > start:  # otherwise it lies before the document that was found last
                    start = end_of_document(part.tokens, self.eos_id, position - 1, last - first) if position else 0
                    if start < last - first:
                        found.append((number, start))
        return found
