"""Windows over a token stream, in an order that is a function of (seed, step) alone.

Sequence i of a data set is tokens [i·S, (i+1)·S] of its documents laid end to end: S inputs and, one later, S targets.
An epoch visits every sequence once. The order needs no index in memory and no state in a checkpoint: position p of
epoch e is `permuted(p, N, seed, e)`, a Feistel network over [0, N), so it works as well for 10^9 sequences.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flexpert.data.indexed import IndexedFile, IndexedTokens, TokenFile
from flexpert.errors import UserError
from flexpert.records import read_record, sha256_file

FEISTEL_ROUNDS = 6


def permuted(positions: NDArray[np.int64], size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """A pseudo-random permutation of [0, size), evaluated at `positions`.

    A balanced Feistel network over the next power of four, walked until the value falls inside the range (cycle
    walking keeps it a permutation; four steps on average at most).
    """
    half_bits = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half_bits) - 1)
    shift = np.uint64(half_bits)
    digest = hashlib.sha256(f"{seed}/{epoch}/{size}".encode()).digest()
    keys = np.frombuffer(digest + hashlib.sha256(digest).digest(), np.uint64)[:FEISTEL_ROUNDS]
    result = positions.astype(np.uint64)
    todo = np.arange(len(result))
    while len(todo):
        left, right = result[todo] >> shift, result[todo] & mask
        for key in keys:
            mixed = (right + key) * np.uint64(0x9E3779B97F4A7C15)
            mixed ^= mixed >> np.uint64(29)
            mixed = (mixed * np.uint64(0xBF58476D1CE4E5B9)) >> np.uint64(32)
            left, right = right, left ^ (mixed & mask)
        result[todo] = (left << shift) | right
        todo = todo[result[todo] >= size]
    return result.astype(np.int64)


@dataclass(frozen=True)
class DataManifest:
    """What `prepare` recorded about a data set directory."""

    directory: Path
    tokenizer_digest: str
    vocab_size: int
    eos_id: int
    answer_marker: str | None

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest.

        It covers the tokens as they were when it was written: by the hashes of the files that `prepare` wrote; by path,
        size and the hash of a sample of those that others made, which may be too large to be read.
        """
        return sha256_file(self.directory / "manifest.json")

    @property
    def tokenizer_dir(self) -> Path:
        return self.directory / "tokenizer"


def read_manifest(directory: Path) -> DataManifest:
    """Raises `UserError` when the directory is not a data set."""
    if not (directory / "manifest.json").is_file():
        raise UserError(f"{directory} is not a data set: it has no manifest.json (write it with `flexpert prepare`)")
    record = read_record(directory / "manifest.json", "flexpert.data")
    return DataManifest(
        directory, record["tokenizer_digest"], record["vocab_size"], record["eos_id"], record.get("answer_marker")
    )


class TokenWindows:
    """One split of a data set as sequences of `sequence_length` tokens.

    Where a data set has several files, the sequences of one follow those of another, and none lies across two.

    Args:
        directory: the data set.
        split: train or valid.
        sequence_length: tokens of a sequence.
        seed: of their order.
        loss_mask: whether to mark the tokens that carry no loss, where the data set has such; see `sequences`.

    Raises:
        UserError: the split holds fewer tokens than one sequence needs.
    """

    def __init__(self, directory: Path, split: str, sequence_length: int, seed: int, loss_mask: bool = False) -> None:
        self.directory, self.length, self.seed, self.loss_mask = directory, sequence_length, seed, loss_mask
        self.source = IndexedTokens(directory / split)
        sizes = [max(0, len(part.tokens) - 1) // sequence_length for part in self.source.parts]
        self.first_sequences = np.cumsum([0, *sizes])
        self.num_sequences = int(self.first_sequences[-1])
        if self.num_sequences < 1:
            raise UserError(
                f"{directory / split}.bin holds {self.source.num_tokens} tokens, fewer than one sequence of "
                f"train.sequence_length={sequence_length} needs"
            )

    @property
    def num_tokens(self) -> int:
        return self.num_sequences * self.length

    def sequences(self, start: int, count: int) -> Tensor:
        """Sequences at positions [start, start+count) of the endless stream of epochs: int64 [count, length+1].

        A token t that carries no loss as a target is given as ~t, which is negative; `targets_of` takes them apart.
        """
        rows = np.empty((count, self.length + 1), np.int64)
        for row, index in enumerate(self.indices(start, count)):
            rows[row] = self.sequence(int(index))
        return torch.from_numpy(rows)

    def indices(self, start: int, count: int) -> NDArray[np.int64]:
        """Which sequences of the split are at these positions."""
        epochs, offsets = np.divmod(np.arange(start, start + count, dtype=np.int64), self.num_sequences)
        indices = np.empty(count, np.int64)
        for epoch in np.unique(epochs):
            indices[epochs == epoch] = permuted(offsets[epochs == epoch], self.num_sequences, self.seed, int(epoch))
        return indices

    def origins(self, start: int, count: int) -> list[str]:
        """Where the sequences at these positions come from: their documents, as numbered in their file, from 0.

        Raw files do not say where documents begin: there it is tokens.
        """
        found = []
        for index in self.indices(start, count).tolist():
            part, window = self.place(index)
            name = getattr(part.tokens, "filename", self.directory)
            if isinstance(part, IndexedFile):
                what, numbers = "documents", [part.document_of(token) for token in (window.start, window.stop - 1)]
            else:
                what, numbers = "tokens", [window.start, window.stop - 1]
            found.append(f"{name} {what} {numbers[0]}-{numbers[1]}")
        return found

    def place(self, index: int) -> tuple[TokenFile, slice]:
        """The file and the tokens of sequence `index` of the split."""
        number = int(np.searchsorted(self.first_sequences, index, "right")) - 1
        first = (index - int(self.first_sequences[number])) * self.length
        return self.source.parts[number], slice(first, first + self.length + 1)

    def sequence(self, index: int) -> NDArray[np.int64]:
        """Sequence `index` of the split in the order of its files."""
        part, window = self.place(index)
        tokens = part.tokens[window].astype(np.int64)
        if self.loss_mask and part.mask is not None:
            tokens = np.where(part.mask[window] == 0, ~tokens, tokens)
        return tokens


def targets_of(sequences: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and targets [B, S] of sequences [B, S+1]; a target that carries no loss is negative."""
    tokens_BS = sequences[:, :-1]
    return torch.where(tokens_BS < 0, ~tokens_BS, tokens_BS), sequences[:, 1:]


def document_ids(tokens_BS: Tensor, eos_id: int) -> Tensor:
    """Number each window's documents, [B, S]: a document begins after an end-of-text token."""
    ended = (tokens_BS == eos_id).long()
    return ended.cumsum(1) - ended
