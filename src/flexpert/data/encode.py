"""Batches of documents to arrays of tokens, in this process or in a pool, in the order in which they were read.

Every core parses and tokenises whole batches with one thread: threads within a batch, which tokenizers offers, wait
for its longest document and leave the parsing to one core. What a batch becomes is a function of the batch alone, so
the result does not depend on the number of workers.
"""

import hashlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain, islice
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flexpert.data.documents import BadDocument, Batch, Document, Fields
from flexpert.data.hashes import document_hash
from flexpert.data.indexed import token_dtype
from flexpert.data.tokenizer import Tokenizer, load_tokenizer
from flexpert.errors import UserError

#: An input of fewer batches is done before a pool has started.
SMALL_INPUT_BATCHES = 8
#: Batches a worker may be ahead of the writer.
BATCHES_AHEAD = 4


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a document belongs to the valid split: decided by its text alone, so that copies stay together."""
    position = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
    return position < fraction * 2**64


@dataclass(frozen=True)
class Encoded:
    """The documents of one batch, empty ones left out; N documents, T tokens.

    Attributes:
        tokens: ids end to end, each document's end-of-text token included, [T].
        lengths: tokens of each document, [N].
        prompt_lengths: how many of them, at its start, are context only, [N].
        num_bytes: UTF-8 bytes of each document's text, [N].
        held_out: whether it belongs to the valid split, [N].
        text_hashes: 16 bytes of a hash of each text, for exact copies, [N].
        document_hashes: see `flexpert.data.hashes`, [N].
        bad: what holds no document.
        num_empty: documents without text.
        consumed: bytes of the input that have been read, up to the end of this batch.
    """

    tokens: NDArray[np.integer]
    lengths: NDArray[np.int32]
    prompt_lengths: NDArray[np.int32]
    num_bytes: NDArray[np.int64]
    held_out: NDArray[np.bool_]
    text_hashes: list[bytes]
    document_hashes: NDArray[np.uint64]
    bad: list[BadDocument]
    num_empty: int
    consumed: int


@dataclass(frozen=True)
class Encoder:
    """What turns a batch into tokens."""

    tokenizer: Tokenizer
    fields: Fields
    valid_fraction: float

    def __call__(self, batch: Batch) -> Encoded:
        found = list(batch.documents(self.fields))
        documents = [document for document in found if isinstance(document, Document) and document.text]
        wholes = [document.whole for document in documents]
        ids = self.tokenizer.encode_batch([document.text for document in documents])
        prompts: list[list[int]] = [[]] * len(documents)
        if self.fields.prompt is not None:
            # Apart from the text: that is how a model meets a prompt when it is asked to go on from one.
            prompts = self.tokenizer.encode_batch([document.prompt for document in documents])
        eos = [self.tokenizer.eos_id]
        lengths = [len(before) + len(after) + 1 for before, after in zip(prompts, ids, strict=True)]
        tokens = chain.from_iterable(chain(before, after, eos) for before, after in zip(prompts, ids, strict=True))
        return Encoded(
            tokens=np.fromiter(tokens, token_dtype(self.tokenizer.vocab_size), sum(lengths)),
            lengths=np.asarray(lengths, np.int32),
            prompt_lengths=np.asarray([len(before) for before in prompts], np.int32),
            num_bytes=np.asarray([len(text.encode()) for text in wholes], np.int64),
            held_out=np.asarray([is_held_out(text, self.valid_fraction) for text in wholes], np.bool_),
            text_hashes=[hashlib.blake2b(text.encode(), digest_size=16).digest() for text in wholes],
            document_hashes=np.asarray([document_hash(text) for text in wholes], np.uint64),
            bad=[document for document in found if isinstance(document, BadDocument)],
            num_empty=sum(isinstance(document, Document) and not document.text for document in found),
            consumed=batch.consumed,
        )


def num_cores() -> int:
    """Cores that this process may use, which on a cluster are fewer than the machine has."""
    return len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class _Failure:
    """The end of an input that could not be read further: told after all that came before it."""

    error: UserError


def _guarded(batches: Iterable[Batch]) -> Iterator[Batch | _Failure]:
    try:
        yield from batches
    except UserError as error:
        yield _Failure(error)


def encode_all(batches: Iterable[Batch], encoder: Encoder, num_workers: int) -> Generator[Encoded, None, None]:
    """Encode every batch, in order; `num_workers` processes, or this one where it is 0 or 1 or the input is small.

    Closing it ends the processes.

    Raises:
        UserError: as `batches`, when all before it is encoded; or a worker was killed.
    """
    items = _guarded(batches)
    first = list(islice(items, SMALL_INPUT_BATCHES))
    results = _in_pool if num_workers > 1 and len(first) == SMALL_INPUT_BATCHES else _in_process
    for result in results(chain(first, items), encoder, num_workers):
        if isinstance(result, _Failure):
            raise result.error
        yield result


def _in_process(items: Iterable[Batch | _Failure], encoder: Encoder, num_workers: int) -> Iterator[Encoded | _Failure]:
    yield from (item if isinstance(item, _Failure) else encoder(item) for item in items)


def _in_pool(items: Iterable[Batch | _Failure], encoder: Encoder, num_workers: int) -> Iterator[Encoded | _Failure]:
    pending: deque[Future[Encoded] | _Failure] = deque()

    def oldest() -> Encoded | _Failure:
        item = pending.popleft()
        return item if isinstance(item, _Failure) else item.result()

    # Spawned, not forked: threads of the tokenizer that this process may have do not survive a fork.
    pool = ProcessPoolExecutor(
        num_workers,
        multiprocessing.get_context("spawn"),
        _start_worker,
        (encoder.tokenizer.directory, encoder.fields, encoder.valid_fraction),
    )
    try:
        for item in items:
            pending.append(item if isinstance(item, _Failure) else pool.submit(_encode, item))
            if len(pending) > num_workers * BATCHES_AHEAD:
                yield oldest()
        while pending:
            yield oldest()
    except BrokenProcessPool:
        raise UserError(
            f"a worker was killed, most likely for want of memory: set parallel.num_workers below {num_workers}"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_encoder: Encoder


def _start_worker(tokenizer: Path, fields: Fields, valid_fraction: float) -> None:
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for told in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):  # the parent heeds them, and ends its workers
        signal.signal(told, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _encoder = Encoder(load_tokenizer(tokenizer), fields, valid_fraction)


def _end_with_parent() -> None:
    """A pool's workers wait for ever for a parent that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _encode(batch: Batch) -> Encoded:
    return _encoder(batch)
