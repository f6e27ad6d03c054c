"""Token files: Megatron reads what we write, we read what Megatron writes, and damaged files are the user's to know."""

import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flexpert.data import indexed
from flexpert.data.indexed import DTYPES, IndexedTokens, IndexedWriter, token_dtype
from flexpert.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in megatron's writer

DOCUMENTS = [[5, 6, 7, 0], [0], [65499, 1, 0], [*range(1, 300), 0], [2, 0]]
HEADER_BYTES = 9 + 8 + 1 + 8 + 8


@pytest.fixture(scope="module")
def megatron() -> Any:
    """megatron-core's module; it takes seconds to import."""
    return pytest.importorskip("megatron.core.datasets.indexed_dataset")


def write(prefix: Path, documents: list[list[int]], dtype: type[np.integer] = np.uint16) -> Path:
    with IndexedWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add(document)
    return prefix


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_megatron_reads_what_we_write(megatron: Any, dtype: type[np.integer], tmp_path: Path) -> None:
    prefix = write(tmp_path / "train", DOCUMENTS, dtype)
    dataset = megatron.IndexedDataset(str(prefix))
    assert len(dataset) == len(DOCUMENTS)
    assert [dataset[index].tolist() for index in range(len(dataset))] == DOCUMENTS
    assert all(dataset[index].dtype == dtype for index in range(len(dataset)))
    assert dataset.document_indices.tolist() == list(range(len(DOCUMENTS) + 1))
    assert dataset.get(3, offset=10, length=5).tolist() == DOCUMENTS[3][10:15]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_our_files_are_megatrons_byte_for_byte(megatron: Any, dtype: type[np.integer], tmp_path: Path) -> None:
    ours = write(tmp_path / "ours", DOCUMENTS, dtype)
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for document in DOCUMENTS:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for end in (".bin", ".idx"):
        assert ours.with_suffix(end).read_bytes() == (tmp_path / f"theirs{end}").read_bytes()


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_we_read_what_megatron_writes(megatron: Any, dtype: type[np.integer], tmp_path: Path) -> None:
    """A document may be several sequences there, and a prefix may hold a dot."""
    prefix = tmp_path / "news.2024"
    builder = megatron.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    builder.add_document(torch.tensor([1, 2, 3, 4, 5, 0]), [2, 3, 1])
    builder.add_item(torch.tensor([7, 8]))
    builder.add_item(torch.tensor([9, 0]))
    builder.end_document()
    builder.add_document(torch.tensor([65499, 0]), [2])
    builder.finalize(f"{prefix}.idx")
    source = IndexedTokens(prefix)
    assert len(source) == 3
    assert source.lengths.tolist() == [6, 4, 2]
    assert [source.document(index).tolist() for index in range(3)] == [[1, 2, 3, 4, 5, 0], [7, 8, 9, 0], [65499, 0]]
    assert source.tokens.dtype == dtype
    assert source.tokens.tolist() == [1, 2, 3, 4, 5, 0, 7, 8, 9, 0, 65499, 0]


@pytest.mark.parametrize("vocab_size", [1, 65499, 65500, 100278])
def test_we_choose_the_type_that_megatron_chooses(megatron: Any, vocab_size: int) -> None:
    assert token_dtype(vocab_size) is megatron.DType.optimal_dtype(vocab_size)


def test_our_codes_of_types_are_megatrons(megatron: Any) -> None:
    assert all(megatron.DType.dtype_from_code(code) is dtype for code, dtype in DTYPES.items())


@pytest.mark.parametrize("dtype", list(DTYPES.values()))
def test_what_was_written_is_read_back(dtype: type[np.integer], tmp_path: Path) -> None:
    documents = [[1, 2, 0], [100, 0]]
    source = IndexedTokens(write(tmp_path / "train", documents, dtype))
    assert [source.document(index).tolist() for index in range(len(source))] == documents


def test_a_data_set_may_be_empty(tmp_path: Path) -> None:
    source = IndexedTokens(write(tmp_path / "valid", []))
    assert (len(source), len(source.tokens)) == (0, 0)


def test_an_error_while_writing_leaves_no_index(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), IndexedWriter(tmp_path / "train", np.uint16) as writer:
        writer.add([1, 0])
        raise RuntimeError
    assert not (tmp_path / "train.idx").exists()


def test_an_id_that_does_not_fit_is_not_wrapped_around(tmp_path: Path) -> None:
    with pytest.raises(OverflowError), IndexedWriter(tmp_path / "train", np.uint16) as writer:
        writer.add([65536])


def damage(prefix: Path, what: str) -> None:
    index, data = prefix.with_suffix(".idx"), prefix.with_suffix(".bin")
    content = bytearray(index.read_bytes())
    sequences = len(DOCUMENTS)
    boundaries = HEADER_BYTES + 12 * sequences
    if what == "no index":
        index.unlink()
    elif what == "no data":
        data.unlink()
    elif what == "data cut":
        data.write_bytes(data.read_bytes()[:-2])
    elif what == "data longer":
        data.write_bytes(data.read_bytes() + b"\0\0")
    elif what == "data of another":
        data.write_bytes(b"")
    elif what == "empty index":
        index.write_bytes(b"")
    elif what == "index cut in its header":
        index.write_bytes(content[: HEADER_BYTES - 3])
    elif what == "index cut in its lengths":
        index.write_bytes(content[: HEADER_BYTES + 7])
    elif what == "index cut in its boundaries":
        index.write_bytes(content[:-4])
    else:
        offset, form, value = {
            "other magic": (0, "<B", 0),
            "other version": (9, "<Q", 2),
            "unknown type": (17, "<B", 6),
            "endless": (18, "<Q", 2**62),
            "negative length": (HEADER_BYTES, "<i", -4),
            "offsets not in order": (HEADER_BYTES + 4 * sequences + 8, "<q", 2),
            "another last offset": (HEADER_BYTES + 4 * sequences + 8 * (sequences - 1), "<q", 2),
            "boundary beyond the end": (boundaries + 8 * sequences, "<q", sequences + 1),
            "negative boundary": (boundaries + 8, "<q", -1),
            "boundaries not in order": (boundaries + 8, "<q", 3),
        }[what]
        struct.pack_into(form, content, offset, value)
        index.write_bytes(content)


@pytest.mark.parametrize(
    ("what", "part"),
    [
        ("no index", "train.idx does not exist: write it with `flexpert prepare`"),
        ("no data", "train.bin does not exist"),
        ("data cut", "train.bin does not have the size that train.idx says"),
        ("data longer", "train.bin does not have the size"),
        ("data of another", "train.bin does not have the size"),
        ("empty index", "train.idx is not the index of a Megatron indexed dataset"),
        ("index cut in its header", "train.idx is not the index"),
        ("other magic", "train.idx is not the index"),
        ("index cut in its lengths", "train.idx is damaged"),
        ("index cut in its boundaries", "train.idx is damaged"),
        ("other version", "train.idx is damaged or of an unknown version"),
        ("unknown type", "train.idx is damaged"),
        ("endless", "train.idx is damaged"),
        ("negative length", "train.idx is damaged"),
        ("boundary beyond the end", "train.idx is damaged"),
        ("negative boundary", "train.idx is damaged"),
        ("boundaries not in order", "train.idx is damaged"),
        ("offsets not in order", "train.idx is damaged"),
        ("another last offset", "train.bin does not have the size"),
    ],
)
def test_a_damaged_file_is_named(what: str, part: str, tmp_path: Path) -> None:
    prefix = write(tmp_path / "train", DOCUMENTS)
    damage(prefix, what)
    with pytest.raises(UserError) as caught:
        _ = IndexedTokens(prefix).lengths
    assert part in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("what", ["boundary beyond the end", "negative boundary", "boundaries not in order"])
def test_a_document_of_a_damaged_index_is_not_read(what: str, tmp_path: Path) -> None:
    """Also where nobody asked for all lengths: each document is looked at by itself."""
    prefix = write(tmp_path / "train", DOCUMENTS)
    damage(prefix, what)
    source = IndexedTokens(prefix)
    with pytest.raises(UserError, match=r"train\.idx is damaged"):
        for index in range(len(source)):
            source.document(index)


def test_to_open_a_data_set_takes_little_memory_however_many_documents_it_has(tmp_path: Path) -> None:
    count = 300_000
    with IndexedWriter(tmp_path / "train", np.uint16) as writer:
        writer.extend(np.arange(3 * count).astype(np.uint16), np.full(count, 3, np.int32))
    tracemalloc.start()
    source = IndexedTokens(tmp_path / "train")
    assert len(source) == count
    assert source.document(count - 1).tolist() == [index % 65536 for index in range(3 * count - 3, 3 * count)]
    assert source.document(7, max_tokens=2).tolist() == [21, 22]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000


def test_an_index_is_checked_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of entries that are looked at together."""
    for size in range(1, 8):
        monkeypatch.setattr(indexed, "CHECKED_AT_A_TIME", size)
        prefix = write(tmp_path / "train", DOCUMENTS)
        assert IndexedTokens(prefix).lengths.tolist() == [len(document) for document in DOCUMENTS]
        content = bytearray(prefix.with_suffix(".idx").read_bytes())
        for place in range(1, len(DOCUMENTS) - 1):
            wrong = content.copy()
            wrong[HEADER_BYTES + 4 * len(DOCUMENTS) + 8 * place] += 2
            prefix.with_suffix(".idx").write_bytes(wrong)
            with pytest.raises(UserError, match=r"train\.idx is damaged"):
                _ = IndexedTokens(prefix).lengths
