"""Held-out documents as windows that a model scores.

For the likelihood every token of a document's text is predicted exactly once, from an end-of-text token or from up to
`length` tokens before it: the windows of one document overlap by the one token that opens the next. So the last of
them may begin anywhere in the question. An answer is judged in the window that ends where the document ends, with as
much of the question before it as fits.
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

    @property
    def num_answer_tokens(self) -> int:
        return 0 if self.answer_start is None else len(self.tokens) - self.answer_start


@dataclass(frozen=True)
class EvaluationSet:
    """Held-out documents of one data set."""

    name: str
    manifest: DataManifest
    documents: list[Document]

    @property
    def num_bytes(self) -> int:
        return sum(document.num_bytes for document in self.documents)


@dataclass(frozen=True)
class Window:
    """A run of a document's tokens; every token but the first is predicted from those before it.

    Attributes:
        document: place of the document in its set.
        tokens: up to length + 1.
        counted: whether the tokens are part of the document's likelihood; False where other windows hold them.
        num_answer_tokens: how many tokens at the end are the answer, judged in this window; 0: none.
    """

    document: int
    tokens: list[int]
    counted: bool
    num_answer_tokens: int


def load_set(name: str, directory: Path, split: str, max_documents: int | None) -> EvaluationSet:
    """Read the documents of a split.

    Raises:
        UserError: the directory is no data set, or the split has no text.
    """
    manifest = read_manifest(directory)
    tokenizer = load_tokenizer(manifest.tokenizer_dir)
    source = IndexedTokens(directory / split)
    count = len(source) if max_documents is None else min(len(source), max_documents)
    if count == 0:
        raise UserError(
            f"{directory} has no document in its {split} split: prepare it with a larger valid_fraction, or choose "
            "another data.split"
        )
    documents = [
        make_document(source.document(index)[:-1].tolist(), tokenizer, manifest.answer_marker) for index in range(count)
    ]
    documents = [document for document in documents if document.tokens]
    if not documents:
        raise UserError(f"{directory} has only empty documents in its {split} split")
    return EvaluationSet(name, manifest, documents)


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


def document_windows(number: int, document: Document, eos_id: int, length: int) -> list[Window]:
    """The windows of one document; an answer longer than a window is in none of them."""
    sequence = [eos_id, *document.tokens]
    starts = range(0, len(document.tokens), length)
    last = max(0, len(document.tokens) - length)
    answer = document.num_answer_tokens if document.num_answer_tokens <= length else 0
    rows = [Window(number, sequence[at : at + length + 1], True, answer if at == last else 0) for at in starts]
    if answer and last not in starts:
        rows.append(Window(number, sequence[last:], False, answer))
    return rows


def windows(documents: list[Document], eos_id: int, length: int, batch: int) -> Iterator[tuple[list[Window], Tensor]]:
    """Batches of windows, padded on the right with `IGNORE` after the model's inputs.

    Yields: the windows (those of one document follow one another), and their tokens as int64 [B, S+1], where position
    s+1 is the target of position s.
    """
    rows = [
        window
        for number, document in enumerate(documents)
        for window in document_windows(number, document, eos_id, length)
    ]
    for first in range(0, len(rows), batch):
        members = rows[first : first + batch]
        block = np.full((len(members), max(len(window.tokens) for window in members)), IGNORE, np.int64)
        for row, window in enumerate(members):
            block[row, : len(window.tokens)] = window.tokens
        yield members, torch.from_numpy(block)
