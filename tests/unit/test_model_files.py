"""The files of an assembled model: large ones in parts, several written at a time, and nothing left of a failure."""

import errno
import itertools
import json
import os
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flexpert.assembly import files
from flexpert.assembly import tensors as stream
from flexpert.assembly.assemble import assemble
from flexpert.assembly.files import ModelWriter, written
from flexpert.assembly.record import read_assembly
from flexpert.assembly.remove import remove
from flexpert.assembly.tensors import Stopped, TensorSource, open_tensors
from flexpert.assembly.verify import verify_model
from flexpert.checkpoint.directory import ModelDirectory
from flexpert.config.stages import MAX_FILE_BYTES
from flexpert.records import sha256_file

Refused = Callable[..., AbstractContextManager[None]]
Maker = Callable[..., Path]
IDS = ("news", "code", "math")
#: An expert of the tests' base has nine matrices of 3,840 bytes.
MATRIX = 24 * 40 * 4


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize(
    ("max_file_bytes", "num_parts"),
    [(9 * MATRIX, 1), (9 * MATRIX - 1, 2), (4 * MATRIX, 3), (MATRIX, 9), (1, 9)],
)
def test_an_expert_is_split_at_the_limit(
    max_file_bytes: int, num_parts: int, shared_base: Path, contributions: dict[str, Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    paths = list(contributions.values())
    whole = assemble(shared_base, paths, tmp_path / "whole")
    record = assemble(shared_base, paths, tmp_path / "split", max_file_bytes=max_file_bytes)
    assert record.base_digest == whole.base_digest
    assert record == verify_model(tmp_path / "split")
    for expert in record.experts:
        stem, numbers = f"expert-{expert.id}", range(1, num_parts + 1)
        names = [f"{stem}-{n:05d}-of-{num_parts:05d}.safetensors" for n in numbers]
        assert [file.name for file in expert.files] == (names if num_parts > 1 else [f"{stem}.safetensors"])
    for path in (tmp_path / "split").glob("*.safetensors"):
        tensors = load_file(path)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= max_file_bytes or "router" in path.name
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "split")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "split", output_loading_info=True)
    assert not any(info.values()), info
    assert loaded.config.num_experts == 4


@pytest.mark.parametrize("removed", [s for n in (1, 2, 3) for s in itertools.combinations(IDS, n)], ids="+".join)
def test_removal_equals_assembly_without_them_where_experts_are_split(
    removed: tuple[str, ...], shared_base: Path, contributions: dict[str, Path], tmp_path: Path
) -> None:
    assemble(shared_base, list(contributions.values()), tmp_path / "model", max_file_bytes=4 * MATRIX)
    remove(tmp_path / "model", removed, tmp_path / "removed")
    rest = [path for name, path in contributions.items() if name not in removed]
    assemble(shared_base, rest, tmp_path / "never", max_file_bytes=4 * MATRIX)
    assert content(tmp_path / "removed") == content(tmp_path / "never")


def test_a_split_stays_where_indices_change_their_number_of_digits(
    shared_base: Path, make_contribution: Maker, tmp_path: Path
) -> None:
    many = [make_contribution(tmp_path / f"e{index}", shared_base, seed=index) for index in range(11)]
    assemble(shared_base, many, tmp_path / "model", max_file_bytes=3 * MATRIX)
    remove(tmp_path / "model", ["e3"], tmp_path / "removed")
    rest = [path for path in many if path.name != "e3"]
    assemble(shared_base, rest, tmp_path / "never", max_file_bytes=3 * MATRIX)
    assert content(tmp_path / "removed") == content(tmp_path / "never")


def test_an_id_that_could_name_a_part_of_another_expert_is_refused(
    shared_base: Path, make_contribution: Maker, tmp_path: Path, refused: Refused
) -> None:
    with refused("'news-00001-of-00002'", "choose another id"):
        make_contribution(tmp_path / "news-00001-of-00002", shared_base)


def test_a_record_of_version_1_is_read_and_removal_writes_it_anew(
    shared_base: Path, contributions: dict[str, Path], tmp_path: Path
) -> None:
    paths = list(contributions.values())
    record = assemble(shared_base, paths, tmp_path / "model")
    path = tmp_path / "model" / "assembly.json"
    old = json.loads(path.read_text()) | {"schema_version": 1}
    for expert in old["experts"]:
        (expert["file"],) = expert.pop("files")
    path.write_text(json.dumps(old))
    assert verify_model(tmp_path / "model") == record
    remove(tmp_path / "model", ["news"], tmp_path / "removed")
    assemble(shared_base, paths[1:], tmp_path / "never")
    assert content(tmp_path / "removed") == content(tmp_path / "never")


FULL = """
import resource, sys
from flexpert.cli import main
import flexpert.assembly.stages
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
main(sys.argv[2:])
"""


@pytest.mark.parametrize("file_bytes", [100, 2_000, 20_000, 40_000])
@pytest.mark.parametrize("stage", ["assemble", "add", "remove"])
def test_a_disk_that_takes_no_more_is_named_and_nothing_is_left(
    stage: str, file_bytes: int, shared_base: Path, contributions: dict[str, Path], tmp_path: Path
) -> None:
    """The limit stands for the disk's: some files fit, others end in the middle."""
    output = tmp_path / "models" / "model"
    if stage == "assemble":
        arguments = ["assemble", f"base={shared_base}", f"contributions={','.join(map(str, contributions.values()))}"]
    else:
        assemble(shared_base, [contributions["news"], contributions["code"]], tmp_path / "old")
        choice = f"contributions={contributions['math']}" if stage == "add" else "experts=news"
        arguments = ["assemble" if stage == "add" else "remove", f"model={tmp_path / 'old'}", choice]
    command = [sys.executable, "-c", FULL, str(file_bytes), *arguments, f"output_dir={output}"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2, run.stderr
    (line,) = run.stderr.splitlines()
    assert line.startswith(f"flexpert: {output} cannot be written (File too large); free some space")
    assert list(output.parent.iterdir()) == []


def test_a_contribution_that_the_disk_does_not_take_is_an_error_of_one_line(
    shared_base: Path, make_contribution: Maker, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with refused(tmp_path / "news", "No space left on device"):
        make_contribution(tmp_path / "news", shared_base)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("victim", ["base", "news", "model"])
@pytest.mark.parametrize("calls_before", [3, 11])
def test_a_read_error_names_the_file_and_nothing_is_left(
    calls_before: int,
    victim: str,
    shared_base: Path,
    contributions: dict[str, Path],
    tmp_path: Path,
    refused: Refused,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The disk gives half of a piece and then an error, as it does at a bad sector."""
    assemble(shared_base, list(contributions.values()), tmp_path / "model")
    folder = {"base": shared_base, "model": tmp_path / "model"}.get(victim) or contributions[victim]
    bad = {path.stat().st_ino for path in folder.glob("*.safetensors")}
    calls = itertools.count()
    read, half_read = os.pread, threading.local()

    def pread(descriptor: int, num_bytes: int, position: int) -> bytes:
        if getattr(half_read, "yes", False):
            half_read.yes = False
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if os.fstat(descriptor).st_ino in bad and next(calls) >= calls_before:
            half_read.yes = True
            return read(descriptor, max(1, num_bytes // 2), position)
        return read(descriptor, num_bytes, position)

    monkeypatch.setattr(os, "pread", pread)
    with refused(folder, ".safetensors cannot be read (Input/output error)"):
        if victim == "model":
            remove(tmp_path / "model", ["code"], tmp_path / "output")
        else:
            assemble(shared_base, list(contributions.values()), tmp_path / "output")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_error_stops_the_files_that_are_being_written(tmp_path: Path, refused: Refused) -> None:
    stop_at = time.monotonic() + 60

    def endless() -> Iterator[bytes]:
        while time.monotonic() < stop_at:
            yield bytes(1 << 16)

    before = threading.active_count()
    nan = torch.full((4,), float("nan")).numpy().tobytes()
    with refused("the bad one", "NaN"), ModelWriter(tmp_path) as writer:
        (long,) = writer.write("long", [TensorSource("a", "F32", (1,), endless, "endless")], MAX_FILE_BYTES)
        written(writer.write("bad", [TensorSource("a", "F32", (4,), lambda: [nan], "the bad one")], MAX_FILE_BYTES))
    assert isinstance(long.exception(), Stopped)
    assert threading.active_count() == before
    assert time.monotonic() < stop_at


def test_memory_is_bounded_by_the_files_in_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two pieces for each of them, however many there are and however large they are."""
    monkeypatch.setattr(stream, "BUFFER_BYTES", 1 << 16)
    monkeypatch.setattr(files, "FILES_AT_A_TIME", 4)
    names = [f"{number}" for number in range(12)]
    save_file({name: torch.ones(1 << 20) for name in names}, tmp_path / "in.safetensors")
    (tmp_path / "out").mkdir()
    with open_tensors([tmp_path / "in.safetensors"]) as tensors:
        tracemalloc.start()
        try:
            with ModelWriter(tmp_path / "out") as writer:
                records = written(writer.write("all", [tensors.source(name, name) for name in names], 1))
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        tensors.assert_each_read_once()
    assert [(record.bytes, record.sha256) for record in records] == [
        (path.stat().st_size, sha256_file(path)) for path in sorted((tmp_path / "out").iterdir())
    ]
    assert peak < 4 * 3 << 16, "48 MiB were written"


def test_experts_of_a_split_model_can_be_told_apart(
    shared_base: Path, contributions: dict[str, Path], tmp_path: Path, refused: Refused
) -> None:
    model = tmp_path / "model"
    assemble(shared_base, list(contributions.values()), model, max_file_bytes=4 * MATRIX)
    assert ModelDirectory.open(model).experts == ("public", *IDS)
    path = model / "assembly.json"
    record = json.loads(path.read_text())
    first, second = record["experts"][1], record["experts"][2]
    first["files"][2], second["files"][2] = second["files"][2], first["files"][2]
    path.write_text(json.dumps(record))
    assert read_assembly(model).experts[1].id == "news"
    with refused(model, "'news'", "expert-news-00003-of-00003.safetensors and not in"):
        ModelDirectory.open(model)
