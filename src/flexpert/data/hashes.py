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

from flexpert.data.indexed import map_file
from flexpert.records import read_record

DOMAIN = b"flexpert.document.v1"
DTYPE = np.dtype("<u8")
#: Hashes that are looked at together.
PIECE = 1 << 22


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


def open_hashes(directory: Path, split: str) -> list[NDArray[np.uint64]] | None:
    """The hashes of a split, memory-mapped, of each part by itself sorted.

    None where the data set has none (it was made elsewhere, or by an older version).
    """
    parts = read_record(directory / "manifest.json", "flexpert.data")["splits"][split].get("parts")
    prefixes = [split] if parts is None else [part.get("prefix") for part in parts]
    files = [directory / f"{prefix}.hashes.bin" for prefix in prefixes]
    if None in prefixes or not all(file.is_file() for file in files):
        return None
    return [map_file(file, DTYPE) for file in files]


def are_among(hashes: NDArray[np.uint64], parts: list[NDArray[np.uint64]]) -> NDArray[np.bool_]:
    """Which of `hashes` are in one of the parts, each of which is sorted: no part is copied or sorted again."""
    found = np.zeros(len(hashes), np.bool_)
    for part in parts:
        if len(part):
            places = np.searchsorted(part, hashes)
            found |= part[np.minimum(places, len(part) - 1)] == hashes
    return found


def num_shared(held_out: list[NDArray[np.uint64]], parts: list[NDArray[np.uint64]]) -> int:
    """How many of the documents that are held out are in one of the parts; in pieces, so that little is in memory."""
    pieces = (part[start : start + PIECE] for part in held_out for start in range(0, len(part), PIECE))
    return sum(int(are_among(piece, parts).sum()) for piece in pieces)


def num_in_several(parts: list[NDArray[np.uint64]]) -> int:
    """How many different hashes are in more than one of the parts, each of which is sorted.

    Hashes are spread evenly, so ranges of their values are merged one after another in about `PIECE` entries of memory.
    """
    parts = [part for part in parts if len(part)]
    step = 2**64 * PIECE // max(PIECE, sum(map(len, parts)))
    bounds = np.asarray([*range(step, 2**64, step)], np.uint64)
    edges = [[0, *np.searchsorted(part, bounds).tolist(), len(part)] for part in parts]
    count = 0
    for place in range(len(bounds) + 1):
        pieces = [first_of_each(part[edge[place] : edge[place + 1]]) for part, edge in zip(parts, edges, strict=True)]
        merged = np.sort(np.concatenate([np.zeros(0, DTYPE), *pieces]), kind="stable")  # which merges sorted runs
        count += len(first_of_each(merged[1:][merged[1:] == merged[:-1]]))
    return count


def first_of_each(hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Sorted hashes without repetitions."""
    is_first = np.ones(len(hashes), np.bool_)
    is_first[1:] = hashes[1:] != hashes[:-1]
    return hashes[is_first]


def overlap_notes(dirs: dict[str, Path], split: str = "valid") -> list[str]:
    """One line for every two data sets of which one holds out what the other trains on; for `evaluate` to print.

    Args:
        dirs: data sets by name.
        split: the split that is evaluated on.
    """
    notes = []
    trained = {name: open_hashes(directory, "train") for name, directory in dirs.items()}
    for name, directory in dirs.items():
        held_out = open_hashes(directory, split)
        for other, hashes in trained.items():
            if other == name or held_out is None or hashes is None:
                continue
            shared, size = num_shared(held_out, hashes), sum(map(len, held_out))
            if shared:
                notes.append(
                    f"{shared:,} of the {size:,} {split} documents of {name} are in the training text of "
                    f"{other}: prepare {other} again with data.exclude={directory}"
                )
    return notes
