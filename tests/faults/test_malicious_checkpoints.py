"""Checkpoints that somebody prepared to run code or to reach other files: refused, and nothing has happened.

What a load does is watched from below, by an audit hook of Python's in a process of its own.
"""

import io
import json
import multiprocessing
import os
import pickle
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from saved import FILES, KEY, RECORD, STEP, Made, make_runs, tiny
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from flexpert.checkpoint import envelope
from flexpert.checkpoint.distributed import check, load
from flexpert.errors import UserError
from flexpert.records import sha256_file

pytestmark = pytest.mark.slow

#: Audit events of looking at files, and of what Python and PyTorch do all the time ("compile" is a traceback's, which
#: parses its lines); `open` and `os.rename` are looked at more closely.
QUIET = {"builtins.id", "object.__getattr__", "object.__setattr__", "object.__delattr__", "os.listdir", "os.scandir",
         "sys._getframe", "_thread.start_new_thread", "compile", "open", "os.rename"}  # fmt: skip

Event = tuple[str, ...]


class Call:
    """Unpickled, it calls a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


#: Event that betrays it → what is pickled, given a path that it makes.
PAYLOADS: dict[str, Callable[[str], Call]] = {
    "os.mkdir": lambda path: Call(os.mkdir, path),
    "os.system": lambda path: Call(os.system, f"touch {path}"),
    "subprocess.Popen": lambda path: Call(subprocess.Popen, ["touch", path]),
    "exec": lambda path: Call(exec, f"open({path!r}, 'w')"),
    "open": lambda path: Call(open, path, "w"),
}


def watched(function: Callable[[], object]) -> tuple[str, list[Event]]:
    """What it says as a `UserError`, "" if nothing, and its audit events."""
    receive, send = multiprocessing.Pipe(duplex=False)

    def child() -> None:
        events: list[Event] = []
        over = False

        def see(event: str, arguments: tuple[Any, ...]) -> None:
            if not over:
                told = arguments[:3] if event in ("open", "os.rename") else ()
                events.append((event, *map(str, told)))

        sys.addaudithook(see)
        said = ""
        try:
            function()
        except UserError as error:
            said = str(error)
        over = True
        send.send((said, events))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    send.close()
    try:
        said, events = receive.recv()
    finally:
        process.join()
    return said, events


class Attack(NamedTuple):
    """Attributes:
    run: a copy of a run's checkpoints, steps 2 and 3.
    key: its key.
    outside: a directory beside it.
    """

    run: Path
    key: bytes
    outside: Path

    @property
    def step(self) -> Path:
        return self.run / STEP

    def load(self) -> tuple[str, list[Event]]:
        return watched(lambda: load(self.run, self.key, *tiny()))

    def sign(self, key: bytes, **fields: Any) -> None:
        """A record of the files as they are."""
        record = json.loads((self.step / RECORD).read_text())
        names = sorted(path.name for path in self.step.iterdir() if path.name != RECORD)
        record |= {"files": {name: sha256_file(self.step / name) for name in names}, **fields}
        covered = {name: value for name, value in record.items() if name not in ("kind", "schema_version")}
        record["hmac"] = envelope.authenticator(covered, key)
        (self.step / RECORD).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")

    def change_metadata(self, change: Callable[[Any], object]) -> None:
        record = pickle.loads((self.step / ".metadata").read_bytes())
        change(record)
        (self.step / ".metadata").write_bytes(pickle.dumps(record))

    def assert_quiet(self, events: list[Event]) -> None:
        """Nothing but reading in the run's directory, and the setting aside of a step."""
        assert {event[0] for event in events} <= QUIET, {event[0] for event in events} - QUIET
        for event, *told in events:
            if event == "open":
                path, _, flags = told
                is_source = path.endswith(".py")  # whose lines a traceback shows
                assert is_source or (Path(path).is_relative_to(self.run) and ".." not in path), path
                assert int(flags) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC) == 0, path
            if event == "os.rename":
                assert told[1].startswith(str(self.run / "damaged-step-")), told
        assert list(self.outside.iterdir()) == []


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    found = make_runs(tmp_path_factory.mktemp("made"))
    load(found.root / "run", found.key, *tiny())  # what is imported at first use is not an attacker's import
    return found


@pytest.fixture
def attack(made: Made, tmp_path: Path) -> Attack:
    shutil.copytree(made.root / "run", tmp_path / "run")
    (tmp_path / "outside").mkdir()
    return Attack(tmp_path / "run", made.key, tmp_path / "outside")


def opened(events: list[Event], step: Path) -> list[str]:
    """Names of the step's files but its record, in the order in which they were opened."""
    paths = [Path(told[0]) for event, *told in events if event == "open"]
    return [path.name for path in paths if path.parent == step and path.name != RECORD]


def whole_metadata(attack: Attack, payload: Call) -> None:
    (attack.step / ".metadata").write_bytes(pickle.dumps(payload))


def within_metadata(attack: Attack, payload: Call) -> None:
    attack.change_metadata(lambda record: setattr(record, "planner_data", payload))


def put_tensor(attack: Attack, payload: Any, is_bytes: bool = False, is_zip: bool = True) -> None:
    """In place of AdamW's count of steps, in the shard and as the index says."""
    buffer = io.BytesIO()
    torch.save(payload, buffer, _use_new_zipfile_serialization=is_zip)

    def change(record: Any) -> None:
        index, found = next((i, info) for i, info in record.storage_data.items() if i.fqn.endswith(".step"))
        shard = attack.step / found.relative_path
        found.offset, found.length = shard.stat().st_size, len(buffer.getvalue())
        shard.write_bytes(shard.read_bytes() + buffer.getvalue())
        if is_bytes:
            record.state_dict_metadata[index.fqn] = BytesStorageMetadata()

    attack.change_metadata(change)


def as_tensor(attack: Attack, payload: Call) -> None:
    put_tensor(attack, payload)


def as_old_tensor(attack: Attack, payload: Call) -> None:
    """In the format that PyTorch had before, a bare pickle."""
    put_tensor(attack, payload, is_zip=False)


def as_bytes(attack: Attack, payload: Call) -> None:
    put_tensor(attack, payload, is_bytes=True)


PLACES = [whole_metadata, within_metadata, as_tensor, as_old_tensor, as_bytes]
CASES = [(place, "os.mkdir") for place in PLACES] + [(whole_metadata, name) for name in [*PAYLOADS][1:]]
IDS = [f"{place.__name__} {name}" for place, name in CASES]


@pytest.mark.parametrize("name", PAYLOADS)
def test_the_hook_sees_what_a_payload_does(name: str, tmp_path: Path) -> None:
    content = pickle.dumps(PAYLOADS[name](str(tmp_path / "ran")))
    _, events = watched(lambda: pickle.loads(content))
    seen = [event for event in events if event[0] not in QUIET - {"open"}]
    assert seen[0][0] == "pickle.find_class" and any(event[0] == name for event in seen)


def test_no_file_is_read_before_all_were_hashed(attack: Attack) -> None:
    said, events = attack.load()
    assert said == ""
    attack.assert_quiet(events)
    names = opened(events, attack.step)
    assert sorted(names) == sorted(2 * FILES[:-1]) and sorted(names[:3]) == FILES[:-1]
    assert opened(events, attack.run / "step-000000002") == []


@pytest.mark.parametrize("key", [b"", bytes(32), None, "nothing"], ids=["empty", "guessed", "old one", "no HMAC"])
@pytest.mark.parametrize(("place", "name"), CASES, ids=IDS)
def test_without_the_key_a_payload_is_not_even_read(
    place: Callable[[Attack, Call], None], name: str, key: bytes | str | None, attack: Attack
) -> None:
    place(attack, PAYLOADS[name](str(attack.outside / "ran")))
    if isinstance(key, bytes):
        attack.sign(key)
    elif key == "nothing":
        record = json.loads((attack.step / RECORD).read_text())
        (attack.step / RECORD).write_text(json.dumps(record | {"hmac": None}, indent=2, ensure_ascii=False) + "\n")
    said, events = attack.load()
    assert said == "", "the step before is taken"
    attack.assert_quiet(events)
    assert ("os.rename", str(attack.step), str(attack.run / f"damaged-{STEP}")) in [event[:3] for event in events]
    names = opened(events, attack.step)
    assert sorted(names) == (FILES[:-1] if key is None else [])  # where the record is true, they are hashed, once


@pytest.mark.parametrize(("place", "name"), CASES, ids=IDS)
def test_who_has_the_key_cannot_run_code(place: Callable[[Attack, Call], None], name: str, attack: Attack) -> None:
    place(attack, PAYLOADS[name](str(attack.outside / "ran")))
    attack.sign(attack.key)
    said, events = attack.load()
    assert str(attack.step) in said and "is no checkpoint of ours" in said and "\n" not in said
    attack.assert_quiet(events)


def test_a_pickle_that_is_no_metadata_is_refused(attack: Attack) -> None:
    (attack.step / ".metadata").write_bytes(pickle.dumps(["no metadata"]))
    attack.sign(attack.key)
    said, events = attack.load()
    assert str(attack.step) in said and "is no checkpoint of ours" in said
    attack.assert_quiet(events)


@pytest.mark.parametrize("has_key", [True, False], ids=["with the key", "without"])
@pytest.mark.parametrize("name", ["../../outside/shard", "{outside}/shard", "more/shard", "", "..", "__0_0.distcp/"])
def test_a_record_cannot_name_files_elsewhere(name: str, has_key: bool, attack: Attack) -> None:
    record = json.loads((attack.step / RECORD).read_text())
    name = name.format(outside=attack.outside)
    attack.sign(attack.key if has_key else bytes(32), files=record["files"] | {name: 64 * "0"})
    said, events = attack.load()
    assert said == ""
    attack.assert_quiet(events)
    assert opened(events, attack.step) == []
    assert (attack.run / f"damaged-{STEP}").is_dir()


@pytest.mark.parametrize("name", ["../../outside/shard", "{outside}/shard", "../step-000000002/__0_0.distcp"])
def test_an_index_cannot_name_files_elsewhere(name: str, attack: Attack) -> None:
    name = name.format(outside=attack.outside)

    def change(record: Any) -> None:
        for info in record.storage_data.values():
            info.relative_path = name

    attack.change_metadata(change)
    attack.sign(attack.key)
    said, events = attack.load()
    assert str(attack.step) in said and "is no checkpoint of ours" in said
    attack.assert_quiet(events)
    assert len(opened(events, attack.step)) == len(FILES), "hashed, and the index read; no shard"


@pytest.mark.parametrize("name", [*FILES, "."])
def test_no_link_is_followed(name: str, attack: Attack) -> None:
    """Even to a file that would pass: of a linked record alone it is read what is there, as of any."""
    target = attack.step / name
    elsewhere = attack.run.parent / "elsewhere"
    shutil.move(target, elsewhere)
    target.symlink_to(elsewhere)
    said, events = attack.load()
    assert said == ""
    attack.assert_quiet(events)
    assert opened(events, attack.step) == []
    assert (attack.run / f"damaged-{STEP}").exists() and elsewhere.exists()


def test_a_key_is_not_taken_through_a_link(attack: Attack) -> None:
    (attack.run / KEY).rename(attack.run.parent / "elsewhere")
    (attack.run / KEY).symlink_to(attack.run.parent / "elsewhere")
    said, _ = watched(lambda: envelope.open_key(attack.run))
    assert str(attack.run / KEY) in said and "cannot be used" in said


def test_damage_at_random_never_reaches_a_pickle(attack: Attack) -> None:
    """Bits of `.metadata` and shards: a process that restores sees them as bytes to hash, and no more."""
    chooser = random.Random(0)

    def refuse() -> None:
        record, damage = check(attack.run, 3, attack.key)
        assert record is None
        raise UserError(damage)

    for number in range(40):
        path = attack.step / chooser.choice(FILES[:-1])
        kept = path.read_bytes()
        content = bytearray(kept)
        content[chooser.randrange(len(content))] ^= 1 << chooser.randrange(8)
        path.write_bytes(content)
        said, events = watched(refuse)
        assert said == f"{path} was altered since it was written", number
        attack.assert_quiet(events)
        assert sorted(opened(events, attack.step)) == FILES[:-1]
        path.write_bytes(kept)
