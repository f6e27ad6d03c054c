"""Token files that others have made, used where they are: raw memory maps such as OLMo's, and Megatron's datasets.

The manifest refers to them by absolute path and size. What is looked at is a sample: files of a trillion tokens are
not read to be described.
"""

import glob
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flexpert.config.groups import PrepareDataConfig
from flexpert.data.indexed import SEARCH_TOKENS, IndexedFile, RawFile, TokenFile, end_of_document, file_of
from flexpert.data.tokenizer import Tokenizer
from flexpert.errors import UserError
from flexpert.records import sha256_hex

#: Tokens at either end of a file, and places between them with so many tokens each, that are looked at.
END_TOKENS = 1 << 16
PLACES, PLACE_TOKENS = 64, 4096
#: Documents of an indexed file whose last token is looked at.
CHECKED_DOCUMENTS = 256
NUMPY_MAGIC = b"\x93NUMPY"


def refer_to_files(data: PrepareDataConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """The manifest's entries of the splits: what is held out must be in files of its own.

    Raises:
        UserError: no file matches, a file does not hold documents of this tokenizer in this type, or a file is in both
            splits.
    """
    assert data.tokens is not None
    splits = {
        "train": split_entry("data.tokens", data.tokens, data.token_dtype, tokenizer),
        "valid": split_entry("data.valid_tokens", data.valid_tokens, data.token_dtype, tokenizer),
    }
    trained = {token_file(part).resolve() for part in splits["train"]["parts"]}
    for part in splits["valid"]["parts"]:
        if token_file(part).resolve() in trained:
            raise UserError(
                f"{token_file(part)} is in data.tokens and in data.valid_tokens: what is held out needs its own files"
            )
    return splits


def token_file(part: dict[str, Any]) -> Path:
    """The file that holds the tokens of a part of the manifest."""
    return Path(part["file"]) if "file" in part else file_of(Path(part["prefix"]), ".bin")


def split_entry(key: str, pattern: str | None, dtype: str | None, tokenizer: Tokenizer) -> dict[str, Any]:
    """`documents` is null where it would take a search through all tokens, `bytes` because no text was seen."""
    parts, num_tokens, num_documents = [], 0, 0
    found = [] if pattern is None else token_files(key, pattern)
    for path in found:
        part, file = open_existing(path, dtype, tokenizer.eos_id)
        seen = sample(file.tokens)
        check_ids(path, file.tokens, seen, tokenizer)
        check_ends(path, file, seen, tokenizer)
        # With these two the digest of the manifest is of the tokens, too, as far as a sample tells them apart.
        parts.append({**part, "bytes": token_file(part).stat().st_size, "sample": sha256_hex(seen.tobytes())})
        num_tokens += len(file.tokens)
        num_documents += file.num_documents if isinstance(file, IndexedFile) else 0
    is_counted = all("prefix" in part for part in parts)
    documents = num_documents if is_counted else None
    return {"documents": documents, "tokens": num_tokens, "bytes": None, "files": {}, "parts": parts}


def token_files(key: str, pattern: str) -> list[Path]:
    """Files that match, in sorted order; of Megatron's two the prefix, which may be given too.

    Raises:
        UserError: there is none.
    """
    matches = [*glob.glob(pattern, recursive=True), *glob.glob(f"{pattern}.idx")]
    paths = {Path(match).absolute() for match in matches if Path(match).is_file()}
    indexed = {path.with_suffix("") for path in paths if path.suffix == ".idx"}
    indexed |= {path.with_suffix("") for path in paths if path.suffix == ".bin" and path.with_suffix(".idx").is_file()}
    raw = {path for path in paths if path.suffix != ".idx" and path.with_suffix("") not in indexed}
    if not indexed | raw:
        raise UserError(f"{key}={pattern} matches no file")
    return sorted(indexed | raw)


def open_existing(path: Path, dtype: str | None, eos_id: int) -> tuple[dict[str, Any], TokenFile]:
    """The manifest's entry of a file or prefix, and the file itself.

    Raises:
        UserError: it is no Megatron dataset, no whole number of ids, or of another type than was said.
    """
    if file_of(path, ".idx").is_file():
        indexed = IndexedFile(path)
        indexed.check_order()
        return {"prefix": str(path)}, indexed
    num_bytes = path.stat().st_size
    with path.open("rb") as content:
        has_header = content.read(len(NUMPY_MAGIC)) == NUMPY_MAGIC
    if has_header:
        kind, offset = read_header(path)
        if dtype is not None and kind != np.dtype(dtype):
            raise UserError(f"{path} holds {kind} by its own header: leave out data.token_dtype={dtype}")
    elif dtype is None:
        raise UserError(f"{path} has no header that says what it holds: give data.token_dtype=uint16 or uint32")
    else:
        kind, offset = np.dtype(dtype), 0
    if num_bytes == offset or (num_bytes - offset) % kind.itemsize:
        raise UserError(
            f"{path} has {num_bytes - offset:,} bytes, not one id of {kind.itemsize} bytes after another: it is cut, "
            "or data.token_dtype is another"
        )
    part = {"file": str(path), "dtype": kind.name, "offset": offset}
    return part, RawFile(path, kind, offset, eos_id, num_bytes)


def read_header(path: Path) -> tuple[np.dtype[Any], int]:
    """Type and first byte of the array in a real .npy file."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise UserError(f"{path} cannot be read as .npy: {error}") from None
    if array.ndim != 1 or array.dtype.kind not in "ui" or not array.dtype.isnative:
        raise UserError(f"{path} holds {array.dtype} of shape {array.shape}, and not a list of token ids")
    return array.dtype, int(array.offset)


def sample(tokens: NDArray[np.integer]) -> NDArray[np.int64]:
    """The tokens at both ends and at even distances between, in pieces of an even length."""
    starts = np.linspace(0, max(0, len(tokens) - PLACE_TOKENS), PLACES).astype(np.int64) & ~1
    pieces = [tokens[start : start + PLACE_TOKENS] for start in starts]
    every: NDArray[np.integer] = np.concatenate([tokens[:END_TOKENS], *pieces, tokens[-END_TOKENS:]])
    return every.astype(np.int64)


def check_ids(path: Path, tokens: NDArray[np.integer], seen: NDArray[np.int64], tokenizer: Tokenizer) -> None:
    """Raises `UserError` where the type or a sample shows ids that the tokenizer does not have, or halves of ids."""
    if np.iinfo(tokens.dtype).max < tokenizer.vocab_size - 1:
        raise UserError(
            f"{path} holds {tokens.dtype}, which goes to {np.iinfo(tokens.dtype).max}, and {tokenizer.directory} has "
            f"{tokenizer.vocab_size} ids: it is of another tokenizer or another data.token_dtype"
        )
    if len(seen) and not (seen.min() >= 0 and seen.max() < tokenizer.vocab_size):
        wrong = int(seen.max() if seen.max() >= tokenizer.vocab_size else seen.min())
        raise UserError(
            f"{path} holds the id {wrong} when read as {tokens.dtype}, and {tokenizer.directory} has "
            f"{tokenizer.vocab_size} ids: it is of another tokenizer or another data.token_dtype"
        )
    head = tokens[: END_TOKENS & ~1]
    if tokens.dtype == np.uint16 and len(head) >= 16 and head[1::2].max() <= tokenizer.vocab_size >> 16:
        raise UserError(f"every second id of {path} is {head[1::2].max()} or less: set data.token_dtype=uint32")


def check_ends(path: Path, file: TokenFile, seen: NDArray[np.int64], tokenizer: Tokenizer) -> None:
    """Raises `UserError` where documents do not end in the end-of-text token of this tokenizer.

    A raw file of one document need not, if it is short. A long one is searched beyond the sample, which may lie between
    the ends of long documents: of those that hold books, a sample sees few.
    """
    eos_id = tokenizer.eos_id
    if isinstance(file, IndexedFile):
        num_checked = min(CHECKED_DOCUMENTS, file.num_documents)
        chosen = np.linspace(0, file.num_documents - 1, num_checked).astype(int)
        spans = [file.span(int(index)) for index in chosen]
        last = [int(file.tokens[end - 1]) for start, end in spans if end > start]
        num_without = sum(token != eos_id for token in last)
        if 2 * num_without > len(last):
            raise UserError(
                f"{num_without} of {len(last)} documents of {path} do not end in {eos_id}, the end-of-text id of "
                f"{tokenizer.directory}: write it again with Megatron's --append-eod, or give its own tokenizer"
            )
    elif len(file.tokens) > END_TOKENS and not (seen == eos_id).any():
        searched = min(SEARCH_TOKENS, len(file.tokens))
        end = end_of_document(file.tokens, eos_id, 0, searched)
        if file.tokens[end - 1] != eos_id:
            raise UserError(
                f"{path} holds {eos_id}, the end-of-text id of {tokenizer.directory}, neither in its first "
                f"{searched:,} tokens nor in a sample of the rest: give the tokenizer and data.token_dtype that it was "
                f"written with, or write {eos_id} after every document; if it is a single long one, at its end"
            )
