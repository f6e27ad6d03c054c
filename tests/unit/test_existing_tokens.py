"""Token files that others made are read where they are, and those of another type or vocabulary are refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from corpus import make_texts, make_tokenizer, manifest, prepare
from numpy.typing import NDArray

from flexpert.data.dataset import TokenWindows, read_manifest
from flexpert.data.existing import END_TOKENS, sample
from flexpert.data.indexed import IndexedTokens, IndexedWriter
from flexpert.data.tokenizer import Tokenizer, load_tokenizer
from flexpert.errors import UserError

TEXTS = make_texts(50)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "bpe")


@pytest.fixture(scope="module")
def documents(tokenizer: Tokenizer) -> list[list[int]]:
    return [[*tokenizer.encode(text), tokenizer.eos_id] for text in TEXTS]


def raw(documents: list[list[int]], dtype: str) -> NDArray[Any]:
    return np.asarray([token for document in documents for token in document], dtype)


def write_olmo(directory: Path, documents: list[list[int]], dtype: str = "uint16") -> list[str]:
    """Two memory maps with the name, and without the header, of a .npy file."""
    for number, part in enumerate((documents[:20], documents[20:])):
        raw(part, dtype).tofile(directory / f"part-{number}-00000.npy")
    return [f"data.tokens={directory}/part-*.npy", f"data.token_dtype={dtype}"]


def write_npy(directory: Path, documents: list[list[int]]) -> list[str]:
    for number, part in enumerate((documents[:20], documents[20:])):
        np.save(directory / f"{number}.npy", raw(part, "uint32"))
    return [f"data.tokens={directory}/*.npy"]


def write_megatron(directory: Path, documents: list[list[int]]) -> list[str]:
    for number, part in enumerate((documents[:20], documents[20:])):
        with IndexedWriter(directory / f"web.{number}_text_document", np.int32) as writer:
            for document in part:
                writer.add(document)
    return [f"data.tokens={directory}/web.*_text_document"]


def write_megatron_files(directory: Path, documents: list[list[int]]) -> list[str]:
    write_megatron(directory, documents)
    return [f"data.tokens={directory}/*.bin"]


def write_uint32(directory: Path, documents: list[list[int]]) -> list[str]:
    return write_olmo(directory, documents, "uint32")


@pytest.mark.parametrize("write", [write_olmo, write_uint32, write_npy, write_megatron, write_megatron_files])
def test_files_of_every_kind_are_read_where_they_are(
    write: Any, documents: list[list[int]], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    given = write(tmp_path / "in", documents)
    output = prepare(tmp_path / "out", *given, f"tokenizer={tokenizer.directory}")
    source = IndexedTokens(output / "train")
    assert [source.document(index).tolist() for index in range(len(source))] == documents
    assert source.lengths.tolist() == [len(document) for document in documents]
    num_tokens = sum(map(len, documents))
    assert manifest(output)["splits"]["train"]["tokens"] == source.num_tokens == num_tokens
    assert len(IndexedTokens(output / "valid")) == 0
    assert read_manifest(output).tokenizer_digest == tokenizer.digest
    assert load_tokenizer(output / "tokenizer").digest == tokenizer.digest
    assert sum(path.stat().st_size for path in output.glob("*") if path.suffix in (".bin", ".npy")) == 0
    length = 16
    windows = TokenWindows(output, "train", length, 0)
    parts = [[t for d in documents[:20] for t in d], [t for d in documents[20:] for t in d]]
    expected = [part[start : start + length + 1] for part in parts for start in range(0, len(part) - length, length)]
    assert sorted(windows.sequences(0, windows.num_sequences).tolist()) == sorted(expected)


def test_held_out_tokens_are_files_of_their_own(
    documents: list[list[int]], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    for split, part in (("train", documents[:40]), ("valid", documents[40:])):
        raw(part, "uint16").tofile(tmp_path / f"{split}.npy")
    given = [f"data.tokens={tmp_path}/train.npy", f"data.valid_tokens={tmp_path}/valid.npy", "data.token_dtype=uint16"]
    output = prepare(tmp_path / "out", *given, f"tokenizer={tokenizer.directory}")
    source = IndexedTokens(output / "valid")
    assert [source.document(index).tolist() for index in range(len(source))] == documents[40:]


def test_tokens_after_the_last_end_of_text_are_a_document(tokenizer: Tokenizer, tmp_path: Path) -> None:
    np.asarray([5, 6, tokenizer.eos_id, 7, 8], np.uint16).tofile(tmp_path / "a.npy")
    given = [f"data.tokens={tmp_path}/a.npy", "data.token_dtype=uint16", f"tokenizer={tokenizer.directory}"]
    source = IndexedTokens(prepare(tmp_path / "out", *given) / "train")
    assert [source.document(index).tolist() for index in range(len(source))] == [[5, 6, tokenizer.eos_id], [7, 8]]


def test_a_model_trains_on_them_as_on_prepared_text(
    documents: list[list[int]], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """The same tokens in one raw file and in a Megatron dataset give the same sequences in the same order."""
    raw(documents, "uint32").tofile(tmp_path / "a.npy")
    with IndexedWriter(tmp_path / "train", np.uint16) as writer:
        for document in documents:
            writer.add(document)
    given = [f"data.tokens={tmp_path}/a.npy", "data.token_dtype=uint32", f"tokenizer={tokenizer.directory}"]
    output = prepare(tmp_path / "out", *given)
    ours, theirs = (TokenWindows(path, "train", 32, seed=1).sequences(0, 60) for path in (output, tmp_path))
    assert torch.equal(ours, theirs)


WIDE = np.arange(200, dtype=np.uint32)
#: Content of a.npy, further overrides, and what the line must hold beside the path.
BAD: list[tuple[bytes, list[str], str]] = [
    (WIDE.tobytes(), [], "give data.token_dtype=uint16 or uint32"),
    (WIDE.tobytes()[:-1], ["data.token_dtype=uint32"], "has 799 bytes, not one id of 4 bytes after another"),
    (b"", ["data.token_dtype=uint32"], "has 0 bytes"),
    (WIDE.tobytes(), ["data.token_dtype=uint16"], "set data.token_dtype=uint32"),
    (WIDE.astype(np.uint16).tobytes(), ["data.token_dtype=uint32"], "it is of another tokenizer or another data.token"),
    ((WIDE + 200).tobytes(), ["data.token_dtype=uint32"], "holds the id 399 when read as uint32"),
    (np.asarray([5, -1], np.int32).tobytes(), ["data.token_dtype=int32"], "holds the id -1 when read as int32"),
]


def refused(capsys: pytest.CaptureFixture[str], output: Path, *overrides: str) -> str:
    with pytest.raises(SystemExit) as ended:
        prepare(output, *overrides)
    line = capsys.readouterr().err
    assert (ended.value.code, line.count("\n")) == (2, 1)
    assert not output.exists()
    return line


@pytest.mark.parametrize(("data", "overrides", "part"), BAD, ids=[row[2] for row in BAD])
def test_a_file_of_another_kind_is_refused(
    data: bytes, overrides: list[str], part: str, tokenizer: Tokenizer, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "a.npy").write_bytes(data)
    given = [f"data.tokens={tmp_path}/a.npy", f"tokenizer={tokenizer.directory}", *overrides]
    line = refused(capsys, tmp_path / "out", *given)
    assert part in line
    assert f"{tmp_path}/a.npy" in line


def test_a_real_npy_file_of_another_content_is_refused(
    tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f"data.tokens={tmp_path}/a.npy", f"tokenizer={tokenizer.directory}"]
    np.save(tmp_path / "a.npy", np.zeros((3, 4), np.uint16))
    assert "holds uint16 of shape (3, 4), and not a list of token ids" in refused(capsys, tmp_path / "out", *given)
    np.save(tmp_path / "a.npy", np.zeros(12))
    assert "holds float64 of shape (12,)" in refused(capsys, tmp_path / "out", *given)
    np.save(tmp_path / "a.npy", np.zeros(12, np.uint16))
    line = refused(capsys, tmp_path / "out", *given, "data.token_dtype=uint32")
    assert "holds uint16 by its own header: leave out data.token_dtype=uint32" in line


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["data.tokens=/none/*.npy"], "data.tokens=/none/*.npy matches no file"),
        (["data.tokens=a", "data.documents=b"], "data.documents=… or data.tokens=…, one of them"),
        (["data.tokens=a", "data.deduplicate=true"], "data.deduplicate=True needs text"),
        (["data.documents=a", "data.token_dtype=uint16"], "data.token_dtype goes with data.tokens=GLOB"),
        (["data.tokens=a", "data.token_dtype=float32"], "data.token_dtype=float32 is not one of uint16"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    overrides: list[str], part: str, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert part in refused(capsys, tmp_path / "out", *overrides, f"tokenizer={tokenizer.directory}")


def test_files_that_were_moved_or_changed_are_named(
    documents: list[list[int]], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    given = write_olmo(tmp_path, documents)
    output = prepare(tmp_path / "out", *given, f"tokenizer={tokenizer.directory}")
    with (tmp_path / "part-0-00000.npy").open("ab") as file:
        file.write(b"\0\0")
    with pytest.raises(UserError, match=r"part-0-00000\.npy had .* bytes and has"):
        IndexedTokens(output / "train")
    (tmp_path / "part-0-00000.npy").unlink()
    with pytest.raises(UserError, match=r"part-0-00000\.npy does not exist any more"):
        IndexedTokens(output / "train")


def test_ids_of_a_type_that_cannot_hold_the_vocabulary_are_refused(
    documents: list[list[int]], tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where all ids that are there happen to be small."""
    ids = np.minimum(raw(documents, "uint32"), 255).astype(np.uint8)
    np.save(tmp_path / "a.npy", ids)
    line = refused(capsys, tmp_path / "out", f"data.tokens={tmp_path}/a.npy", f"tokenizer={tokenizer.directory}")
    size = tokenizer.vocab_size
    assert f"{tmp_path}/a.npy holds uint8, which goes to 255, and {tokenizer.directory} has {size} ids" in line


def without_ends(count: int) -> NDArray[Any]:
    return np.random.default_rng(0).integers(5, 290, count, np.uint16)


def test_a_long_file_without_an_end_of_text_is_refused(
    tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f"data.tokens={tmp_path}/a.npy", "data.token_dtype=uint16", f"tokenizer={tokenizer.directory}"]
    tokens = without_ends(2_000_000)
    tokens.tofile(tmp_path / "a.npy")
    line = refused(capsys, tmp_path / "out", *given)
    assert f"{tmp_path}/a.npy holds {tokenizer.eos_id}, the end-of-text id of {tokenizer.directory}, neither in" in line
    assert f"write {tokenizer.eos_id} after every document; if it is a single long one, at its end" in line
    tokens[-1] = tokenizer.eos_id  # what the line says
    tokens.tofile(tmp_path / "a.npy")
    assert len(IndexedTokens(prepare(tmp_path / "single", *given) / "train")) == 1


def test_ends_of_long_documents_are_found_where_the_sample_has_none(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokens = without_ends(2_000_000)
    places = np.random.default_rng(1).integers(END_TOKENS, len(tokens) - END_TOKENS, 400)
    place = next(int(place) for place in places if not ends_in_sample(tokens, int(place), tokenizer.eos_id))
    tokens[place] = tokenizer.eos_id
    tokens.tofile(tmp_path / "a.npy")
    given = [f"data.tokens={tmp_path}/a.npy", "data.token_dtype=uint16", f"tokenizer={tokenizer.directory}"]
    assert IndexedTokens(prepare(tmp_path / "out", *given) / "train").lengths[0] == place + 1


def ends_in_sample(tokens: NDArray[Any], place: int, eos_id: int) -> bool:
    changed = tokens.copy()
    changed[place] = eos_id
    return bool((sample(changed) == eos_id).any())


def test_a_megatron_dataset_without_ends_of_documents_is_refused(
    documents: list[list[int]], tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = write_megatron(tmp_path, [document[:-1] for document in documents])
    line = refused(capsys, tmp_path / "out", *given, f"tokenizer={tokenizer.directory}")
    assert f"20 of 20 documents of {tmp_path}/web.0_text_document do not end in {tokenizer.eos_id}" in line
    assert "--append-eod" in line


def test_a_file_is_not_trained_on_and_held_out(
    documents: list[list[int]], tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither by one name nor by another."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in2").mkdir()
    raw(documents, "uint16").tofile(tmp_path / "in/a.npy")
    (tmp_path / "in2/b.npy").symlink_to(tmp_path / "in/a.npy")
    for held_out in ("in/*.npy", "in2/*.npy"):
        given = [f"data.tokens={tmp_path}/in/*.npy", f"data.valid_tokens={tmp_path}/{held_out}"]
        line = refused(capsys, tmp_path / "out", *given, "data.token_dtype=uint16", f"tokenizer={tokenizer.directory}")
        assert ".npy is in data.tokens and in data.valid_tokens" in line
    write_megatron(tmp_path, documents)
    given = [f"data.{key}={tmp_path}/web.0_text_document" for key in ("tokens", "valid_tokens")]
    line = refused(capsys, tmp_path / "out", *given, f"tokenizer={tokenizer.directory}")
    assert "web.0_text_document.bin is in data.tokens and in data.valid_tokens" in line


@pytest.mark.parametrize("write", [write_olmo, write_megatron])
def test_the_digest_of_a_data_set_is_of_the_tokens_that_it_refers_to(
    write: Any, documents: list[list[int]], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """As many bytes under the same name, and others: it is another data set."""
    digests = []
    other = [[*documents[0][-2::-1], tokenizer.eos_id], *documents[1:]]
    for number, content in enumerate((documents, documents, other)):
        (tmp_path / "in").mkdir(exist_ok=True)
        given = write(tmp_path / "in", content)
        output = prepare(tmp_path / f"out{number}", *given, f"tokenizer={tokenizer.directory}")
        digests.append(read_manifest(output).digest)
    assert digests[0] == digests[1] != digests[2]
