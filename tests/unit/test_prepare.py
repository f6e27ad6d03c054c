"""`flexpert prepare`: the same data set from every format, a split by hash, a true manifest, and all or nothing."""

import gzip
import hashlib
import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
import zstandard

import flexpert.data.tokenizer
from flexpert import signals
from flexpert.cli import main
from flexpert.data.dataset import read_manifest
from flexpert.data.indexed import IndexedTokens
from flexpert.data.prepare import is_held_out
from flexpert.data.tokenizer import PIECE, Tokenizer, load_tokenizer, train_tokenizer
from flexpert.records import sha256_file

WORDS = ["one", "two", "naïve", "日本", "😀", "a\r\nb", "x = 3.14", '"quoted"', "\ttab", "\u2028", "end."]


def make_texts(count: int) -> list[str]:
    generator = random.Random(0)
    return [f"{index}: {' '.join(generator.choices(WORDS, k=generator.randint(1, 30)))}" for index in range(count)]


TEXTS = make_texts(60)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer(TEXTS, 320, tmp_path_factory.mktemp("tokenizer") / "bpe")


def json_lines(texts: list[str], field: str = "text") -> bytes:
    return b"".join(json.dumps({"id": 1, field: text}).encode() + b"\n" for text in texts)


def write_jsonl(directory: Path, texts: list[str]) -> str:
    (directory / "all.jsonl").write_bytes(json_lines(texts))
    return "*.jsonl"


def write_gz(directory: Path, texts: list[str]) -> str:
    """Two members, as `cat a.gz b.gz` makes them."""
    half = len(texts) // 2
    members = [gzip.compress(json_lines(part)) for part in (texts[:half], texts[half:])]
    (directory / "all.jsonl.gz").write_bytes(b"".join(members))
    return "*.jsonl.gz"


def write_zst(directory: Path, texts: list[str]) -> str:
    """Two frames, as `cat a.zst b.zst` makes them."""
    half = len(texts) // 2
    frames = [zstandard.ZstdCompressor().compress(json_lines(part)) for part in (texts[:half], texts[half:])]
    (directory / "all.jsonl.zst").write_bytes(b"".join(frames))
    return "*.jsonl.zst"


def write_parquet(directory: Path, texts: list[str]) -> str:
    table = pyarrow.table({"id": range(len(texts)), "text": texts})
    pyarrow.parquet.write_table(table, directory / "all.parquet", row_group_size=7)
    return "*.parquet"


def write_txt(directory: Path, texts: list[str]) -> str:
    """A document a file, some of them in folders."""
    for index, text in enumerate(texts):
        folder = directory / f"{index // 20}"
        folder.mkdir(exist_ok=True)
        (folder / f"{index:04}.txt").write_bytes(text.encode())
    return "**/*.txt"


def write_several_jsonl(directory: Path, texts: list[str]) -> str:
    """Windows line ends, blank lines, and no newline at the end."""
    for index in range(0, len(texts), 25):
        content = json_lines(texts[index : index + 25]).replace(b"\n", b"\r\n\r\n").rstrip()
        (directory / f"part-{index:03}.json").write_bytes(content)
    return "part-*.json"


FORMATS = [write_gz, write_zst, write_parquet, write_txt, write_several_jsonl]


def prepare(output: Path, documents: str, *overrides: str) -> Path:
    main(["prepare", f"data.documents={documents}", f"output_dir={output}", *overrides])
    return output


def content(directory: Path, split: str) -> list[str]:
    """Decoded documents of a split."""
    tokenizer, source = load_tokenizer(directory / "tokenizer"), IndexedTokens(directory / split)
    return [tokenizer.decode(source.document(index)[:-1]) for index in range(len(source))]


@pytest.fixture(scope="module")
def from_jsonl(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("jsonl")
    pattern = write_jsonl(directory, TEXTS)
    return prepare(
        directory / "out",
        f"{directory}/{pattern}",
        f"tokenizer={tokenizer.directory}",
        "valid_fraction=0.3",
        "data.license=CC0-1.0",
        "data.answer_marker=Answer:",
    )


@pytest.mark.parametrize("write", FORMATS)
def test_every_format_gives_the_same_data_set(
    write: Callable[[Path, list[str]], str], from_jsonl: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    pattern = write(tmp_path, TEXTS)
    output = prepare(
        tmp_path / "out", f"{tmp_path}/{pattern}", f"tokenizer={tokenizer.directory}", "valid_fraction=0.3"
    )
    for name in ("train.bin", "train.idx", "valid.bin", "valid.idx", "tokenizer/tokenizer.json"):
        assert (output / name).read_bytes() == (from_jsonl / name).read_bytes()
    manifests = [json.loads((directory / "manifest.json").read_text()) for directory in (output, from_jsonl)]
    assert manifests[0]["splits"] == manifests[1]["splits"]


def test_every_document_is_there_once_and_as_it_was(from_jsonl: Path) -> None:
    train, valid = content(from_jsonl, "train"), content(from_jsonl, "valid")
    assert sorted(train + valid) == sorted(TEXTS)
    assert train == [text for text in TEXTS if not is_held_out(text, 0.3)]
    assert 5 < len(valid) < 30


@pytest.mark.parametrize("split", ["train", "valid"])
def test_every_document_ends_in_the_end_of_text_token_and_holds_no_other(
    split: str, from_jsonl: Path, tokenizer: Tokenizer
) -> None:
    source = IndexedTokens(from_jsonl / split)
    for index in range(len(source)):
        ids = source.document(index)
        assert ids[-1] == tokenizer.eos_id
        assert tokenizer.eos_id not in ids[:-1]


def test_the_manifest_is_true(from_jsonl: Path, tokenizer: Tokenizer) -> None:
    record = json.loads((from_jsonl / "manifest.json").read_text())
    assert (record["kind"], record["schema_version"]) == ("flexpert.data", 1)
    assert (record["license"], record["answer_marker"]) == ("CC0-1.0", "Answer:")
    for split in ("train", "valid"):
        entry, source = record["splits"][split], IndexedTokens(from_jsonl / split)
        assert entry["documents"] == len(source)
        assert entry["tokens"] == len(source.tokens)
        assert entry["bytes"] == sum(len(text.encode()) for text in content(from_jsonl, split))
        assert entry["files"] == {
            f"{split}{end}": hashlib.sha256((from_jsonl / f"{split}{end}").read_bytes()).hexdigest()
            for end in (".bin", ".idx")
        }
    manifest = read_manifest(from_jsonl)
    assert (manifest.vocab_size, manifest.eos_id) == (tokenizer.vocab_size, tokenizer.eos_id)
    assert manifest.tokenizer_digest == tokenizer.digest == load_tokenizer(manifest.tokenizer_dir).digest
    assert manifest.answer_marker == "Answer:"
    assert (from_jsonl / "resolved.yaml").read_text().count("CC0-1.0") == 1


def test_copies_of_a_document_are_all_in_one_split(tokenizer: Tokenizer, tmp_path: Path) -> None:
    copies = TEXTS * 3
    random.Random(1).shuffle(copies)
    write_jsonl(tmp_path, copies)
    output = prepare(tmp_path / "out", f"{tmp_path}/*.jsonl", f"tokenizer={tokenizer.directory}", "valid_fraction=0.3")
    train, valid = content(output, "train"), content(output, "valid")
    assert valid
    assert not set(train) & set(valid)
    assert sorted(train + valid) == sorted(copies)


def test_the_split_does_not_depend_on_the_order_of_documents(
    from_jsonl: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    for index, part in enumerate((TEXTS[40:], TEXTS[20:40], TEXTS[:20])):
        (tmp_path / f"{index}.jsonl").write_bytes(json_lines(part))
    output = prepare(tmp_path / "out", f"{tmp_path}/*.jsonl", f"tokenizer={tokenizer.directory}", "valid_fraction=0.3")
    for split in ("train", "valid"):
        assert content(output, split) != content(from_jsonl, split)
        assert sorted(content(output, split)) == sorted(content(from_jsonl, split))


def test_about_the_asked_share_is_held_out() -> None:
    texts = [str(index) for index in range(20_000)]
    assert abs(sum(is_held_out(text, 0.1) for text in texts) / len(texts) - 0.1) < 0.01
    assert not any(is_held_out(text, 0.0) for text in texts)


def test_a_larger_share_holds_out_the_same_documents_and_more() -> None:
    assert all(is_held_out(text, 0.4) for text in TEXTS if is_held_out(text, 0.2))


def test_the_documents_beyond_valid_documents_are_dropped_and_do_not_become_training_text(
    from_jsonl: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    write_jsonl(tmp_path, TEXTS)
    output = prepare(
        tmp_path / "out",
        f"{tmp_path}/*.jsonl",
        f"tokenizer={tokenizer.directory}",
        "valid_fraction=0.3",
        "valid_documents=2",
    )
    assert content(output, "train") == content(from_jsonl, "train")
    assert content(output, "valid") == content(from_jsonl, "valid")[:2]


def test_a_tokenizer_trained_on_the_spot_sees_no_held_out_text(tmp_path: Path) -> None:
    held_out = [text for text in TEXTS if is_held_out(text, 0.3)]
    texts = [f"{text} {'zyx' * 50}" if text in held_out else text for text in TEXTS]
    texts = [text for text in texts if is_held_out(text, 0.3) or "zyx" not in text]
    write_jsonl(tmp_path, texts)
    assert any("zyx" in text for text in texts)
    output = prepare(tmp_path / "out", f"{tmp_path}/*.jsonl", "train_tokenizer.vocab_size=400", "valid_fraction=0.3")
    assert not [token for token in load_tokenizer(output / "tokenizer").backend.get_vocab() if "zy" in token]
    assert sorted(content(output, "train") + content(output, "valid")) == sorted(texts)


def test_a_tokenizer_reads_a_book_in_pieces_and_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut where one white space stands alone, no word is cut; where there is none, nothing is lost."""
    book = "\n\n        ".join(TEXTS * 100)
    assert len(list(PIECE.finditer(book))) > 2
    assert [piece[0] for text in TEXTS for piece in PIECE.finditer(text)] == TEXTS, "short ones are read whole"
    in_pieces = train_tokenizer([book], 340, tmp_path / "pieces")
    no_space = "日本語" * 50_000
    assert "".join(piece[0] for piece in PIECE.finditer(no_space)) == no_space
    monkeypatch.setattr(flexpert.data.tokenizer, "PIECE", re.compile("(?s).+"))
    assert in_pieces.digest == train_tokenizer([book], 340, tmp_path / "whole").digest


def test_training_a_tokenizer_stops_when_it_is_told_to(tmp_path: Path) -> None:
    def told(number: int, frame: object) -> None:
        raise signals.Stopped

    def documents() -> Iterator[str]:
        os.kill(os.getpid(), signal.SIGUSR1)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            yield TEXTS[0]
        pytest.fail("it is read on")

    before = signal.signal(signal.SIGUSR1, told)
    try:
        with pytest.raises(signals.Stopped):
            train_tokenizer(documents(), 300, tmp_path / "tokenizer")
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert not (tmp_path / "tokenizer").exists()


def test_empty_documents_are_left_out(tokenizer: Tokenizer, tmp_path: Path) -> None:
    write_jsonl(tmp_path, ["", *TEXTS[:5], ""])
    output = prepare(tmp_path / "out", f"{tmp_path}/*.jsonl", f"tokenizer={tokenizer.directory}", "valid_fraction=0")
    assert content(output, "train") == TEXTS[:5]
    assert content(output, "valid") == []


def test_a_file_whose_name_holds_brackets_is_read(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "part [1], (a=b).jsonl"
    path.write_bytes(json_lines(TEXTS[:5]))
    output = prepare(tmp_path / "out", str(path), f"tokenizer={tokenizer.directory}", "valid_fraction=0")
    assert content(output, "train") == TEXTS[:5]


def test_another_field_can_hold_the_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(TEXTS[:5], field="body"))
    output = prepare(
        tmp_path / "out",
        f"{tmp_path}/*.jsonl",
        f"tokenizer={tokenizer.directory}",
        "data.text_field=body",
        "valid_fraction=0",
    )
    assert content(output, "train") == TEXTS[:5]


GOOD = json_lines(TEXTS[:20])
ROWS = "".join(f'{{"text": "{random.Random(index).getrandbits(4000):x}"}}\n' for index in range(400)).encode()
GZ, ZST = gzip.compress(ROWS), zstandard.ZstdCompressor().compress(ROWS)
#: Two frames: a cut in the second one has only good text before it.
ZST_OF_TWO = zstandard.ZstdCompressor().compress(ROWS) + zstandard.ZstdCompressor().compress(ROWS)


def parquet(**columns: list[object]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(columns), sink)
    return bytes(sink.getvalue())


#: File name, its bytes, and what the message must hold beside the path.
BAD_FILES: list[tuple[str, bytes, tuple[str, ...]]] = [
    ("a.jsonl", b"", ("leaves no training document",)),
    ("a.jsonl", b"\n\n", ("leaves no training document",)),
    ("a.jsonl", b'{"text": ""}\n', ("leaves no training document",)),
    ("a.txt", b"", ("leaves no training document",)),
    ("a.jsonl", GOOD + b'{"body": "x"}\n', ("a.jsonl line 21 has no text field 'text'", "data.text_field")),
    ("a.jsonl", GOOD + b'{"text": 3}\n', ("a.jsonl line 21 has no text field 'text'",)),
    ("a.jsonl", GOOD + b'{"text": null}\n', ("a.jsonl line 21 has no text field 'text'",)),
    ("a.jsonl", GOOD + b'["text"]\n', ("a.jsonl line 21 has no text field 'text'",)),
    ("a.jsonl", GOOD + b'{"text": "x"\n' + GOOD, ("a.jsonl line 21 is not JSON",)),
    ("a.jsonl", GOOD[:-9], ("a.jsonl line 20 is not JSON",)),
    ("a.jsonl", GOOD + b'{"text": "\xff"}\n', ("a.jsonl line 21 is not UTF-8 text",)),
    ("a.jsonl", GOOD + b'{"text": "\\ud800"}\n', ("a.jsonl line 21 is not UTF-8 text",)),
    ("a.txt", b"caf\xe9", ("a.txt is not UTF-8 text (byte 3)",)),
    ("a.jsonl.gz", GZ[: len(GZ) // 2], ("a.jsonl.gz cannot be read after line",)),
    ("a.jsonl.gz", GZ[:-1], ("a.jsonl.gz cannot be read after line 400",)),
    ("a.jsonl.gz", GZ[:5000] + b"xxxxxxxx" + GZ[5008:], ("a.jsonl.gz cannot be read after line",)),
    ("a.jsonl.gz", ROWS, ("a.jsonl.gz cannot be read after line 0", "gzip")),
    ("a.jsonl.zst", ZST[: len(ZST) // 2], ("a.jsonl.zst cannot be read after line",)),
    ("a.jsonl.zst", ZST[:-1], ("a.jsonl.zst cannot be read after line",)),
    ("a.jsonl.zst", ZST[:9], ("a.jsonl.zst cannot be read after line 0", "ended inside a frame")),
    ("a.jsonl.zst", ZST_OF_TWO[: len(ZST) + 9], ("a.jsonl.zst cannot be read after line 400", "inside a frame")),
    ("a.jsonl.zst", ROWS, ("a.jsonl.zst cannot be read after line 0", "zstd")),
    ("a.parquet", parquet(body=["x"]), ("a.parquet has no column 'text'", "data.text_field", "['body']")),
    ("a.parquet", parquet(text=["x", "y", None]), ("a.parquet row 3 has no value", "'text'")),
    ("a.parquet", parquet(text=[1]), ("a.parquet row 1 has a int", "'text'")),
    ("a.parquet", parquet(text=["x"])[:-4], ("a.parquet cannot be read as parquet",)),
    ("a.parquet", b"PAR1" + bytes(64) + parquet(text=["x" * 999])[68:], ("a.parquet cannot be read as parquet",)),
    ("a.parquet", b"", ("a.parquet cannot be read as parquet",)),
]


def refused(output: Path, capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    """`prepare` ends with status 2 and one line, and nothing is left where it was to write."""
    before = sorted(output.parent.iterdir())
    with pytest.raises(SystemExit) as ended:
        main(["prepare", f"output_dir={output}", *overrides])
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert error.count("\n") == 1
    assert sorted(output.parent.iterdir()) == before
    return error


@pytest.mark.parametrize("trained", [False, True], ids=["tokenizer", "train_tokenizer"])
@pytest.mark.parametrize(("name", "data", "parts"), BAD_FILES, ids=[f"{row[0]} {row[2][0]}" for row in BAD_FILES])
def test_a_bad_file_is_named_and_nothing_is_written(
    name: str,
    data: bytes,
    parts: tuple[str, ...],
    trained: bool,
    tokenizer: Tokenizer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(data)
    given = "train_tokenizer.vocab_size=300" if trained else f"tokenizer={tokenizer.directory}"
    line = refused(tmp_path / "out", capsys, f"data.documents={tmp_path}/in/*", given, "valid_fraction=0")
    assert not [part for part in parts if part not in line], line


def test_a_pattern_without_a_match_is_refused(
    tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder").mkdir()
    line = refused(tmp_path / "out", capsys, f"data.documents={tmp_path}/folder", f"tokenizer={tokenizer.directory}")
    assert f"data.documents={tmp_path}/folder is a directory: give the files in it" in line
    for pattern in (f"{tmp_path}/*.jsonl", ""):
        line = refused(tmp_path / "out", capsys, f"data.documents={pattern}", f"tokenizer={tokenizer.directory}")
        assert f"data.documents={pattern} matches no file" in line


@pytest.mark.parametrize("name", ["table.csv", "Report.PDF"])
def test_a_file_that_is_no_plain_text_is_not_read_as_one_document(
    name: str, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text("id,text\n1,hello\n", encoding="utf-8")
    line = refused(tmp_path / "out", capsys, f"data.documents={tmp_path}/{name}", f"tokenizer={tokenizer.directory}")
    assert f"{tmp_path}/{name} is no plain text" in line


def test_a_complete_data_set_is_not_taken_for_one_of_other_files(
    tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("some text", encoding="utf-8")
    overrides = [f"data.documents={tmp_path}/*.txt", f"tokenizer={tokenizer.directory}", "valid_fraction=0"]
    command = ["prepare", f"output_dir={tmp_path}/out", *overrides]
    main(command)
    main(command)
    (tmp_path / "b.txt").write_text("more text", encoding="utf-8")
    line = refused(tmp_path / "out", capsys, *overrides)
    assert "was made of 1 files" in line and "matches 2 now" in line
    for file in tmp_path.glob("*.txt"):
        file.unlink()
    main(command)  # what it was made from need not stay
    assert capsys.readouterr().out.endswith("is complete\n")


def test_an_unknown_demo_corpus_is_refused_with_the_known_ones(
    tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(tmp_path / "out", capsys, "data.documents=demo:poems", f"tokenizer={tokenizer.directory}")
    assert "'poems'" in line
    assert "math" in line


def test_a_directory_that_is_no_tokenizer_is_refused(
    tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(tmp_path, TEXTS)
    broken = tmp_path / "tokenizer"

    def line() -> str:
        return refused(tmp_path / "out", capsys, f"data.documents={tmp_path}/*.jsonl", f"tokenizer={broken}")

    assert f"{broken} does not exist" in line()
    broken.mkdir()
    assert f"tokenizer={broken}" in line() and "has no tokenizer.json" in line()
    shutil.copytree(tokenizer.directory, broken, dirs_exist_ok=True)
    (broken / "tokenizer_config.json").write_text("{}")
    assert "names no eos_token" in line()
    (broken / "tokenizer_config.json").write_text('{"eos_token": "<|unheard of|>"}')
    assert "names no eos_token that is in the vocabulary" in line()
    (broken / "tokenizer_config.json").unlink()
    assert "tokenizer_config.json does not exist" in line()
    (broken / "tokenizer.json").write_text("{}")
    assert "tokenizer.json cannot be read" in line()


def test_a_tokenizer_that_loses_text_is_refused(
    tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bits per byte are of the text, which must come back from its tokens."""
    write_jsonl(tmp_path, ["lower", "Upper"])
    lossy = tmp_path / "lossy"
    tokenizer.copy_to(lossy)
    backend = tokenizers.Tokenizer.from_file(str(lossy / "tokenizer.json"))
    backend.normalizer = tokenizers.normalizers.Lowercase()  # type: ignore[assignment]
    backend.save(str(lossy / "tokenizer.json"))
    line = refused(tmp_path / "out", capsys, f"data.documents={tmp_path}/*.jsonl", f"tokenizer={lossy}")
    assert f"{lossy} does not give back the text" in line


def test_an_output_dir_that_exists_is_refused_and_left_alone(
    from_jsonl: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: sha256_file(path) for path in from_jsonl.rglob("*") if path.is_file()}
    documents = f"data.documents={from_jsonl.parent}/*.jsonl"
    line = refused(from_jsonl, capsys, documents, f"tokenizer={tokenizer.directory}")
    assert f"{from_jsonl} holds another configuration: data.answer_marker was Answer:" in line
    line = refused(from_jsonl / "tokenizer", capsys, documents, f"tokenizer={tokenizer.directory}")
    assert f"{from_jsonl / 'tokenizer'} exists already" in line
    assert {path: sha256_file(path) for path in from_jsonl.rglob("*") if path.is_file()} == before


def test_started_again_it_says_that_the_data_is_complete(
    tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(tmp_path, TEXTS)
    overrides = [f"{tmp_path}/*.jsonl", f"tokenizer={tokenizer.directory}", "valid_fraction=0.3"]
    prepare(tmp_path / "out", *overrides)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    capsys.readouterr()
    prepare(tmp_path / "out", *overrides)
    assert capsys.readouterr().out == f"{tmp_path / 'out'} is complete\n"
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["valid_fraction=0.001"], True),
        (["valid_fraction=0.3"], False),
        (["valid_fraction=0"], False),
        (["valid_fraction=0.3", "valid_documents=0"], False),
    ],
)
def test_a_held_out_split_that_is_empty_by_chance_is_told(
    overrides: list[str], told: bool, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(tmp_path, TEXTS)
    prepare(tmp_path / "out", f"{tmp_path}/*.jsonl", f"tokenizer={tokenizer.directory}", *overrides)
    note = "note: valid_fraction=0.001 held out none of the 60 documents"
    assert (note in capsys.readouterr().out) == told


def test_an_output_dir_below_a_file_is_refused(
    tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(tmp_path, TEXTS)
    with pytest.raises(SystemExit):
        main(
            [
                "prepare",
                f"data.documents={tmp_path}/*.jsonl",
                f"tokenizer={tokenizer.directory}",
                f"output_dir={tmp_path}/all.jsonl/out",
            ]
        )
    assert "all.jsonl is not a directory" in capsys.readouterr().err


def test_a_vocabulary_with_holes_reaches_to_its_largest_id(tokenizer: Tokenizer, tmp_path: Path) -> None:
    directory = tmp_path / "holes"
    tokenizer.copy_to(directory)
    description = json.loads((directory / "tokenizer.json").read_text())
    vocabulary = description["model"]["vocab"]
    last = max(vocabulary, key=vocabulary.__getitem__)
    vocabulary[last] = 70_000
    (directory / "tokenizer.json").write_text(json.dumps(description))
    text = load_tokenizer(directory).decode([70_000])
    write_jsonl(tmp_path, [text])
    output = prepare(tmp_path / "out", f"{tmp_path}/*.jsonl", f"tokenizer={directory}", "valid_fraction=0")
    assert read_manifest(output).vocab_size == 70_001
    assert 70_000 in IndexedTokens(output / "train").tokens
    assert content(output, "train") == [text]
