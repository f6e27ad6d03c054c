"""`flexpert prepare`: documents to token files, held-out split and manifest."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flexpert.checkpoint.store import atomic_directory
from flexpert.config.stages import PrepareConfig
from flexpert.data.documents import (
    Document,
    Fields,
    input_files,
    input_identity,
    read_batches,
    read_documents,
)
from flexpert.data.encode import Encoded, Encoder, encode_all, is_held_out, num_cores
from flexpert.data.existing import refer_to_files
from flexpert.data.hashes import are_among, hashes_file, open_hashes, write_hashes
from flexpert.data.indexed import IndexedWriter, file_of, token_dtype
from flexpert.data.progress import PrepareProgress
from flexpert.data.shards import merge_shards, shard_directory
from flexpert.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from flexpert.errors import UserError
from flexpert.records import read_record, sha256_file, write_record
from flexpert.stage import check_directory

#: Documents that a tokenizer must give back as they were.
CHECKED_DOCUMENTS = 32
#: Bad documents that are named in the output.
NAMED_BAD_DOCUMENTS = 5


def run(config: PrepareConfig, resolved: str) -> None:
    """Write `output_dir/{train,valid}.{bin,idx,hashes.bin}`, `tokenizer/`, `manifest.json` and `resolved.yaml`, all or
    nothing; of a shard, below `output_dir/shards`.

    Raises:
        UserError: documents, tokenizer or `output_dir` cannot be used as the config says.
    """
    if config.merge:
        merge_shards(Path(config.output_dir))
        return
    output = Path(config.output_dir)
    if config.shard is not None:
        if (output / "manifest.json").is_file():
            raise UserError(f"{output} is a complete data set: choose another output_dir for shards")
        output = shard_directory(output, *config.part)
    if (output / "manifest.json").is_file():
        check_directory(output, resolved, "auto")
        check_inputs(output, config.data.documents)
        print(f"{output} is complete")
        return
    if config.data.documents is not None:
        input_files(config.data.documents, config.part)  # what is wrong with them leaves no directory
    try:
        with atomic_directory(output) as directory:
            write_data_set(config, directory, output)
            (directory / "resolved.yaml").write_text(resolved, encoding="utf-8")
    except OSError as error:  # inputs that cannot be read are told where they are read
        raise UserError(f"{output} cannot be written: {error.strerror}; nothing is left of it") from None


def check_inputs(output: Path, documents: str | None) -> None:
    """Raises `UserError` where files match now that a complete data set was not made from; none may have stayed."""
    made_from = read_record(output / "manifest.json", "flexpert.data").get("inputs")
    if made_from is not None and documents is not None:
        now = input_identity(documents)
        if now["count"] and now != made_from:
            raise UserError(
                f"{output} was made of {made_from['count']} files, and data.documents={documents} matches "
                f"{now['count']} now, or their sizes have changed; choose another output_dir"
            )


def write_data_set(config: PrepareConfig, directory: Path, output: Path) -> None:
    """Fill `directory`, which is to become `output`, and tell what is in it."""
    tokenizer = prepare_tokenizer(config, directory / "tokenizer")
    inputs = input_identity(config.data.documents) if config.data.documents is not None else None
    dropped = dict.fromkeys(("bad", "empty", "duplicates", "excluded"), 0)
    if config.data.tokens is not None:
        splits = refer_to_files(config.data, tokenizer)
    else:
        splits = write_splits(config, tokenizer, directory, output, dropped)
        if splits["train"]["documents"] == 0 and config.shard is None:
            raise UserError(f"data.documents={config.data.documents} leaves no training document")
    content = {
        "tokenizer_digest": tokenizer.digest,
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "license": config.data.license,
        "answer_marker": config.data.answer_marker,
        "dropped": dropped,
        "splits": splits,
    }
    if inputs is not None:
        content["inputs"] = inputs
    write_record(directory / "manifest.json", "flexpert.data", content)
    print(f"{output}: {totals(splits)}")
    if any(dropped.values()):
        print(f"{output}: left out {', '.join(f'{count:,} {what}' for what, count in dropped.items() if count)}")
    is_asked_for = config.data.tokens is None and config.valid_fraction and config.valid_documents != 0
    if is_asked_for and not splits["valid"]["documents"]:
        print(
            f"note: valid_fraction={config.valid_fraction} held out none of the {splits['train']['documents']:,} "
            "documents, and evaluation needs some: set a larger one, and another output_dir"
        )


def totals(splits: dict[str, Any]) -> str:
    counts = {
        name: (f"{split['documents']:,} documents " if split["documents"] is not None else "") + f"{split['tokens']:,}"
        for name, split in splits.items()
    }
    return ", ".join(f"{name}: {count} tokens" for name, count in counts.items())


def prepare_tokenizer(config: PrepareConfig, directory: Path) -> Tokenizer:
    """Copy the tokenizer, or train one on the documents that are not held out."""
    if config.train_tokenizer.vocab_size is None:
        assert config.tokenizer is not None
        tokenizer = load_tokenizer(Path(config.tokenizer))
        tokenizer.copy_to(directory)
        return tokenizer
    texts = (document.whole for document in documents_of(config, config.data.on_bad_document))
    training = (text for text in texts if not is_held_out(text, config.valid_fraction))
    return train_tokenizer(training, config.train_tokenizer.vocab_size, directory)


def documents_of(config: PrepareConfig, on_bad: str) -> Iterator[Document]:
    assert config.data.documents is not None
    return read_documents(config.data.documents, fields_of(config), config.seed, config.part, on_bad)


def fields_of(config: PrepareConfig) -> Fields:
    return Fields(config.data.text_field, config.data.prompt_field)


def require_lossless(tokenizer: Tokenizer, texts: Iterable[str]) -> None:
    """Evaluation counts bytes of decoded text, which only a lossless tokenizer gives back."""
    for text in texts:
        if tokenizer.decode(tokenizer.encode(text)) != text:
            raise UserError(f"the tokenizer in {tokenizer.directory} does not give back the text that it encoded")


class SplitWriter:
    """One split's token files, loss mask (where there are prompts), hashes and counts."""

    def __init__(self, directory: Path, split: str, tokenizer: Tokenizer, has_mask: bool) -> None:
        self.directory, self.split = directory, split
        self.writer = IndexedWriter(directory / split, token_dtype(tokenizer.vocab_size))
        self.mask = file_of(directory / split, ".mask.bin").open("wb") if has_mask else None
        self.hashes: list[NDArray[np.uint64]] = []
        self.counts = {"documents": 0, "tokens": 0, "bytes": 0}

    def add(self, batch: Encoded, chosen_N: NDArray[np.bool_]) -> None:
        """Append the chosen documents of a batch."""
        lengths = batch.lengths[chosen_N]
        tokens = batch.tokens[np.repeat(chosen_N, batch.lengths)]
        self.writer.extend(tokens, lengths)
        if self.mask is not None:
            starts = np.cumsum(lengths) - lengths
            place_in_document = np.arange(len(tokens)) - np.repeat(starts, lengths)
            self.mask.write((place_in_document >= np.repeat(batch.prompt_lengths[chosen_N], lengths)).tobytes())
        self.hashes.append(batch.document_hashes[chosen_N])
        self.counts["documents"] += len(lengths)
        self.counts["tokens"] += len(tokens)
        self.counts["bytes"] += int(batch.num_bytes[chosen_N].sum())

    def __enter__(self) -> "SplitWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.mask is not None:
            self.mask.close()
        self.writer.__exit__(kind, error, trace)
        if kind is None:
            write_hashes(self.directory, self.split, self.hashes)

    def entry(self) -> dict[str, Any]:
        """The split's entry in the manifest, when its files are complete."""
        ends = [".bin", ".idx"] + ([".mask.bin"] if self.mask is not None else [])
        files = {f"{self.split}{end}": sha256_file(self.directory / f"{self.split}{end}") for end in ends}
        return {**self.counts, "files": files, "hashes": sha256_file(hashes_file(self.directory, self.split))}


def write_splits(
    config: PrepareConfig, tokenizer: Tokenizer, directory: Path, output: Path, dropped: dict[str, int]
) -> dict[str, Any]:
    """Tokenise and write both splits; `dropped` is added to.

    Returns: per split the counts of documents, tokens and UTF-8 bytes of text, and each file's SHA-256.
    """
    data = config.data
    assert data.documents is not None
    excluded = excluded_hashes(data.exclude)
    # Documents that cannot be read are told in their place.
    texts = (document.text for document in documents_of(config, "skip") if document.text)
    require_lossless(tokenizer, islice(texts, CHECKED_DOCUMENTS))
    encoder = Encoder(tokenizer, fields_of(config), config.valid_fraction)
    batches = read_batches(data.documents, fields_of(config), config.seed, config.part)
    num_workers = num_cores() if config.parallel.num_workers is None else config.parallel.num_workers
    size = sum(path.stat().st_size for path in input_files(data.documents, config.part))
    seen: set[bytes] = set()
    with ExitStack() as stack:
        progress = stack.enter_context(PrepareProgress(f"prepare {output}", size))
        train, valid = (
            stack.enter_context(SplitWriter(directory, split, tokenizer, data.prompt_field is not None))
            for split in ("train", "valid")
        )
        for batch in stack.enter_context(closing(encode_all(batches, encoder, num_workers))):
            for bad in batch.bad:
                if data.on_bad_document == "fail":
                    raise UserError(str(bad))
                dropped["bad"] += 1
                if dropped["bad"] <= NAMED_BAD_DOCUMENTS:
                    print(f"skipped: {bad}", flush=True)
            dropped["empty"] += batch.num_empty
            kept = np.ones(len(batch.lengths), np.bool_)
            if data.deduplicate:
                kept = first_occurrences(batch.text_hashes, seen)
                dropped["duplicates"] += int((~kept).sum())
            known = are_among(batch.document_hashes, excluded) & kept & ~batch.held_out
            dropped["excluded"] += int(known.sum())
            held_out = kept & batch.held_out
            if config.valid_documents is not None:
                held_out &= np.cumsum(held_out) <= config.valid_documents - valid.counts["documents"]
            train.add(batch, kept & ~batch.held_out & ~known)
            valid.add(batch, held_out)
            num_documents, num_tokens = (train.counts[key] + valid.counts[key] for key in ("documents", "tokens"))
            progress.update(batch.consumed, num_documents, num_tokens)
    return {"train": train.entry(), "valid": valid.entry()}


def excluded_hashes(directories: list[str]) -> list[NDArray[np.uint64]]:
    """Hashes of the documents that these data sets hold out, each part sorted.

    Raises:
        UserError: one of them has no hashes.
    """
    found = []
    for directory in directories:
        hashes = open_hashes(Path(directory), "valid")
        if hashes is None:
            raise UserError(f"data.exclude={directory} has no valid.hashes.bin: prepare it again, or leave it out")
        found += hashes
    return found


def first_occurrences(hashes: list[bytes], seen: set[bytes]) -> NDArray[np.bool_]:
    """Which of the texts were not seen before; `seen` is added to."""
    first = np.zeros(len(hashes), np.bool_)
    for place, text_hash in enumerate(hashes):
        first[place] = text_hash not in seen
        seen.add(text_hash)
    return first
