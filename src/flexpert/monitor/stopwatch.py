"""What the seconds of a step go to."""

import time

import torch


class Stopwatch:
    """Measures parts that follow one another, on the GPU's clock where there is one, so that nothing waits for it.

    Args:
        device: what computes.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.parts: list[str] = []
        self.marks: list[float | torch.cuda.Event] = [self.now()]

    def now(self) -> float | torch.cuda.Event:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def end(self, part: str) -> None:
        """The part ends, which began where the one before it ended."""
        self.parts.append(part)
        self.marks.append(self.now())

    def seconds(self) -> dict[str, float]:
        """By part; after the device has been waited for."""
        return {
            part: last - first if isinstance(last, float) and isinstance(first, float) else elapsed(first, last)
            for part, first, last in zip(self.parts, self.marks, self.marks[1:], strict=False)
        }


def elapsed(first: float | torch.cuda.Event, last: float | torch.cuda.Event) -> float:
    assert isinstance(first, torch.cuda.Event) and isinstance(last, torch.cuda.Event)
    return float(first.elapsed_time(last)) / 1000
