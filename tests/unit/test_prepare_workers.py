"""`flexpert prepare` at work: many processes or one, bad and equal documents, a full disk."""

import gzip
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from corpus import content, json_lines, make_texts, make_tokenizer, manifest, prepare
from processes import children, runs

from flexpert.data import documents, encode, progress
from flexpert.data.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

TEXTS = make_texts(900)
LINES = json_lines(TEXTS[:300], prompt="Continue: ")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "bpe")


@pytest.fixture(scope="module")
def every_format(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text in every format, with copies, blank lines and lines that are no documents."""
    path = tmp_path_factory.mktemp("in")
    (path / "a.jsonl").write_bytes(LINES + b"\n\nnot JSON\n" + LINES[:5000] + b'\n{"text": 3}\n')
    (path / "b.jsonl.gz").write_bytes(gzip.compress(LINES) + gzip.compress(json_lines(TEXTS[300:500], prompt="P")))
    (path / "c.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(json_lines(TEXTS[450:700], prompt="")))
    table = pyarrow.table({"text": [*TEXTS[700:], None], "prompt": ["Q"] * 201})
    pyarrow.parquet.write_table(table, path / "d.parquet", row_group_size=70)
    for index in range(40):
        (path / f"e{index:02}.txt").write_text(TEXTS[index] + " as a file", encoding="utf-8")
    (path / "e99.txt").write_bytes(b"caf\xe9")
    return path


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "READ_BYTES", 1500)
    monkeypatch.setattr(documents, "BATCH_BYTES", 2000)
    monkeypatch.setattr(documents, "BATCH_DOCUMENTS", 16)


def files_of(directory: Path) -> dict[str, bytes]:
    paths = (path for path in directory.rglob("*") if path.is_file() and path.name != "resolved.yaml")
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}


@pytest.mark.usefixtures("small_batches")
def test_any_number_of_workers_writes_the_same_bytes(
    every_format: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [
        f"data.documents={every_format}/*", f"tokenizer={tokenizer.directory}", "valid_fraction=0.2",
        "valid_documents=100", "data.on_bad_document=skip", "data.deduplicate=true", "data.prompt_field=prompt",
    ]  # fmt: skip
    expected = files_of(prepare(tmp_path / "serial", *settings, "parallel.num_workers=0"))
    assert {"train.bin", "train.idx", "train.mask.bin", "train.hashes.bin", "manifest.json"} <= expected.keys()
    assert manifest(tmp_path / "serial")["dropped"]["bad"] == 5
    assert files_of(prepare(tmp_path / "one", *settings, "parallel.num_workers=1")) == expected
    monkeypatch.setattr(encode, "_in_process", None)  # from here on a pool does it
    for number in (2, 3):
        output = prepare(tmp_path / str(number), *settings, f"parallel.num_workers={number}")
        assert files_of(output) == expected


@pytest.mark.usefixtures("small_batches")
def test_the_size_of_a_batch_changes_nothing(every_format: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    settings = [f"data.documents={every_format}/*", f"tokenizer={tokenizer.directory}", "data.on_bad_document=skip"]
    small = prepare(tmp_path / "small", *settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "BATCH_BYTES", 1 << 30)
        patch.setattr(documents, "READ_BYTES", 1 << 30)
        large = prepare(tmp_path / "large", *settings)
    assert files_of(small) == files_of(large)


def refusal(capsys: pytest.CaptureFixture[str], output: Path, *overrides: str) -> str:
    with pytest.raises(SystemExit) as ended:
        prepare(output, *overrides)
    line = capsys.readouterr().err
    assert (ended.value.code, line.count("\n")) == (2, 1)
    assert not [path for path in output.parent.iterdir() if output.name in path.name]
    return line


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_first_mistake_is_named_however_far_ahead_the_reading_is(
    num_workers: int, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES[:-10] + b"\n" + json_lines(["good"] * 5))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(LINES)[:-9])
    settings = [f"tokenizer={tokenizer.directory}", f"parallel.num_workers={num_workers}"]
    line = refusal(capsys, tmp_path / "out", f"data.documents={tmp_path}/*.*", *settings)
    assert f"{tmp_path}/a.jsonl line 300 is not JSON" in line
    line = refusal(capsys, tmp_path / "out", f"data.documents={tmp_path}/*.gz", *settings)
    assert f"{tmp_path}/b.jsonl.gz cannot be read after line 300" in line


def test_bad_documents_that_are_skipped_are_counted_and_named(
    every_format: Path, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [f"data.documents={every_format}/*", f"tokenizer={tokenizer.directory}", "data.on_bad_document=skip"]
    output = prepare(tmp_path / "out", *settings)
    out = capsys.readouterr().out
    for where in ("a.jsonl line 303 is not JSON", "d.parquet row 201 has no value", "e99.txt is not UTF-8 text"):
        assert f"skipped: {every_format}/{where}" in out
    assert f"{output}: left out 5 bad\n" in out
    assert manifest(output)["dropped"] == {"bad": 5, "empty": 0, "duplicates": 0, "excluded": 0}


def test_only_the_first_bad_documents_are_named(
    tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"{}\n" * 1000 + LINES)
    settings = [f"data.documents={tmp_path}/a.jsonl", f"tokenizer={tokenizer.directory}"]
    prepare(tmp_path / "out", *settings, "data.on_bad_document=skip")
    assert capsys.readouterr().out.count("skipped: ") == 5
    assert manifest(tmp_path / "out")["dropped"]["bad"] == 1000
    assert "a.jsonl line 1 has no text field" in refusal(capsys, tmp_path / "failed", *settings)


def test_the_first_of_equal_texts_is_kept(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines([*TEXTS[:50], *TEXTS[20:30], TEXTS[7].upper()]))
    (tmp_path / "b.jsonl").write_bytes(json_lines([TEXTS[60], *TEXTS[:50]]))
    settings = [f"data.documents={tmp_path}/*.jsonl", f"tokenizer={tokenizer.directory}", "valid_fraction=0"]
    output = prepare(tmp_path / "out", *settings, "data.deduplicate=true")
    assert content(output, "train") == [*TEXTS[:50], TEXTS[7].upper(), TEXTS[60]]
    assert manifest(output)["dropped"] == {"bad": 0, "empty": 0, "duplicates": 60, "excluded": 0}
    assert len(content(prepare(tmp_path / "all", *settings), "train")) == 112


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_full_disk_is_named_and_nothing_is_left(num_workers: int, tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jsonl").write_bytes(LINES * 200)
    words = ["prepare", f"data.documents={tmp_path}/in/*", f"tokenizer={tokenizer.directory}",
             f"parallel.num_workers={num_workers}", f"output_dir={tmp_path}/out"]  # fmt: skip
    program = (
        "import resource, sys; from flexpert.cli import main\n"
        "if __name__ == '__main__':\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)); main(sys.argv[1:])\n"
    )
    (tmp_path / "run.py").write_text(program)
    done = subprocess.run([sys.executable, tmp_path / "run.py", *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert done.stderr == f"flexpert: {tmp_path}/out cannot be written: File too large; nothing is left of it\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "run.py"]


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_what_started_them(sent: signal.Signals, tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES * 5000)  # a minute's work
    words = ["prepare", f"data.documents={tmp_path}/a.jsonl", f"tokenizer={tokenizer.directory}",
             "parallel.num_workers=2", f"output_dir={tmp_path}/out"]  # fmt: skip
    # A shell starts what it runs in the background with SIGINT ignored, and its children inherit that.
    heeding = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.executable, sys.argv[1:])"
    )
    command = [sys.executable, "-c", heeding, sys.executable, "-m", "flexpert", *words]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while len(children(process.pid)) < 3 and time.monotonic() < deadline:  # two workers and their resource tracker
        time.sleep(0.05)
    workers = children(process.pid)
    assert len(workers) == 3
    time.sleep(1)  # they are at work
    process.send_signal(sent)
    process.wait(timeout=300)
    deadline = time.monotonic() + 30
    while any(map(runs, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(runs, workers))
    _, errors = process.communicate()
    assert not (tmp_path / "out").exists()
    assert "Traceback" not in errors


@pytest.mark.usefixtures("small_batches")
def test_progress_is_told_in_lines_where_there_is_no_terminal(
    tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    (tmp_path / "a.jsonl").write_bytes(LINES)
    prepare(tmp_path / "out", f"data.documents={tmp_path}/a.jsonl", f"tokenizer={tokenizer.directory}")
    lines = [line for line in capsys.readouterr().out.splitlines() if "tokens/s" in line]
    assert len(lines) > 2
    assert all(line.startswith(f"prepare {tmp_path}/out  ") for line in lines)
    assert lines[-1].endswith("100% of the input  0 s left")
    assert f"  {len(LINES.splitlines())} documents  " in lines[-1]


def test_the_number_of_workers_may_change_between_runs(
    tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    settings = [f"data.documents={tmp_path}/a.jsonl", f"tokenizer={tokenizer.directory}"]
    prepare(tmp_path / "out", *settings, "parallel.num_workers=0")
    prepare(tmp_path / "out", *settings, "parallel.num_workers=7")
    assert capsys.readouterr().out.endswith("is complete\n")


def test_a_prompt_goes_before_the_text_and_is_marked(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [{"prompt": f"Question {index}?\n", "text": text} for index, text in enumerate(TEXTS[:30])]
    (tmp_path / "a.jsonl").write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    settings = [f"data.documents={tmp_path}/a.jsonl", f"tokenizer={tokenizer.directory}", "valid_fraction=0"]
    output = prepare(tmp_path / "out", *settings, "data.prompt_field=prompt")
    assert content(output, "train") == [row["prompt"] + row["text"] for row in rows]
    expected = b"".join(
        bytes(len(tokenizer.encode(row["prompt"]))) + b"\1" * (len(tokenizer.encode(row["text"])) + 1) for row in rows
    )
    assert (output / "train.mask.bin").read_bytes() == expected
    assert "train.mask.bin" in manifest(output)["splits"]["train"]["files"]


def test_a_row_without_its_prompt_is_named(
    tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES + json_lines(["alone"]))
    settings = [f"tokenizer={tokenizer.directory}", "data.prompt_field=prompt"]
    line = refusal(capsys, tmp_path / "out", f"data.documents={tmp_path}/a.jsonl", *settings)
    assert "a.jsonl line 301 has no text field 'prompt' (data.prompt_field=…)" in line
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS[:3]}), tmp_path / "a.parquet")
    line = refusal(capsys, tmp_path / "out", f"data.documents={tmp_path}/a.parquet", *settings)
    assert "a.parquet has no column 'prompt' (data.prompt_field=…); it has ['text']" in line
