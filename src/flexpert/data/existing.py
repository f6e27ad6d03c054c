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
from flexpert.data.indexed import IndexedFile, RawFile, TokenFile, file_of
from flexpert.data.tokenizer import Tokenizer
from flexpert.errors import UserError

#: Tokens at either end of a file, and places between them with so many tokens each, that are looked at.
END_TOKENS = 1 << 16
PLACES, PLACE_TOKENS = 64, 4096
NUMPY_MAGIC = b"\x93NUMPY"


def refer_to_files(data: PrepareDataConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """The manifest's entries of the splits: what is held out must be in files of its own.

    Raises:
        UserError: no file matches, or a file does not hold ids of this tokenizer in this type.
    """
    assert data.tokens is not None
    return {
        "train": split_entry("data.tokens", data.tokens, data.token_dtype, tokenizer),
        "valid": split_entry("data.valid_tokens", data.valid_tokens, data.token_dtype, tokenizer),
    }


def split_entry(key: str, pattern: str | None, dtype: str | None, tokenizer: Tokenizer) -> dict[str, Any]:
    """`documents` is null where it would take a search through all tokens, `bytes` because no text was seen."""
    parts, num_tokens, num_documents = [], 0, 0
    found = [] if pattern is None else token_files(key, pattern)
    for path in found:
        part, file = open_existing(path, dtype, tokenizer.eos_id)
        check_ids(path, file.tokens, tokenizer)
        parts.append(part)
        num_tokens += len(file.tokens)
        num_documents += len(file.lengths) if isinstance(file, IndexedFile) else 0
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
        return {"prefix": str(path)}, IndexedFile(path)
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
    part = {"file": str(path), "dtype": kind.name, "offset": offset, "bytes": num_bytes}
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


def check_ids(path: Path, tokens: NDArray[np.integer], tokenizer: Tokenizer) -> None:
    """Raises `UserError` where a sample shows ids that the tokenizer does not have, or halves of wider ids."""
    seen = sample(tokens)
    if len(seen) and not (seen.min() >= 0 and seen.max() < tokenizer.vocab_size):
        wrong = int(seen.max() if seen.max() >= tokenizer.vocab_size else seen.min())
        raise UserError(
            f"{path} holds the id {wrong} when read as {tokens.dtype}, and {tokenizer.directory} has "
            f"{tokenizer.vocab_size} ids: it is of another tokenizer or another data.token_dtype"
        )
    head = tokens[: END_TOKENS & ~1]
    if tokens.dtype == np.uint16 and len(head) >= 16 and head[1::2].max() <= tokenizer.vocab_size >> 16:
        raise UserError(f"every second id of {path} is {head[1::2].max()} or less: set data.token_dtype=uint32")
