"""Hashes show which documents two data sets share, keep held-out text out of training, and hold no text."""

import shutil
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from corpus import content, json_lines, make_texts, make_tokenizer, manifest, prepare
from numpy.typing import NDArray

from flexpert.data import hashes as hashes_module
from flexpert.data.encode import is_held_out
from flexpert.data.hashes import are_among, document_hash, num_in_several, open_hashes, overlap_notes
from flexpert.data.tokenizer import Tokenizer

OURS, THEIRS = make_texts(60), make_texts(60, seed=1)
HELD_OUT = [text for text in OURS if is_held_out(text, 0.3)]
COPIES = [*HELD_OUT[:5], HELD_OUT[5].upper().replace(" ", "  \n")]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "bpe")


@pytest.fixture(scope="module")
def settings(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Their text, among it six of our held-out documents, one of them in other letters."""
    path = tmp_path_factory.mktemp("theirs")
    (path / "a.jsonl").write_bytes(json_lines([*THEIRS, *COPIES]))
    return [f"data.documents={path}/a.jsonl", f"tokenizer={tokenizer.directory}", "valid_fraction=0"]


@pytest.fixture(scope="module")
def ours(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ours")
    (path / "a.jsonl").write_bytes(json_lines(OURS))
    given = [f"data.documents={path}/a.jsonl", f"tokenizer={tokenizer.directory}"]
    return prepare(path / "out", *given, "valid_fraction=0.3")


def test_a_data_set_has_the_sorted_hashes_of_its_documents(ours: Path) -> None:
    for split, texts in (("valid", HELD_OUT), ("train", [text for text in OURS if text not in HELD_OUT])):
        hashes = open_hashes(ours, split)
        assert hashes is not None
        assert [part.tolist() for part in hashes] == [sorted(map(document_hash, texts))]
        assert (ours / f"{split}.hashes.bin").stat().st_size == 8 * len(texts)


def test_a_hash_does_not_change_between_versions() -> None:
    """Data sets of different owners and years are compared by it."""
    assert f"{document_hash('A document.'):016x}" == "987e200c8fb67aed"


def test_copies_with_other_blanks_and_letters_have_the_same_hash() -> None:
    assert document_hash("Straße  of\nGOLD ") == document_hash("STRASSE of gold")
    assert document_hash("ﬁle") == document_hash("file")
    assert document_hash("a b") != document_hash("ab")


def test_what_another_data_set_holds_out_is_kept_out_of_training(
    ours: Path, settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = prepare(tmp_path / "out", *settings, f"data.exclude=[{ours}]")
    assert content(output, "train") == THEIRS
    assert manifest(output)["dropped"] == {"bad": 0, "empty": 0, "duplicates": 0, "excluded": 6}
    assert "left out 6 excluded" in capsys.readouterr().out
    assert overlap_notes({"ours": ours, "theirs": output}) == []


def test_held_out_documents_that_another_set_trains_on_are_told(
    ours: Path, settings: list[str], tmp_path: Path
) -> None:
    output = prepare(tmp_path / "out", *settings)
    assert content(output, "train") == [*THEIRS, *COPIES]
    assert overlap_notes({"ours": ours, "theirs": output}) == [
        f"6 of the {len(HELD_OUT)} valid documents of ours are in the training text of theirs: prepare theirs again "
        f"with data.exclude={ours}"
    ]


def test_a_data_set_without_hashes_is_not_compared_and_cannot_be_excluded(
    ours: Path, settings: list[str], tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f"data.{key}={tmp_path}/{key}.npy" for key in ("tokens", "valid_tokens")]
    for key in ("tokens", "valid_tokens"):
        np.arange(2, 200, dtype=np.uint16).tofile(tmp_path / f"{key}.npy")
    tokens = prepare(tmp_path / "tokens", *given, "data.token_dtype=uint16", f"tokenizer={tokenizer.directory}")
    assert open_hashes(tokens, "train") is None
    assert overlap_notes({"ours": ours, "tokens": tokens}) == []
    with pytest.raises(SystemExit) as ended:
        prepare(tmp_path / "out", *settings, f"data.exclude=[{tokens}]")
    assert ended.value.code == 2
    assert f"data.exclude={tokens} has no valid.hashes.bin" in capsys.readouterr().err


def random_parts(generator: np.random.Generator) -> list[NDArray[np.uint64]]:
    """Sorted parts of several sizes, none and both ends of the range among them, with repetitions in and between."""
    known = np.concatenate([generator.integers(0, 2**64, 60, np.uint64), np.asarray([0, 2**64 - 1], np.uint64)])
    return [np.sort(generator.choice(known, size)) for size in (40, 0, 1, 25)]


def test_hashes_are_found_in_sorted_parts() -> None:
    """Against np.isin over all of them."""
    generator = np.random.default_rng(0)
    for _ in range(50):
        parts = random_parts(generator)
        every = np.concatenate(parts)
        asked = np.concatenate([every[::3], every[::5] + np.uint64(1), generator.integers(0, 2**64, 9, np.uint64)])
        assert np.array_equal(are_among(asked, parts), np.isin(asked, every))
        assert are_among(asked, []).sum() == 0


def test_hashes_in_several_parts_are_counted_range_by_range(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against sets, however small the ranges."""
    generator = np.random.default_rng(1)
    for piece in (1, 3, 10, 1 << 22):
        monkeypatch.setattr(hashes_module, "PIECE", piece)
        for _ in range(20):
            parts = random_parts(generator)
            several = Counter(value for part in parts for value in set(part.tolist()))
            assert num_in_several(parts) == sum(count > 1 for count in several.values())
        assert num_in_several([]) == num_in_several([parts[1]]) == 0


def test_what_is_compared_is_neither_copied_nor_sorted(ours: Path, tmp_path: Path) -> None:
    """A data set of a million hashes; the memory for comparing sixty documents with it does not depend on them."""
    large = Path(shutil.copytree(ours, tmp_path / "large"))
    own = np.fromfile(ours / "valid.hashes.bin", np.uint64)
    many = np.random.default_rng(2).integers(0, 2**64, 1_000_000, np.uint64)
    np.sort(np.concatenate([many, own[:4]])).tofile(large / "train.hashes.bin")
    tracemalloc.start()
    (note,) = overlap_notes({"ours": ours, "large": large})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert note.startswith(f"4 of the {len(own)} valid documents of ours are in the training text of large")
    assert peak < 100_000
