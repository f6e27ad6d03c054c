"""The expert layer on one GPU: ours beside a cuBLAS loop, PyTorch's grouped products, Liger and transformers.

    python benchmarks/gpu_moe.py            (eight minutes at most, on one H100)
    python benchmarks/gpu_moe.py --small    (any machine: toy sizes under Triton's interpreter; shows that it runs)

Tiles are tuned first. Each shape is checked on fresh, uneven routing against fp32 autograd, with memory that nobody has
written full of NaN, and run twice; then everybody is timed in turns on even routing. Weights alone are larger than the
L2 cache, so inputs need not rotate. Then come the layer's products alone, gradients accumulated in place, and a step of
an expert job. The status is 1 if a backend of ours fails, errs or does not repeat.

Shapes: T tokens, D residual width, F FFN width, E experts, K active experts, R = T·K rows.
"""

import argparse
import functools
import gc
import importlib.metadata
import math
import os
import platform
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import NamedTuple

if "--small" in sys.argv:
    os.environ |= {"TRITON_INTERPRET": "1", "LIGER_FUSED_MOE_AUTOTUNE": "0"}

import torch
import torch.nn.functional as F
from flexpert_kernels import sort_by_expert
from flexpert_kernels.moe.loop import loop_outer, loop_rows
from moe_layer import LIGER, OF_US, OURS, PEERS, Inputs, Way, check, definition, draw, memory, results, tune
from moe_step import ExpertJob, shape_of
from moe_timing import FULL, SMALL, Setting, Times, alternate, median, rate, square_rate, whole, with_range

from flexpert.train.compilation import compile_blocks
from flexpert.train.tune_kernels import lines_of

RESULT = Path(__file__).parent / "results/gpu_moe.md"
#: Seconds after which nothing new is begun.
LIMIT = 360
GIB = 2**30


class Goal(NamedTuple):
    """What is wanted on an H100: a value from `least` on, `below` another."""

    text: str
    least: float = -math.inf
    below: float = math.inf


GOALS = (
    OVER_LOOP := Goal("products at 90% of the cuBLAS loop or more", least=0.9),
    OVER_LIBRARY := Goal("products no slower than torch's grouped_mm", least=1),
    FAST := Goal("layer forward and backward at 500 TFLOP/s or more", least=500),
    AHEAD := Goal("layer ahead of Liger", least=1),
    LEAN := Goal("kept for the backward pass: X and H, and 1% for indices", below=1.01),
    SKIPS := Goal("expert step at 95% or more of its ceiling over the reference's way", least=0.95),
    RIGHT := Goal("no failure, and errors below 1e-2", below=1e-2),
    REPEATS := Goal("the same bits twice", least=1),
)


class Report:
    """Tables, printed as they grow and in a file whatever happens next; and what was seen of each goal.

    Args:
        goals: those that mean something where this runs.
    """

    def __init__(self, output: Path | None, goals: Sequence[Goal]) -> None:
        self.output, self.goals, self.started = output, goals, time.monotonic()
        self.lines: list[str] = []
        self.left_out: list[str] = []
        self.seen: dict[Goal, list[tuple[str, float]]] = {goal: [] for goal in GOALS}

    def add(self, *lines: str) -> None:
        self.lines += lines
        print(*lines, sep="\n", flush=True)
        if self.output is not None:
            self.output.write_text("\n".join([*self.lines, ""]), encoding="utf-8")

    def table(self, text: str, *columns: str) -> None:
        self.add("", text, "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|")

    def row(self, *cells: object) -> None:
        self.add(f"| {' | '.join(map(str, cells))} |")

    def part(self, what: str, write: Callable[[], object]) -> None:
        """Part of the report, unless it is late; what fails in it is a failure of ours, and the others go on."""
        if self.is_late(what):
            return
        try:
            gc.collect()
            torch.cuda.empty_cache()
            write()
        except Exception:
            self.fail(what)

    def seconds(self) -> float:
        return time.monotonic() - self.started

    def is_late(self, what: str) -> bool:
        if self.seconds() > LIMIT:
            self.left_out.append(what)
        return self.seconds() > LIMIT

    def see(self, goal: Goal, where: str, value: float) -> None:
        self.seen[goal].append((where, value))

    def fail(self, what: str) -> None:
        traceback.print_exc()
        self.see(RIGHT, what, math.nan)

    def missed(self, goal: Goal) -> list[str]:
        return [f"{where}: {value:.3g}" for where, value in self.seen[goal] if not goal.least <= value < goal.below]

    def end(self) -> None:
        if self.left_out:
            self.add("", f"Left out, because {LIMIT} s had passed: {'; '.join(self.left_out)}.")
        anywhere = "Goals of speed and memory are for a GPU, and this was none. What holds anywhere:"
        self.add("", "Goals on an H100:" if self.goals == GOALS else anywhere, "")
        for goal in self.goals:
            seen, missed = self.seen[goal], self.missed(goal)
            verdict = f"missed in {len(missed)} of {len(seen)}: {'; '.join(missed)}" if missed else "met"
            self.add(f"- {goal.text}: {verdict if seen else 'not measured'}.")
        self.add("", f"{self.seconds():.0f} s in all.")


class Figures(NamedTuple):
    """Of somebody at a shape: as `check` and `memory` return them, and times of the forward and the backward pass."""

    error: float
    is_repeatable: bool
    kept: float
    peak: float
    times: Times


def forward_backward(way: Way, inputs: Inputs) -> Iterator[None]:
    y_TD = way(inputs)
    yield
    inputs.gradients(y_TD)
    yield


def measure(setting: Setting, rows: int, experts: int, report: Report) -> dict[str, Figures | str]:
    """Everybody at one shape, checked and timed; a text says why somebody is not."""
    fresh, inputs = draw(setting, rows, experts, uneven=True), draw(setting, rows, experts)
    wanted = results(definition, fresh.in_fp32())
    found: dict[str, Figures | str] = {}
    ways = {name: way for name, way in (OF_US | PEERS).items() if experts <= 2 or "dense" not in name}
    for name, way in ways.items():
        try:
            checked = check(way, fresh, wanted, poison=name in OF_US)
            held: tuple[float, float] = memory(way, inputs) if setting.on_gpu else (math.nan, math.nan)
            found[name] = Figures(*checked, *held, [])
        except Exception as error:
            found[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
            if name in OF_US:
                report.fail(f"{name} at R={rows}, E={experts}")
            elif isinstance(error, ModuleNotFoundError):
                found[name] = "not installed"
    del fresh, wanted
    taking_part = {name: figures for name, figures in found.items() if isinstance(figures, Figures)}
    times = alternate(setting, {name: functools.partial(forward_backward, ways[name], inputs) for name in taking_part})
    return found | {name: figures._replace(times=times[name]) for name, figures in taking_part.items()}


def layer(setting: Setting, rows: int, experts: int, dense: float, report: Report) -> None:
    """Rows of the table for one shape, and what they say of the goals."""
    found = measure(setting, rows, experts, report)
    ours, where, forward = found[OURS], f"R={rows}, E={experts}", 6 * rows * setting.hidden * setting.ffn
    for name, figures in found.items():
        if isinstance(figures, str):
            report.row(rows, experts, name, figures, *[""] * 8)
            continue
        error, is_repeatable, kept, peak, times = figures
        reached = rate(3 * forward, median(times))
        ratio = median(times) / median(ours.times) if isinstance(ours, Figures) else math.nan
        report.row(
            rows, experts, name, with_range(times),
            f"{rate(forward, median(times, 0)):.3g}", f"{rate(2 * forward, median(times, 1)):.3g}", f"{reached:.3g}",
            f"{reached / dense:.0%}", f"{ratio:.2f}", f"{kept / GIB:.2f}, {peak / GIB:.2f}", f"{error:.1e}",
            "yes" if is_repeatable else "no",
        )  # fmt: skip
        if name in OF_US:
            report.see(RIGHT, f"{name} at {where}", error)
            report.see(REPEATS, f"{name} at {where}", is_repeatable)
        if name == LIGER and isinstance(ours, Figures):
            report.see(AHEAD, where, ratio)
        if name == OURS:
            report.see(FAST, where, reached)
            if setting.on_gpu:
                x_bytes = rows // min(2, experts) * setting.hidden * setting.dtype.itemsize
                h_bytes = 2 * rows * setting.ffn * setting.dtype.itemsize
                report.see(LEAN, where, (x_bytes + kept) / (x_bytes + h_bytes))


def products(setting: Setting, rows: int, experts: int, dense: float, report: Report) -> None:
    """A layer's six products: rows of the table for one shape, and what they say of the goals."""
    from flexpert_kernels.grouped_mm import triton as grouped

    x, _, indices, gate_up, down, dy = (t.detach() for t in draw(setting, rows, experts))
    order_N, _, first = sort_by_expert(indices, experts)
    top_k, flat, host, ends = indices.shape[1], gate_up.flatten(1, 2), first.cpu(), first[1:].int().clone()
    h, a = grouped.up(x, order_N, top_k, gate_up, first)
    x_N, dy_N = x[order_N // top_k], dy[order_N // top_k]
    # Name, operations as multiples of R·D·F, ours, and what the others are given.
    table: list[tuple[str, int, Callable[[], object], torch.Tensor, torch.Tensor]] = [
        ("up", 4, lambda: grouped.up(x, order_N, top_k, gate_up, first), x_N, flat.mT),
        ("down", 2, lambda: grouped.rows(a, down, first), a, down.mT),
        ("dA", 2, lambda: grouped.rows(dy, down, first, True, order_N, top_k), dy_N, down),
        ("dX", 4, lambda: grouped.rows(h, flat, first, True), h, flat),
        ("dW2", 2, lambda: grouped.outer(dy, a, first, order_N, top_k, "y"), dy_N, a),
        ("dW13", 4, lambda: grouped.outer(h, x, first, order_N, top_k, "x"), h, x_N),
    ]
    for name, size, ours, left, right in table:
        loop, turned = (loop_outer, left.T) if name.startswith("dW") else (loop_rows, left)
        times = alternate(setting, {
            "ours": whole(ours),
            "loop": whole(functools.partial(loop, left, right, host)),
            "library": whole(functools.partial(F.grouped_mm, turned, right, offs=ends)),
        })  # fmt: skip
        rates = [rate(size * rows * setting.hidden * setting.ffn, median(of_one)) for of_one in times.values()]
        over_loop, over_library = rates[0] / rates[1], rates[0] / rates[2]
        where = f"{name} at R={rows}, E={experts}"
        report.see(OVER_LOOP, where, over_loop)
        report.see(OVER_LIBRARY, where, over_library)
        report.row(
            rows, experts, name, with_range(times["ours"]), *(f"{reached:.3g}" for reached in rates),
            f"{rates[0] / dense:.0%}", f"{over_loop:.2f}", f"{over_library:.2f}",
        )  # fmt: skip


def in_place(setting: Setting, rows: int, report: Report) -> None:
    """A row for dW13 into an fp32 gradient that is there already."""
    from flexpert_kernels.grouped_mm import triton as grouped

    experts = max(setting.experts)
    inputs = draw(setting, rows, experts)
    order_N, _, first = sort_by_expert(inputs.indices_TK, experts)
    h_N2F = torch.randn(rows, 2 * setting.ffn, device=setting.device, dtype=setting.dtype)
    total = torch.zeros(experts, 2 * setting.ffn, setting.hidden, device=setting.device)
    product = functools.partial(
        grouped.outer, h_N2F, inputs.x_TD.detach(), first, order_N, inputs.indices_TK.shape[1], "x"
    )
    times = alternate(setting, {
        "in place": whole(lambda: product(total, 1)),
        "returned": whole(product),
        "then added": whole(lambda: total.add_(product())),
    })  # fmt: skip
    added, alone, after = (median(of_one) for of_one in times.values())
    report.row(rows, experts, f"{added:.3f}", f"{alone:.3f}", f"{after:.3f}", f"{after / added:.2f}")


def expert_step(setting: Setting, report: Report) -> None:
    job = ExpertJob(setting, shape_of(setting))
    counted = [job.operations(everything) for everything in (False, True)]
    ceiling = counted[1] / counted[0]
    report.table(
        f"A step of an expert job, 2 x 7B width, {len(job.model.blocks)} layers, {setting.sequences} sequences of "
        f"{setting.length} tokens. The reference's way computes the gradients of both experts and zeroes the frozen "
        "one's; its frozen expert is in bf16 here, too, and its optimiser steps the trained one alone. What it "
        f"computes is {ceiling:.3f} times ours, attention and head included: the ceiling of the ratio.",
        "blocks", "", "both passes, ms", "TFLOP/s", "optimiser, ms", "ratio of passes", "of the ceiling",
    )  # fmt: skip
    for kind in ("eager", "compiled") if setting.on_gpu else ("eager",):
        if report.is_late(f"the {kind} step"):
            return
        if kind == "compiled":
            compile_blocks(job.model)
        both = alternate(setting, {str(all): functools.partial(job.step, all) for all in (False, True)})
        ratio = median(both["True"], 0) / median(both["False"], 0)
        report.see(SKIPS, kind, ratio / ceiling)
        names = ("frozen half skipped", "computed, then zeroed")
        for name, times, operations in zip(names, both.values(), counted, strict=True):
            report.row(
                kind, name, with_range(times, 0), f"{rate(operations, median(times, 0)):.3g}",
                f"{median(times, 1):.3f}", f"{ratio:.3f}", f"{ratio / ceiling:.1%}",
            )  # fmt: skip


def compare(setting: Setting, report: Report) -> None:
    name = torch.cuda.get_device_name() if setting.on_gpu else f"{platform.machine()}, interpreted"
    versions = ", ".join(map(version, ("triton", "liger-kernel", "transformers")))
    dense = square_rate(setting)
    report.add(
        f"The expert layer at hidden {setting.hidden}, FFN {setting.ffn}, {str(setting.dtype).removeprefix('torch.')}; "
        f"{date.today()}, {name}, PyTorch {torch.__version__}, CUDA {torch.version.cuda}, {versions}, Python "
        f"{platform.python_version()}.",
        f"A product of {setting.side} x {setting.side} matrices runs at {dense:.3g} TFLOP/s.",
        f"R rows are tokens times active experts (2, or 1 of 1). Medians (smallest to largest) of {setting.repeats}, "
        "in turns.",
    )
    middle, shapes = setting.rows[len(setting.rows) // 2], [(r, e) for r in setting.rows for e in setting.experts]

    def tiles() -> None:
        tuned = tune(setting, middle)
        report.add("", f"Tiles, tuned at {middle} rows of {max(setting.experts)} experts:", "")
        report.add("```", *lines_of(tuned), "```", "", f"{report.seconds():.0f} s until here.")
        for row in tuned:
            report.add(*(f"- {row.kernel}, {config}: {reason}" for config, reason in row.failed.items()))

    report.part("tuning", tiles)
    report.table(
        "The layer with all its gradients: 6·R·D·F operations forward (three products of 2·R·D·F), 12·R·D·F backward. "
        "Ratio: its time over ours. Kept: for the backward pass; peak: the most at any time, both beside the inputs. "
        "Error: the largest relative one of result and gradients, in norm, against fp32. transformers: its FlexOlmo "
        "experts, which are given the router's choices as all are.",
        "R", "E", "", "both, ms", "forward, TFLOP/s", "backward, TFLOP/s", "both, TFLOP/s", "of the square product",
        "ratio", "kept, peak, GiB", "error", "same bits twice",
    )  # fmt: skip
    for rows, experts in shapes:
        write = functools.partial(layer, setting, rows, experts, dense, report)
        report.part(f"layer at R={rows}, E={experts}", write)
    report.table(
        "The products alone: 4·R·D·F operations (up, dX, dW13), or 2·R·D·F. Ours gather rows from tokens, and up "
        "computes SwiGLU, too; the others are given gathered rows and do less.",
        "R", "E", "", "ours, ms", "TFLOP/s", "cuBLAS loop, TFLOP/s", "grouped_mm, TFLOP/s", "of the square product",
        "ratio to the loop", "to grouped_mm",
    )  # fmt: skip
    for rows, experts in shapes:
        write = functools.partial(products, setting, rows, experts, dense, report)
        report.part(f"products at R={rows}, E={experts}", write)
    report.table(
        "dW13 into an fp32 gradient that exists: added to in the kernel; or returned, and then added. Ratio: what "
        "adding in place would gain.",
        "R", "E", "in place, ms", "returned, ms", "then added, ms", "ratio",
    )  # fmt: skip
    for rows in setting.rows:
        report.part(f"gradients in place at R={rows}", functools.partial(in_place, setting, rows, report))
    report.part("the expert step", functools.partial(expert_step, setting, report))
    report.end()


def version(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"no {package}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--output", type=Path, help="where the tables go (results/gpu_moe.md; --small: nowhere)")
    arguments = parser.parse_args()
    if not arguments.small and not torch.cuda.is_available():
        parser.exit(2, "gpu_moe.py: there is no CUDA device here; --small shows that the script runs\n")
    output = arguments.output or (None if arguments.small else RESULT)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
    report = Report(output, (RIGHT, REPEATS) if arguments.small else GOALS)
    warnings.filterwarnings("ignore", message=".*deterministic.*")  # poisoning wants NaN, not the determinism
    with tempfile.TemporaryDirectory() as cache:
        if arguments.small:  # what is tuned in the interpreter is for nobody
            os.environ["XDG_CACHE_HOME"] = cache
        compare(SMALL if arguments.small else FULL, report)
    raise SystemExit(1 if report.missed(RIGHT) or report.missed(REPEATS) else 0)


if __name__ == "__main__":
    main()
