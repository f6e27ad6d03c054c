"""Held-out documents as windows that a model scores.

Every token of a document's text is predicted exactly once, from an end-of-text token or from up to `length` tokens
before it: the windows of one document overlap by the one token that opens the next.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flexpert.data.dataset import DataManifest, read_manifest
from flexpert.data.indexed import IndexedTokens
from flexpert.data.tokenizer import Tokenizer, load_tokenizer
from flexpert.errors import UserError
from flexpert.model.loss import IGNORE


@dataclass(frozen=True)
class Document:
    """Attributes: tokens without the final end-of-text; bytes of UTF-8 text; first token of the answer, or None."""

    tokens: list[int]
    num_bytes: int
    answer_start: int | None


@dataclass(frozen=True)
class EvaluationSet:
    """Held-out documents of one data set."""

    name: str
    manifest: DataManifest
    documents: list[Document]

    @property
    def num_bytes(self) -> int:
        return sum(document.num_bytes for document in self.documents)


def load_set(name: str, directory: Path, split: str, max_documents: int | None) -> EvaluationSet:
    """Read the documents of a split.

    Raises:
        UserError: the directory is no data set, or the split is empty.
    """
    manifest = read_manifest(directory)
    tokenizer = load_tokenizer(manifest.tokenizer_dir)
    source = IndexedTokens(directory / split)
    count = len(source) if max_documents is None else min(len(source), max_documents)
    if count == 0:
        raise UserError(f"{directory} has no document in its {split} split")
    documents = [
        make_document(source.document(index)[:-1].tolist(), tokenizer, manifest.answer_marker) for index in range(count)
    ]
    return EvaluationSet(name, manifest, [document for document in documents if document.tokens])


def make_document(tokens: list[int], tokenizer: Tokenizer, marker: str | None) -> Document:
    """Locate the answer: it is what follows the last marker, where the tokens of both parts are the document's."""
    text = tokenizer.decode(tokens)
    start = None
    if marker is not None and marker in text:
        head, _, _ = text.rpartition(marker)
        prefix = tokenizer.encode(head + marker)
        if tokens[: len(prefix)] == prefix and len(prefix) < len(tokens):
            start = len(prefix)
    return Document(tokens, len(text.encode()), start)


def windows(documents: list[Document], eos_id: int, length: int, batch: int) -> Iterator[tuple[list[int], Tensor]]:
    """Batches of windows, padded on the right with `IGNORE` after the model's inputs.

    Yields: for each row the document it belongs to (rows of one document follow one another), and int64 [B, S+1]
    sequences, where position s+1 is the target of position s.
    """
    rows = []
    for number, document in enumerate(documents):
        sequence = [eos_id, *document.tokens]
        for start in range(0, len(document.tokens), length):
            rows.append((number, sequence[start : start + length + 1]))
    for first in range(0, len(rows), batch):
        members = rows[first : first + batch]
        block = np.full((len(members), max(len(sequence) for _, sequence in members)), IGNORE, np.int64)
        for row, (_, sequence) in enumerate(members):
            block[row, : len(sequence)] = sequence
        yield [number for number, _ in members], torch.from_numpy(block)
