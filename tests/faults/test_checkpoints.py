"""Checkpoints that were damaged, mixed up or cut off: refused by the file's name, and the one before is taken."""

import errno
import multiprocessing
import os
import random
import re
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from saved import (
    CONTENT,
    FILES,
    FOREIGN,
    KEY,
    RECORD,
    STEP,
    Made,
    assert_carries,
    blank,
    carried,
    make_runs,
    save,
    tiny,
    update,
)

from flexpert.checkpoint import envelope
from flexpert.checkpoint.distributed import Saver, check, load
from flexpert.config.groups import CheckpointConfig
from flexpert.errors import UserError
from flexpert.testing import Fault, faults

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_runs(tmp_path_factory.mktemp("made"))


class Case(NamedTuple):
    """Attributes:
    step: the newest checkpoint of a copy of the run.
    root: of `Made`.
    """

    step: Path
    root: Path
    chooser: random.Random

    def file(self) -> Path:
        return self.step / self.chooser.choice(FILES)

    def rewrite(self, change: Callable[[bytearray], object]) -> str:
        """Put other bytes into some file; returns its name."""
        path = self.file()
        content = bytearray(path.read_bytes())
        change(content)
        path.write_bytes(content)
        return path.name


def flipped_bit(case: Case) -> str:
    def change(content: bytearray) -> None:
        position = case.chooser.randrange(8 * len(content))
        content[position // 8] ^= 1 << position % 8

    return case.rewrite(change)


def other_byte(case: Case) -> str:
    def change(content: bytearray) -> None:
        content[case.chooser.randrange(len(content))] ^= case.chooser.randrange(1, 256)

    return case.rewrite(change)


def cut_short(case: Case) -> str:
    def change(content: bytearray) -> None:
        del content[case.chooser.randrange(len(content)) :]

    return case.rewrite(change)


def lengthened(case: Case) -> str:
    def change(content: bytearray) -> None:
        content += case.chooser.choice([b"\n", b" ", b"\0", case.chooser.randbytes(case.chooser.randrange(1, 5000))])

    return case.rewrite(change)


def lost_sector(case: Case) -> str:
    """512 bytes that never reached the disk."""

    def change(content: bytearray) -> None:
        first = case.chooser.choice([n for n in range(0, len(content), 512) if any(content[n : n + 512])])
        content[first : first + 512] = bytes(len(content[first : first + 512]))

    return case.rewrite(change)


#: Kind of damage → how often, each time at random.
RANDOM = {flipped_bit: 400, other_byte: 200, cut_short: 150, lengthened: 150, lost_sector: 100}


def replaced(name: str, source: str, named: str | None = None) -> Callable[[Case], str]:
    """A file of another step, in place of this one's."""

    def damage(case: Case) -> str:
        shutil.copyfile(case.root / source / name, case.step / name)
        return named or name

    return damage


def all_but(name: str, source: str, named: str) -> Callable[[Case], str]:
    """One file of this step, among those of another."""

    def damage(case: Case) -> str:
        for other in set(FILES) - {name}:
            shutil.copyfile(case.root / source / other, case.step / other)
        return named

    return damage


def whole_step(source: str) -> Callable[[Case], str]:
    def damage(case: Case) -> str:
        shutil.rmtree(case.step)
        shutil.copytree(case.root / source, case.step)
        return RECORD

    return damage


def swapped(case: Case) -> str:
    first, second = (case.step / name for name in ("__0_0.distcp", "__1_0.distcp"))
    contents = first.read_bytes(), second.read_bytes()
    first.write_bytes(contents[1]), second.write_bytes(contents[0])
    return "__0_0.distcp"


def respelt(old: str, new: str) -> Callable[[Case], str]:
    """The same JSON, or nearly, in other bytes."""

    def damage(case: Case) -> str:
        text = (case.step / RECORD).read_bytes()
        assert old.encode() in text
        (case.step / RECORD).write_bytes(text.replace(old.encode(), new.encode()))
        return RECORD

    return damage


def missing(name: str) -> Callable[[Case], str]:
    def damage(case: Case) -> str:
        (case.step / name).unlink()
        return name

    return damage


def linked(name: str) -> Callable[[Case], str]:
    """A link to what was there, byte for byte."""

    def damage(case: Case) -> str:
        shutil.move(case.step / name, case.step.parent / "elsewhere")
        (case.step / name).symlink_to(case.step.parent / "elsewhere")
        return name

    return damage


def of_other_type(name: str, put: Callable[[Path], object]) -> Callable[[Case], str]:
    def damage(case: Case) -> str:
        path = case.step / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        put(path)
        return name

    return damage


def added(name: str, put: Callable[[Path], object]) -> Callable[[Case], str]:
    def damage(case: Case) -> str:
        put(case.step / name)
        return name

    return damage


def emptied(case: Case) -> str:
    for name in FILES:
        (case.step / name).unlink()
    return RECORD


#: Damage with a name, each once.
NAMED: dict[str, Callable[[Case], str]] = {
    "swapped shards": swapped,
    **{f"{name} of {source}": replaced(name, source) for name in FILES[:-1] for source in FOREIGN},
    **{f"{RECORD} of {source}": replaced(RECORD, source) for source in FOREIGN if "earlier" not in source},
    f"{RECORD} of an earlier attempt at it": replaced(RECORD, FOREIGN[1], named=".metadata"),
    **{f"{source} in its place": whole_step(source) for source in FOREIGN if "earlier" not in source},
    "its .metadata among an earlier attempt's files": all_but(".metadata", FOREIGN[1], ".metadata"),
    f"its {RECORD} among an earlier attempt's files": all_but(RECORD, FOREIGN[1], ".metadata"),
    "its .metadata among another run's files": all_but(".metadata", FOREIGN[2], RECORD),
    **{f"{name} missing": missing(name) for name in FILES},
    **{f"{name} a link": linked(name) for name in FILES},
    "the directory a link": linked("."),
    "the directory a file": of_other_type(".", Path.touch),
    "the directory empty": emptied,
    "a shard a directory": of_other_type("__1_0.distcp", Path.mkdir),
    "a shard a pipe": of_other_type("__1_0.distcp", os.mkfifo),
    f"{RECORD} a directory": of_other_type(RECORD, Path.mkdir),
    "a shard more": added("__2_0.distcp", Path.touch),
    "a directory more": added("more", Path.mkdir),
    "a link more": added("more", lambda path: path.symlink_to("__0_0.distcp")),
    "another spelling of a number": respelt("1e-05", "1E-05"),
    "another number that is the same": respelt("0.30000000000000004", "0.30000000000000005"),
    "other line ends": respelt("\n", "\r\n"),
    "a key twice": respelt('"skipped_steps": 5', '"skipped_steps": 6, "skipped_steps": 5'),
    "half a character": respelt('"data": "é"', '"data": "\\ud800"'),
    "deep JSON": respelt('"wandb_id": null', '"wandb_id": ' + "[" * 5000 + "]" * 5000),
}


def copied(made: Made, folder: Path, chooser: random.Random) -> Case:
    """A fresh copy of the run in folder/run."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(made.root / "run", folder / "run")
    return Case(folder / "run" / STEP, made.root, chooser)


def content(path: Path) -> dict[str, Any]:
    """What lies at and below a path: its type, and bytes or where it links to."""

    def of(entry: Path) -> Any:
        if entry.is_symlink():
            return entry.readlink()
        return entry.read_bytes() if entry.is_file() else stat.S_IFMT(entry.stat().st_mode)

    return {str(entry.relative_to(path)): of(entry) for entry in [path, *path.rglob("*")]}


def assert_refused(case: Case, damage: Callable[[Case], str], key: bytes) -> str:
    """Returns the path that has to be named."""
    before = content(case.step)
    named = str(case.step / damage(case))
    assert content(case.step) != before
    record, said = check(case.step.parent, 3, key)
    assert record is None and re.search(rf"{re.escape(named)}(?!\w)", said) and "\n" not in said, (named, said)
    return named


@pytest.mark.parametrize("kind", RANDOM, ids=[kind.__name__ for kind in RANDOM])
def test_damage_at_random_is_refused_with_the_files_name(
    kind: Callable[[Case], str], made: Made, tmp_path: Path
) -> None:
    """1,000 cases in all; `load` takes what `check` says, as the next test shows."""
    for seed in range(RANDOM[kind]):
        case = copied(made, tmp_path / "copy", random.Random(f"{kind.__name__} {seed}"))
        assert_refused(case, kind, made.key)
        assert check(case.step.parent, 2, made.key)[0] is not None


@pytest.mark.parametrize("kind", [*RANDOM, *NAMED.values()], ids=[*(kind.__name__ for kind in RANDOM), *NAMED])
def test_the_step_before_is_taken_and_nothing_is_deleted(
    kind: Callable[[Case], str], made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case, trained = copied(made, tmp_path / "copy", random.Random(0)), tiny()
    named, run = assert_refused(case, kind, made.key), case.step.parent
    damaged = content(case.step)
    blank(trained)
    record = load(run, made.key, *trained)
    assert record is not None and record["step"] == 2 and record["guard"] == CONTENT["guard"]
    assert_carries(trained, made.carried["run/2"])
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("warning: ") and named in line and f"{run}/damaged-{STEP};" in line
    assert content(run / f"damaged-{STEP}") == damaged and envelope.steps(run) == [2]
    update(trained, 7)
    assert save(Saver(run, made.key, CheckpointConfig(keep=10)), 3, trained) is None
    wanted = carried(trained)
    blank(trained)
    record = load(run, made.key, *trained)
    assert record is not None and record["step"] == 3 and content(run / f"damaged-{STEP}") == damaged
    assert_carries(trained, wanted)


def test_a_step_that_is_whole_is_restored_and_stays(made: Made, tmp_path: Path) -> None:
    case, trained = copied(made, tmp_path / "copy", random.Random(0)), tiny()
    before = content(case.step.parent)
    blank(trained)
    record = load(case.step.parent, made.key, *trained)
    assert record is not None and record["step"] == 3 and record.items() >= CONTENT.items()
    assert_carries(trained, made.carried["run/3"])
    assert content(case.step.parent) == before


def test_where_all_steps_are_damaged_nothing_begins_anew(made: Made, tmp_path: Path) -> None:
    case, trained = copied(made, tmp_path / "copy", random.Random(0)), tiny()
    run = case.step.parent
    flipped_bit(case), flipped_bit(case._replace(step=run / "step-000000002"))
    for _ in range(2):  # a launcher starts it again
        with pytest.raises(UserError, match="choose another output_dir") as caught:
            load(run, made.key, *trained)
        assert str(run) in str(caught.value) and "\n" not in str(caught.value)
    assert sorted(path.name for path in run.iterdir()) == [KEY, "step-000000002", STEP], "all is left as it is"


def give_away(path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    os.chown(path, 12345, 12345)


def link_elsewhere(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (Path.unlink, "is missing"),
        (lambda path: path.chmod(0o640), "mode 600"),
        (give_away, "a file of yours"),
        (link_elsewhere, "cannot be used"),
        (lambda path: (path.unlink(), path.mkdir(mode=0o700)), "cannot be used"),
        (lambda path: path.write_text("ab" * 31), "is no key"),
        (lambda path: path.write_bytes(b"\xff" * 64), "is no key"),
    ],
    ids=["deleted", "for others to read", "somebody else's", "a link", "a directory", "too short", "no text"],
)
def test_a_key_that_cannot_be_trusted_is_refused(
    change: Callable[[Path], object], message: str, made: Made, tmp_path: Path
) -> None:
    run = copied(made, tmp_path / "copy", random.Random(0)).step.parent
    before = content(run / STEP)
    change(run / KEY)
    with pytest.raises(UserError, match=message) as caught:
        envelope.open_key(run)
    assert str(run / KEY) in str(caught.value) and "\n" not in str(caught.value)
    assert content(run / STEP) == before


def test_with_another_key_no_step_is_taken_and_none_is_deleted(made: Made, tmp_path: Path) -> None:
    run = copied(made, tmp_path / "copy", random.Random(0)).step.parent
    before = content(run / STEP)
    with pytest.raises(UserError, match=f"{RECORD} was altered, or is another run's"):
        load(run, bytes(32), *tiny())
    assert content(run / STEP) == before


@pytest.mark.parametrize("shape", [{"hidden_size": 12}, {"num_layers": 2}], ids=["wider", "deeper"])
@pytest.mark.parametrize("is_saved", [True, False], ids=["into a tiny one", "of a tiny one"])
def test_a_checkpoint_of_another_model_is_refused(shape: dict[str, int], is_saved: bool, tmp_path: Path) -> None:
    saved, trained = (tiny(**shape), tiny()) if is_saved else (tiny(), tiny(**shape))
    update(saved, 0)
    key = envelope.open_key(tmp_path)
    assert save(Saver(tmp_path, key, CheckpointConfig(keep=1)), 1, saved) is None
    before = carried(trained)
    with pytest.raises(UserError) as caught:
        load(tmp_path, key, *trained)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    torch.manual_seed(0)
    assert all(torch.equal(before[name], value) for name, value in carried(trained).items() if name != "random")
    assert envelope.steps(tmp_path) == [1], "it is no damage"


def test_the_newest_and_every_mth_are_kept(tmp_path: Path) -> None:
    trained, key = tiny(), envelope.open_key(tmp_path)
    saver = Saver(tmp_path, key, CheckpointConfig(keep=2, keep_every=4))
    for step in range(1, 11):
        assert save(saver, step, trained) is None
        assert envelope.steps(tmp_path) == [s for s in range(1, step + 1) if s > step - 2 or s % 4 == 0]
    assert save(Saver(tmp_path, key, CheckpointConfig(keep=1)), 11, trained) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == [KEY, "step-000000011"]


def test_a_kill_between_renaming_and_deleting_leaves_no_half_checkpoint(made: Made, tmp_path: Path) -> None:
    case, trained = copied(made, tmp_path / "copy", random.Random(0)), tiny()
    run = case.step.parent
    update(trained, 7)
    wanted = carried(trained)
    torch.manual_seed(7)

    def killed() -> None:
        with faults(Fault("kill", "retention")):
            save(Saver(run, made.key, CheckpointConfig(keep=1)), 4, trained)

    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    process.join()
    assert process.exitcode == -9
    assert sorted(path.name for path in run.iterdir()) == [KEY, ".step-000000002.partial", STEP, "step-000000004"]
    envelope.sweep(run)
    assert sorted(path.name for path in run.iterdir()) == [KEY, STEP, "step-000000004"]
    blank(trained)
    record = load(run, made.key, *trained)
    assert record is not None and record["step"] == 4
    found = carried(trained)
    assert all(torch.equal(found[name], value) for name, value in wanted.items() if name != "random")


def test_sweeping_follows_no_link(made: Made, tmp_path: Path) -> None:
    case = copied(made, tmp_path / "copy", random.Random(0))
    (case.step.parent / ".step-000000002.partial").symlink_to(case.step)
    before = content(case.step)
    envelope.sweep(case.step.parent)
    assert content(case.step) == before and not (case.step.parent / ".step-000000002.partial").is_symlink()


def test_every_file_is_on_the_disk_before_the_step_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a power cut would show, and no kill can: what was synced of each file, in which order."""
    events: list[tuple[str, int]] = []
    fsync, rename = os.fsync, os.rename

    def synced(descriptor: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
        events.append((name.removesuffix(".tmp"), os.fstat(descriptor).st_size))
        fsync(descriptor)

    def renamed(old: Path, new: Path) -> None:
        events.append((f"rename to {Path(new).name}", 0))
        rename(old, new)

    saver = Saver(tmp_path, envelope.open_key(tmp_path), CheckpointConfig(keep=1))
    assert save(saver, 2, tiny()) is None
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    assert save(saver, 3, tiny()) is None
    monkeypatch.undo()
    order = [name for name, _ in events]
    committed, older_goes = order.index(f"rename to {STEP}"), order.index("rename to .step-000000002.partial")
    sizes = {path.name: path.stat().st_size for path in (tmp_path / STEP).iterdir()}
    for name in (".metadata", "__0_0.distcp"):
        assert (name, sizes[name]) in events[:committed], name
    assert any(RECORD in name and size == sizes[RECORD] for name, size in events[:committed])
    assert f".{STEP}.partial" in order[:committed], "the names in it"
    assert tmp_path.name in order[committed:older_goes], "its own name, before anything older goes"


def test_what_cannot_be_read_is_not_taken_for_damaged(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copied(made, tmp_path / "copy", random.Random(0)).step.parent

    def stale(path: Path) -> str:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(envelope, "sha256_file", stale)
        with pytest.raises(UserError, match="cannot be read by rank 0: Stale file handle"):
            load(run, made.key, *tiny())
    assert envelope.steps(run) == [2, 3]
    trained = tiny()
    assert load(run, made.key, *trained) is not None


@pytest.mark.parametrize("phase", ["committed", "retention"])
def test_a_step_that_is_committed_counts_as_saved(
    phase: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saver = Saver(tmp_path, envelope.open_key(tmp_path), CheckpointConfig(keep=1))
    assert save(saver, 1, tiny()) is None
    with faults(Fault("readonly", phase, step=2 if phase == "committed" else 1)):
        assert save(saver, 2, tiny()) is None
    assert f"note: {tmp_path}: older checkpoints stay: Read-only file system" in capsys.readouterr().out
    assert 2 in envelope.steps(tmp_path)
    assert save(saver, 3, tiny()) is None and envelope.steps(tmp_path) == [3]
    assert not list(tmp_path.glob(".step-*"))
