"""Reading ahead: the same sequences, errors in their place, and no thread that stays."""

import threading
from pathlib import Path

import pytest
import torch
from toy import SHAPE, train

from flexpert.data.dataset import TokenWindows
from flexpert.data.prefetch import Prefetch
from flexpert.testing import Fault, faults
from flexpert.train.loop import Trainer


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")]


@pytest.fixture
def windows(road: Path) -> TokenWindows:
    return TokenWindows(road / "data/public", "train", 16, seed=3)


def test_a_step_reads_the_same_ahead_and_not(windows: TokenWindows) -> None:
    prefetch = Prefetch(windows, batch_sequences=4, num_steps=9)
    alone = [prefetch.take(step) for step in range(9)]
    assert not threads()
    with prefetch:
        assert all(torch.equal(prefetch.take(step), alone[step]) for step in (5, 6, 2, 3, 8))
        assert not prefetch.ahead  # the last step has no next
    assert not threads()


def test_the_next_step_is_read_in_a_thread_while_this_one_computes(
    windows: TokenWindows, monkeypatch: pytest.MonkeyPatch
) -> None:
    readers: dict[int, str] = {}
    second_read = threading.Event()
    original = windows.sequences

    def sequences(start: int, count: int) -> torch.Tensor:
        readers[start] = threading.current_thread().name
        if start == 4:
            second_read.set()
        return original(start, count)

    monkeypatch.setattr(windows, "sequences", sequences)
    with Prefetch(windows, batch_sequences=4, num_steps=3) as prefetch:
        prefetch.take(0)
        assert second_read.wait(timeout=30)  # before it was asked for
        prefetch.take(1)
        prefetch.take(2)
    assert readers.keys() == {0, 4, 8}
    assert readers[0] == threading.current_thread().name
    assert readers[4].startswith("prefetch") and readers[8].startswith("prefetch")


def test_an_error_of_the_thread_is_raised_by_its_step_and_ends_the_run(
    road: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Trainer.__init__

    class Unreadable(OSError):
        pass

    def init(self: Trainer, *args: object, **kwargs: object) -> None:
        original(self, *args, **kwargs)  # type: ignore[arg-type]
        read = self.windows.sequences

        def sequences(start: int, count: int) -> torch.Tensor:
            if start == 3 * self.config.train.batch_sequences:
                raise Unreadable("the disk is gone")
            return read(start, count)

        monkeypatch.setattr(self.windows, "sequences", sequences)

    monkeypatch.setattr(Trainer, "__init__", init)
    with pytest.raises(Unreadable, match="the disk is gone"):
        train("pretrain", *SHAPE, f"data.dir={road}/data/public", f"output_dir={tmp_path}/run")
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 3
    assert not threads()


def test_the_thread_ends_with_a_run_that_fails_elsewhere(road: Path, tmp_path: Path) -> None:
    with faults(Fault("error", "optimizer", step=2)), pytest.raises(RuntimeError, match="a fault was planted"):
        train("pretrain", *SHAPE, f"data.dir={road}/data/public", f"output_dir={tmp_path}/run")
    assert not threads()
