"""For `gpu_moe.py`: at which sizes and where everything runs, and how it is timed."""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Setting:
    """Where everything runs, and its sizes.

    Attributes:
        hidden, ffn: widths of an expert, D and F.
        rows, experts: each R = T·K with each E is a shape.
        warm_up, repeats: turns that are not timed, and that are.
        side: of a square product that shows what the chip can do.
        sequences, length: of a step of an expert job.
    """

    device: torch.device
    dtype: torch.dtype
    hidden: int
    ffn: int
    rows: tuple[int, ...]
    experts: tuple[int, ...]
    warm_up: int
    repeats: int
    side: int
    sequences: int
    length: int

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"


FULL = Setting(torch.device("cuda"), torch.bfloat16, 4096, 11008, (8192, 16384, 65536), (1, 2, 8), 2, 10, 8192, 2, 4096)
#: fp32, because Triton's interpreter multiplies bf16 wrongly.
SMALL = Setting(torch.device("cpu"), torch.float32, 48, 32, (16,), (1, 4), 0, 1, 64, 2, 32)

#: What is timed: begun anew each turn, it yields where a part of it ends.
Timed = Callable[[], Iterator[None]]
#: Milliseconds of the parts, for each turn.
Times = list[list[float]]


def alternate(setting: Setting, ways: dict[str, Timed]) -> dict[str, Times]:
    """Runs everybody in turns, so that a chip that slows down does so for all."""

    def mark() -> Any:
        if not setting.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def between(first: Any, last: Any) -> float:
        return float(first.elapsed_time(last) if setting.on_gpu else (last - first) * 1e3)

    marks: dict[str, list[list[Any]]] = {name: [] for name in ways}
    for _ in range(setting.warm_up + setting.repeats):
        for name, way in ways.items():
            marks[name].append([mark(), *(mark() for _ in way())])
    if setting.on_gpu:
        torch.cuda.synchronize()
    return {
        name: [[between(*pair) for pair in itertools.pairwise(turn)] for turn in turns[setting.warm_up :]]
        for name, turns in marks.items()
    }


def whole(run: Callable[[], object]) -> Timed:
    """Something of one part."""

    def timed() -> Iterator[None]:
        run()
        yield

    return timed


def time_of(setting: Setting, run: Callable[[], object]) -> float:
    """Milliseconds, the median."""
    return median(alternate(setting, {"": whole(run)})[""])


def of_part(times: Times, part: int | None) -> list[float]:
    """Milliseconds of a part, or of all."""
    return [sum(turn) if part is None else turn[part] for turn in times]


def median(times: Times, part: int | None = None) -> float:
    return statistics.median(of_part(times, part))


def with_range(times: Times, part: int | None = None) -> str:
    each = of_part(times, part)
    return f"{statistics.median(each):.3f} ({min(each):.3f} to {max(each):.3f})"


def rate(operations: float, milliseconds: float) -> float:
    """TFLOP/s."""
    return operations / milliseconds / 1e9


def square_rate(setting: Setting) -> float:
    """TFLOP/s of a square product: the ceiling of everything here."""
    a, b = (torch.randn(setting.side, setting.side, device=setting.device, dtype=setting.dtype) for _ in range(2))
    return rate(2 * setting.side**3, time_of(setting, lambda: a @ b))
