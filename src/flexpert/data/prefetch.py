"""The next step's sequences are read while a step computes."""

from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from torch import Tensor

from flexpert.data.dataset import TokenWindows
from flexpert.data.mixture import MixedWindows
from flexpert.testing import reached


class Prefetch:
    """Sequences of one step after another, the next of which a thread reads ahead within a `with` block.

    What a step reads is a function of its number alone, so that reading ahead leaves no state behind; outside of the
    block, nothing is read ahead. An error of the thread is raised by the `take` of the step that it belongs to.

    Args:
        windows: where the sequences come from.
        batch_sequences: how many a step takes.
        num_steps: of the run; nothing is read beyond.
        pin: whether to put them into pinned memory, from where they reach a GPU beside its work.
        share: (i, n): only the i-th (from 0) of n equal parts of a step's sequences, for processes that share them.
    """

    def __init__(
        self,
        windows: TokenWindows | MixedWindows,
        batch_sequences: int,
        num_steps: int,
        pin: bool = False,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        index, number = share
        assert batch_sequences % number == 0
        self.count = batch_sequences // number
        self.offset = index * self.count
        self.windows, self.batch_sequences, self.num_steps, self.pin = windows, batch_sequences, num_steps, pin
        self.thread: ThreadPoolExecutor | None = None
        self.ahead: dict[int, Future[Tensor]] = {}  # of the next step, if it was begun

    def read(self, step: int) -> Tensor:
        reached("data", step + 1)
        sequences = self.windows.sequences(step * self.batch_sequences + self.offset, self.count)
        return sequences.pin_memory() if self.pin else sequences

    def take(self, step: int) -> Tensor:
        """The sequences of `step`, which counts from 0."""
        begun, self.ahead = self.ahead.get(step), {}
        sequences = self.read(step) if begun is None else begun.result()
        if self.thread is not None and step + 1 < self.num_steps:
            self.ahead[step + 1] = self.thread.submit(self.read, step + 1)
        return sequences

    def __enter__(self) -> "Prefetch":
        self.thread = ThreadPoolExecutor(1, "prefetch")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self.thread is not None
        self.thread.shutdown(cancel_futures=True)
        self.thread, self.ahead = None, {}
