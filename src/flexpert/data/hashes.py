"""Hashes of documents that show what two data sets share, and no text.

`prepare` writes `{train,valid}.hashes.bin` beside the tokens: the first 8 bytes of a keyed BLAKE2b of each document's
normalised text, sorted. The key is fixed and public, so that any two data sets can be compared; it only keeps these
hashes apart from those of other systems.

What such a file reveals: the number of documents, and to whoever *has* a text, whether it is among them. A text that
can be guessed (a form with one blank) can be tested for in the same way. It does not reveal a text that one does not
have. Two unlike documents have the same hash once in about 2^64 pairs.
"""

import hashlib
import unicodedata
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flexpert.records import read_record

DOMAIN = b"flexpert.document.v1"
DTYPE = np.dtype("<u8")


def normalise(text: str) -> str:
    """Copies that differ in case, blanks or the spelling of a character count as the same document."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def document_hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(normalise(text).encode(), digest_size=8, key=DOMAIN).digest(), "little")


def hashes_file(directory: Path, split: str) -> Path:
    return directory / f"{split}.hashes.bin"


def write_hashes(directory: Path, split: str, hashes: Iterable[NDArray[np.uint64]]) -> None:
    """Sorted, which takes away the order of the documents."""
    every = [*hashes]
    np.sort(np.concatenate(every) if every else np.zeros(0, DTYPE)).astype(DTYPE).tofile(hashes_file(directory, split))


def read_hashes(directory: Path, split: str) -> NDArray[np.uint64] | None:
    """The hashes of a split; None where the data set has none (it was made elsewhere, or by an older version)."""
    parts = read_record(directory / "manifest.json", "flexpert.data")["splits"][split].get("parts")
    prefixes = [split] if parts is None else [part.get("prefix") for part in parts]
    files = [directory / f"{prefix}.hashes.bin" for prefix in prefixes]
    if None in prefixes or not all(file.is_file() for file in files):
        return None
    hashes: NDArray[np.uint64] = np.concatenate([np.zeros(0, DTYPE), *(np.fromfile(file, DTYPE) for file in files)])
    return hashes


def overlap_notes(dirs: dict[str, Path], split: str = "valid") -> list[str]:
    """One line for every two data sets of which one holds out what the other trains on; for `evaluate` to print.

    Args:
        dirs: data sets by name.
        split: the split that is evaluated on.
    """
    notes = []
    trained = {name: read_hashes(directory, "train") for name, directory in dirs.items()}
    for name, directory in dirs.items():
        held_out = read_hashes(directory, split)
        for other, hashes in trained.items():
            if other == name or held_out is None or hashes is None:
                continue
            shared = int(np.isin(held_out, hashes).sum())
            if shared:
                notes.append(
                    f"{shared:,} of the {len(held_out):,} {split} documents of {name} are in the training text of "
                    f"{other}: prepare {other} again with data.exclude={directory}"
                )
    return notes
