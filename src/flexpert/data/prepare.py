"""`flexpert prepare`: documents to token files, held-out split and manifest."""

import hashlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from flexpert.checkpoint.store import atomic_directory
from flexpert.config.stages import PrepareConfig
from flexpert.data.documents import read_documents
from flexpert.data.indexed import IndexedWriter, token_dtype
from flexpert.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from flexpert.errors import UserError
from flexpert.records import sha256_file, write_record
from flexpert.stage import check_directory

BATCH_DOCUMENTS = 512
Item = TypeVar("Item")


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a document belongs to the valid split: decided by its text alone, so that copies stay together."""
    position = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
    return position < fraction * 2**64


def batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def require_lossless(tokenizer: Tokenizer, texts: list[str]) -> None:
    """Evaluation counts bytes of decoded text, which only a lossless tokenizer gives back."""
    for text in texts:
        if tokenizer.decode(tokenizer.encode(text)) != text:
            raise UserError(f"the tokenizer in {tokenizer.directory} does not give back the text that it encoded")


def run(config: PrepareConfig, resolved: str) -> None:
    """Write `output_dir/{train,valid}.{bin,idx}`, `tokenizer/`, `manifest.json` and `resolved.yaml`, all or nothing.

    Raises:
        UserError: documents, tokenizer or `output_dir` cannot be used as the config says.
    """
    output = Path(config.output_dir)
    if (output / "manifest.json").is_file():
        check_directory(output, resolved, "auto")
        print(f"{output} is complete")
        return
    with atomic_directory(output) as directory:
        tokenizer_dir = directory / "tokenizer"
        if config.train_tokenizer.vocab_size is not None:
            texts = read_documents(config.data.documents, config.data.text_field, config.seed)
            training = (text for text in texts if not is_held_out(text, config.valid_fraction))
            tokenizer = train_tokenizer(training, config.train_tokenizer.vocab_size, tokenizer_dir)
        else:
            assert config.tokenizer is not None
            tokenizer = load_tokenizer(Path(config.tokenizer))
            tokenizer.copy_to(tokenizer_dir)
        splits = write_splits(config, tokenizer, directory)
        if splits["train"]["documents"] == 0:
            raise UserError(f"data.documents={config.data.documents} leaves no training document")
        write_record(
            directory / "manifest.json",
            "flexpert.data",
            {
                "tokenizer_digest": tokenizer.digest,
                "vocab_size": tokenizer.vocab_size,
                "eos_id": tokenizer.eos_id,
                "license": config.data.license,
                "answer_marker": config.data.answer_marker,
                "splits": splits,
            },
        )
        (directory / "resolved.yaml").write_text(resolved, encoding="utf-8")
    totals = ", ".join(
        f"{name}: {split['documents']:,} documents {split['tokens']:,} tokens" for name, split in splits.items()
    )
    print(f"{output}: {totals}")
    if config.valid_fraction and config.valid_documents != 0 and not splits["valid"]["documents"]:
        print(
            f"note: valid_fraction={config.valid_fraction} held out none of the {splits['train']['documents']:,} "
            "documents, and evaluation needs some: set a larger one, and another output_dir"
        )


def write_splits(config: PrepareConfig, tokenizer: Tokenizer, directory: Path) -> dict[str, Any]:
    """Tokenise and write both splits.

    Returns: per split the counts of documents, tokens and UTF-8 bytes of text, and each file's SHA-256.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    counts = {name: {"documents": 0, "tokens": 0, "bytes": 0} for name in ("train", "valid")}
    documents = read_documents(config.data.documents, config.data.text_field, config.seed)
    non_empty = (text for text in documents if text)
    with IndexedWriter(directory / "train", dtype) as train, IndexedWriter(directory / "valid", dtype) as valid:
        writers = {"train": train, "valid": valid}
        for number, texts in enumerate(batches(non_empty, BATCH_DOCUMENTS)):
            if number == 0:
                require_lossless(tokenizer, texts[:32])
            for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
                split = "valid" if is_held_out(text, config.valid_fraction) else "train"
                count = counts[split]
                if split == "valid" and count["documents"] == config.valid_documents:
                    continue
                writers[split].add([*ids, tokenizer.eos_id])
                count["documents"] += 1
                count["tokens"] += len(ids) + 1
                count["bytes"] += len(text.encode())
    return {
        name: {**count, "files": {f"{name}{end}": sha256_file(directory / f"{name}{end}") for end in (".bin", ".idx")}}
        for name, count in counts.items()
    }
