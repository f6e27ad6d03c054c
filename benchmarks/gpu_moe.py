"""The expert layer on one GPU: ours beside a cuBLAS loop, PyTorch's grouped products, Liger and transformers.

    python benchmarks/gpu_moe.py            (eight minutes at most, on one H100)
    python benchmarks/gpu_moe.py --small    (any machine: toy sizes under Triton's interpreter; shows that it runs)

Tiles are tuned first. Each shape is checked on fresh, uneven routing against fp32 autograd, with memory that nobody has
written full of NaN, and run twice; then everybody is timed in turns on even routing. Weights alone are larger than the
L2 cache, so inputs need not rotate. A layer of R rows (tokens times active experts) takes 6·R·D·F operations forward
(three products of 2·R·D·F) and 12·R·D·F backward. Then come its products alone, gradients accumulated in place, and a
step of an expert job.

Shapes: T tokens, D residual width, F FFN width, E experts, K active experts, R = T·K rows.
"""

# ruff: noqa: E402 (`--small` has to be known before Triton is imported)

import argparse
import contextlib
import functools
import gc
import importlib.metadata
import itertools
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

SMALL = "--small" in sys.argv
if SMALL:  # both are read when kernels are imported
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["LIGER_FUSED_MOE_AUTOTUNE"] = "0"

import torch
import torch.nn.functional as F
from flexpert_kernels import moe_ffn, sort_by_expert, tuning
from flexpert_kernels.grouped_mm import triton as grouped
from flexpert_kernels.moe.loop import loop_outer, loop_rows
from torch import Tensor, nn

from flexpert.config.compose import compose
from flexpert.config.groups import ModelConfig, OptimConfig
from flexpert.model.flops import flops_per_token
from flexpert.model.loss import chunked_nll
from flexpert.model.transformer import Transformer, build_on_meta
from flexpert.parallel.layout import Layout
from flexpert.planning.job import expert_job
from flexpert.planning.memory import HALF, memory_of
from flexpert.train.compilation import compile_blocks
from flexpert.train.expert import OWN
from flexpert.train.freeze import cast_frozen, train_only
from flexpert.train.optimizer import build_optimizer

RESULT = Path(__file__).parent / "results/gpu_moe.md"
DEVICE = torch.device("cpu" if SMALL else "cuda")
#: bf16 dots are wrong under the interpreter.
DTYPE = torch.float32 if SMALL else torch.bfloat16
GIB = 2**30
HIDDEN, FFN = (48, 32) if SMALL else (4096, 11008)
ROWS = (16, 32) if SMALL else (8192, 16384, 65536)
EXPERTS = (1, 2, 4) if SMALL else (1, 2, 8)
WARM_UP, REPEATS = (0, 1) if SMALL else (2, 10)
TUNED_ROWS = ROWS[1]
#: Of a square product, and of a copy, that show what the chip can do.
SIDE, COPIED = (64, 1 << 16) if SMALL else (8192, 2 << 30)
#: Of a step, and the share of the GPU's memory that the plan may fill.
SEQUENCES, LENGTH, USED = (2, 32, 1.0) if SMALL else (2, 4096, 0.8)
#: Seconds after which nothing new is begun.
LIMIT = 360
OURS, LIGER = "Flexpert, triton", "Liger fused_moe"


class Inputs(NamedTuple):
    """What a layer is given, and the gradient of its result."""

    x_TD: Tensor
    weights_TK: Tensor
    indices_TK: Tensor
    gate_up_E2FD: Tensor
    down_EDF: Tensor
    dy_TD: Tensor

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.x_TD, self.weights_TK, self.gate_up_E2FD, self.down_EDF


Way = Callable[[Inputs], Tensor]
Mark = Callable[[], None]
#: Milliseconds between marks, for each repetition.
Spans = list[tuple[float, ...]]


class Report:
    """Printed as it grows, and in a file whatever happens next."""

    def __init__(self, output: Path | None) -> None:
        self.lines: list[str] = []
        self.output, self.started = output, time.monotonic()

    def add(self, *lines: str) -> None:
        self.lines += lines
        print(*lines, sep="\n", flush=True)
        if self.output is not None:
            self.output.write_text("\n".join([*self.lines, ""]), encoding="utf-8")

    def is_late(self, what: str) -> bool:
        late = time.monotonic() - self.started > LIMIT
        if late:
            self.add("", f"Left out, because {LIMIT} s had passed: {what}.")
        return late


def draw(rows: int, experts: int, uneven: bool = False) -> Inputs:
    """Fresh inputs. Uneven: the first of more than two experts gets nothing, the last most."""
    top_k = min(2, experts)
    scores_TE = torch.rand(rows // top_k, experts, device=DEVICE)
    if uneven:
        scores_TE *= torch.linspace(0 if experts > top_k else 0.5, 1, experts, device=DEVICE)
    best_TK, indices_TK = scores_TE.topk(top_k)

    def random(*shape: int, scale: float = 1.0, gradient: bool = True) -> Tensor:
        return (torch.randn(shape, device=DEVICE, dtype=DTYPE) * scale).requires_grad_(gradient)

    return Inputs(
        random(rows // top_k, HIDDEN),
        best_TK.softmax(1).to(DTYPE).requires_grad_(),
        indices_TK,
        random(experts, 2, FFN, HIDDEN, scale=HIDDEN**-0.5),
        random(experts, HIDDEN, FFN, scale=FFN**-0.5),
        random(rows // top_k, HIDDEN, gradient=False),
    )


def definition(inputs: Inputs) -> Tensor:
    """The layer in plain PyTorch, in the inputs' type."""
    x_TD, weights_TK, indices_TK, gate_up_E2FD, down_EDF, _ = inputs
    y_TD = torch.zeros_like(x_TD)
    for expert, (gate_up_2FD, down_DF) in enumerate(zip(gate_up_E2FD.unbind(), down_EDF.unbind(), strict=True)):
        token, choice = (indices_TK == expert).nonzero(as_tuple=True)
        gate, up = (x_TD[token] @ gate_up_2FD.flatten(0, 1).T).chunk(2, 1)
        y_TD = y_TD.index_add(0, token, (F.silu(gate) * up) @ down_DF.T * weights_TK[token, choice, None])
    return y_TD


def of_liger() -> Way:
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    def way(inputs: Inputs) -> Tensor:
        x_TD, weights_TK, indices_TK, gate_up_E2FD, down_EDF, _ = inputs
        y_TD: Tensor = LigerFusedMoEFunction.apply(
            x_TD, gate_up_E2FD.flatten(1, 2), down_EDF, indices_TK.int(), weights_TK
        )
        return y_TD

    return way


def of_transformers(implementation: str, experts: int) -> Way:
    """FlexOlmo's block without its router, whose choices are given to all."""
    from transformers import FlexOlmoConfig
    from transformers.models.flex_olmo.modeling_flex_olmo import FlexOlmoExperts

    config = FlexOlmoConfig(
        hidden_size=HIDDEN, intermediate_size=FFN, num_experts=experts, num_experts_per_tok=min(2, experts)
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        module = FlexOlmoExperts(config)

    def way(inputs: Inputs) -> Tensor:
        x_TD, weights_TK, indices_TK, gate_up_E2FD, down_EDF, _ = inputs
        weights = {"gate_up_proj": gate_up_E2FD.flatten(1, 2), "down_proj": down_EDF}
        y_TD: Tensor = torch.func.functional_call(module, weights, (x_TD, indices_TK, weights_TK))
        return y_TD

    return way


def contestants(experts: int) -> dict[str, Way | str]:
    """By name; a text says why there is none."""

    def of_backend(name: str) -> Way:
        return lambda i: moe_ffn(*i[:5], backend=name, checked=False)

    ways: dict[str, Way | str] = {OURS: of_backend("triton")}
    if experts <= 2:
        ways["Flexpert, dense mixing"] = of_backend("dense")
    ways |= {"Flexpert, cuBLAS loop": of_backend("loop"), "Flexpert, torch grouped_mm": of_backend("grouped_mm")}
    peers: dict[str, Callable[[], Way]] = {
        LIGER: of_liger,
        "transformers, eager": lambda: of_transformers("eager", experts),
        "transformers, grouped_mm": lambda: of_transformers("grouped_mm", experts),
    }
    for name, make in peers.items():
        try:
            ways[name] = make()
        except ImportError:
            ways[name] = "not installed"
        except Exception as error:  # another release's
            ways[name] = failed(error)
    return ways


def failed(error: Exception) -> str:
    return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:80]}"


def results(way: Way, inputs: Inputs) -> list[Tensor]:
    """The layer's result and the gradient of each of its inputs."""
    y_TD = way(inputs)
    return [y_TD.detach(), *torch.autograd.grad(y_TD, inputs.leaves, inputs.dy_TD)]


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Whatever PyTorch allocates is full of NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(8, device=DEVICE).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


class Check(NamedTuple):
    """The largest ‖found − wanted‖ / ‖wanted‖ of result and gradients, and whether two runs gave the same bits."""

    error: float
    is_repeatable: bool


def checked(way: Way, inputs: Inputs, wanted: list[Tensor], poison: bool) -> Check:
    with poisoned() if poison else contextlib.nullcontext():
        first, second = results(way, inputs), results(way, inputs)
    errors = [((a.float() - b).norm() / b.norm()).item() for a, b in zip(first, wanted, strict=True)]
    error = float("nan") if any(e != e for e in errors) else max(errors)
    return Check(error, all(torch.equal(a, b) for a, b in zip(first, second, strict=True)))


def alternate(ways: dict[str, Callable[[Mark], object]], repeats: int = REPEATS) -> dict[str, Spans]:
    """Runs everybody in turns; each marks where it begins, where parts end, and where it ends."""
    marks: dict[str, list[list[Any]]] = {name: [] for name in ways}

    def mark(of_turn: list[Any]) -> None:
        if DEVICE.type == "cuda":
            of_turn.append(torch.cuda.Event(enable_timing=True))
            of_turn[-1].record()
        else:
            of_turn.append(time.perf_counter())

    for _ in range(WARM_UP + repeats):
        for name, way in ways.items():
            of_turn: list[Any] = []
            way(functools.partial(mark, of_turn))
            marks[name].append(of_turn)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()

    def between(a: Any, b: Any) -> float:
        return float(a.elapsed_time(b) if DEVICE.type == "cuda" else (b - a) * 1e3)

    return {
        name: [tuple(between(a, b) for a, b in itertools.pairwise(of_turn)) for of_turn in turns[WARM_UP:]]
        for name, turns in marks.items()
    }


def once(run: Callable[[], object]) -> Callable[[Mark], object]:
    """Marked before and after."""
    return lambda mark: (mark(), run(), mark())


def median(spans: Spans, part: int | None = None) -> float:
    """Milliseconds of one part, or of the whole."""
    return statistics.median(sum(times) if part is None else times[part] for times in spans)


def with_range(spans: Spans) -> str:
    whole = [sum(times) for times in spans]
    return f"{statistics.median(whole):.3f} ({min(whole):.3f} to {max(whole):.3f})"


def rate(operations: float, milliseconds: float) -> float:
    """TFLOP/s."""
    return operations / milliseconds / 1e9


def of_dense() -> float:
    """TFLOP/s of a square product: the ceiling of everything here."""
    a, b = (torch.randn(SIDE, SIDE, device=DEVICE, dtype=DTYPE) for _ in range(2))
    return rate(2 * SIDE**3, median(alternate({"": once(lambda: a @ b)}, 3 * REPEATS)[""]))


def of_copy() -> float:
    """TB/s of a copy, read and written."""
    source = torch.randint(255, (COPIED,), device=DEVICE, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * COPIED / median(alternate({"": once(lambda: target.copy_(source))})[""]) / 1e9


def compile_share(index: int, count: int) -> None:
    """Compiles a part of the candidates, ours and Liger's, into Triton's cache on disk: tuning then only times."""
    from triton.runtime.autotuner import Autotuner

    for kernel, _, _, run in tuning.products(HIDDEN, FFN, max(EXPERTS), 256, DEVICE, DTYPE):
        for config in tuning.candidates(kernel, DTYPE, tuning.capability(DEVICE))[index::count]:
            with contextlib.suppress(Exception):  # it will fail again, where that is seen
                run(config)
    del run
    with contextlib.suppress(Exception):
        from liger_kernel.ops import fused_moe_kernels

        for kernel in vars(fused_moe_kernels).values():
            if isinstance(kernel, Autotuner):
                kernel.configs = kernel.configs[index::count]
        results(of_liger(), draw(256, 1))


def tune(report: Report) -> None:
    """The tiles, ours and Liger's, before anything is timed. Liger's do not depend on the number of rows either."""
    started = time.monotonic()
    if not SMALL:
        count = min(12, os.cpu_count() or 1)
        pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"))
        with pool, contextlib.suppress(BrokenProcessPool):  # tuning then compiles by itself
            list(pool.map(compile_share, range(count), [count] * count))
    timer = (lambda run: median(alternate({"": once(run)}, 1)[""])) if SMALL else None
    tuned = tuning.tune(HIDDEN, FFN, max(EXPERTS), TUNED_ROWS, DEVICE, DTYPE, timer)
    with contextlib.suppress(Exception):  # it will fail again, where that is seen
        results(of_liger(), draw(TUNED_ROWS, max(EXPERTS)))
    report.add(
        "",
        f"Tiles, tuned at {TUNED_ROWS} rows of {max(EXPERTS)} experts: {time.monotonic() - started:.0f} s with Liger's",
        "",
        "| product | outputs x inputs | tile | warps | stages | tiles a group | TFLOP/s |",
        "|---|---|---|---|---|---|---|",
    )
    for row in tuned:
        c = row.config
        report.add(
            f"| {row.kernel} | {row.n} x {row.k} | {c.block_m} x {c.block_n} x {c.block_k} | {c.num_warps} | "
            f"{c.num_stages} | {c.group_m} | {row.tflops:.3g} |"
        )


class Memory(NamedTuple):
    """Bytes beside the inputs: kept for the backward pass, the result not counted, and the most at any time."""

    kept: int
    peak: int


def memory(way: Way, inputs: Inputs) -> Memory | None:
    """Of a layer that has run before, so that libraries have taken their workspaces; None: no GPU."""
    if DEVICE.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y_TD = way(inputs)
    kept = torch.cuda.memory_allocated() - before - y_TD.nbytes
    torch.autograd.grad(y_TD, inputs.leaves, inputs.dy_TD)
    return Memory(kept, torch.cuda.max_memory_allocated() - before)


def forward_backward(way: Way, inputs: Inputs, mark: Mark) -> None:
    mark()
    y_TD = way(inputs)
    mark()
    torch.autograd.grad(y_TD, inputs.leaves, inputs.dy_TD)
    mark()


class Figures(NamedTuple):
    """Of a contestant at a shape."""

    check: Check
    memory: Memory | None
    spans: Spans

    def cells(self, forward: int, dense: float, ratio: float) -> str:
        first, last = rate(forward, median(self.spans, 0)), rate(2 * forward, median(self.spans, 1))
        whole = rate(3 * forward, median(self.spans))
        held = f"{self.memory.kept / GIB:.2f}, {self.memory.peak / GIB:.2f}" if self.memory is not None else "n/a"
        return (
            f"{with_range(self.spans)} | {first:.3g} | {last:.3g} | {whole:.3g} | {whole / dense:.0%} | {ratio:.2f} | "
            f"{held} | {self.check.error:.1e} | {'yes' if self.check.is_repeatable else 'no'} |"
        )


def measured(ways: dict[str, Way | str], rows: int, experts: int) -> dict[str, Figures | str]:
    """Everybody at one shape, checked and timed; a text says why somebody is not."""
    excuses = {name: way for name, way in ways.items() if isinstance(way, str)}
    taking_part = {name: way for name, way in ways.items() if not isinstance(way, str)}
    checks: dict[str, tuple[Check, Memory | None]] = {}
    fresh, inputs = draw(rows, experts, uneven=True), draw(rows, experts)
    wide = Inputs(*(t.detach().float().requires_grad_() if t.is_floating_point() else t for t in fresh))
    wanted = results(definition, wide)
    del wide
    for name, way in taking_part.items():
        try:
            checks[name] = checked(way, fresh, wanted, name.startswith("Flexpert")), memory(way, inputs)
        except Exception as error:  # the others go on; `main` ends with status 1 if it was ours
            excuses[name] = failed(error)
    del fresh, wanted
    spans = alternate({name: functools.partial(forward_backward, taking_part[name], inputs) for name in checks})
    return {name: excuses[name] if name in excuses else Figures(*checks[name], spans[name]) for name in ways}


def layer_rows(rows: int, experts: int, dense: float, goals: "Goals") -> Iterator[str]:
    """Lines of the table for one shape."""
    found = measured(contestants(experts), rows, experts)
    goals.see_layer(rows, experts, found)
    ours = found[OURS]
    for name, figures in found.items():
        start = f"| {rows} | {experts} | {name} |"
        if isinstance(figures, str):
            yield f"{start} {figures} |" + " |" * 8
        else:
            ratio = float("nan") if isinstance(ours, str) else median(figures.spans) / median(ours.spans)
            yield f"{start} {figures.cells(6 * rows * HIDDEN * FFN, dense, ratio)}"


class Product(NamedTuple):
    """A product of a layer: multiples of R·D·F operations, and who computes it, on rows already gathered but for us."""

    name: str
    size: int
    ours: Callable[[], object]
    loop: Callable[[], object]
    library: Callable[[], object]


def products_of(inputs: Inputs) -> list[Product]:
    """The six products. Ours gather rows, and `up` also computes SwiGLU; the libraries' share of that is not timed."""
    x, _, indices, gate_up, down, dy = (t.detach() for t in inputs)
    order = sort_by_expert(indices, len(down))
    rows, first, top_k = order.order_N, order.offsets, indices.shape[1]
    host, ends = first.cpu(), first[1:].int().clone()
    flat = gate_up.flatten(1, 2)
    h, a = grouped.up(x, rows, top_k, gate_up, first)
    x_N, dy_N = x[rows // top_k], dy[rows // top_k]
    library = F.grouped_mm
    return [
        Product("up", 4, lambda: grouped.up(x, rows, top_k, gate_up, first),
                lambda: loop_rows(x_N, flat.mT, host), lambda: library(x_N, flat.mT, offs=ends)),
        Product("down", 2, lambda: grouped.rows(a, down, first),
                lambda: loop_rows(a, down.mT, host), lambda: library(a, down.mT, offs=ends)),
        Product("dA", 2, lambda: grouped.rows(dy, down, first, True, rows, top_k),
                lambda: loop_rows(dy_N, down, host), lambda: library(dy_N, down, offs=ends)),
        Product("dX", 4, lambda: grouped.rows(h, flat, first, True),
                lambda: loop_rows(h, flat, host), lambda: library(h, flat, offs=ends)),
        Product("dW2", 2, lambda: grouped.outer(dy, a, first, rows, top_k, "y"),
                lambda: loop_outer(dy_N, a, host), lambda: library(dy_N.T, a, offs=ends)),
        Product("dW13", 4, lambda: grouped.outer(h, x, first, rows, top_k, "x"),
                lambda: loop_outer(h, x_N, host), lambda: library(h.T, x_N, offs=ends)),
    ]  # fmt: skip


def product_rows(rows: int, experts: int, dense: float, goals: "Goals") -> Iterator[str]:
    for name, size, *ways in products_of(draw(rows, experts)):
        runs = dict(zip(("ours", "loop", "library"), ways, strict=True))
        try:
            runs["library"]()
        except RuntimeError:
            del runs["library"]
        spans = alternate({who: once(run) for who, run in runs.items()})
        rates = {who: rate(size * rows * HIDDEN * FFN, median(times)) for who, times in spans.items()}
        library = rates.get("library", float("nan"))
        ratios = rates["ours"] / rates["loop"], rates["ours"] / library
        goals.see_product(f"{name} at R={rows}, E={experts}", *ratios)
        yield (
            f"| {rows} | {experts} | {name} | {with_range(spans['ours'])} | {rates['ours']:.3g} | "
            f"{rates['ours'] / dense:.0%} | {rates['loop']:.3g} | {library:.3g} | {ratios[0]:.2f} | {ratios[1]:.2f} |"
        )


def sink_rows(rows: int, experts: int) -> Iterator[str]:
    """dW13 into an fp32 gradient that is there already: in place, or as a tensor of its own that is then added."""
    inputs = draw(rows, experts)
    order, top_k = sort_by_expert(inputs.indices_TK, experts), inputs.indices_TK.shape[1]
    x_TD, h_N2F = inputs.x_TD.detach(), torch.randn(rows, 2 * FFN, device=DEVICE, dtype=DTYPE)
    sink = torch.zeros(experts, 2 * FFN, HIDDEN, device=DEVICE)
    product = functools.partial(grouped.outer, h_N2F, x_TD, order.offsets, order.order_N, top_k, "x")
    spans = alternate({
        "in place": once(lambda: product(sink, 1)),
        "alone": once(product),
        "then added": once(lambda: sink.add_(product())),
        "then cast and added": once(lambda: sink.add_(product().float())),
    })  # fmt: skip
    times = {name: median(of_one) for name, of_one in spans.items()}
    row = " | ".join(f"{milliseconds:.3f}" for milliseconds in times.values())
    yield f"| {rows} | {experts} | {row} | {times['then added'] / times['in place']:.2f} |"


def operations(model: Transformer) -> float:
    """Of a token, as they are performed: attention skips what is after a token and repeats a product in its backward
    pass (five, where four are counted), and the loss computes its logits twice.
    """
    whole, plain, config = flops_per_token(model, LENGTH), flops_per_token(model, 0), model.config
    attention = (whole.forward - plain.forward) / 2 + (whole.backward - plain.backward) * 5 / 8
    return plain.total + attention + 2 * config.vocab * config.hidden_size


def shape_of_step() -> ModelConfig:
    """As many layers of two experts as the plan says fit; both have gradients in the reference's way."""
    config: ModelConfig = compose("plan", ["model=flex_2x7b"])[0].model
    if SMALL:
        return replace(config, hidden_size=HIDDEN, intermediate_size=FFN, num_heads=4, vocab_size=256, num_layers=2)
    available = USED * torch.cuda.get_device_properties(DEVICE).total_memory

    def needed(layers: int) -> int:
        part = replace(config, num_layers=layers)
        planned = memory_of(expert_job(part, 1, 1), Layout(1), SEQUENCES * LENGTH, 1024, "none")
        return planned.total + HALF * part.num_ffn_params()

    fitting = [layers for layers in range(1, config.num_layers + 1) if needed(layers) <= available]
    return replace(config, num_layers=max(fitting, default=1))


def build_job(config: ModelConfig) -> Transformer:
    """As `flexpert expert` has it on a GPU, of random weights."""
    model = build_on_meta(config, (1, 1))
    train_only(model, lambda name: any(part in name for part in OWN))
    if not SMALL:
        cast_frozen(model, DTYPE)
    model.to_empty(device=DEVICE)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0) if "norm" in name else parameter.normal_(0.0, 0.02)
    return model


def step_rows(config: ModelConfig, report: Report, goals: "Goals") -> None:
    """Steps with the frozen half skipped and in the reference's way, in turns on one model, plain and compiled."""
    model = build_job(config)
    optimizer = build_optimizer(model, OptimConfig())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    frozen = [parameter for name, parameter in model.named_parameters() if ".groups.0." in name]
    tokens_BS = torch.randint(0, config.vocab, (SEQUENCES, LENGTH + 1), device=DEVICE)

    def step(compute_all: bool, mark: Mark) -> None:
        for parameter in frozen:
            parameter.requires_grad_(compute_all)
        mark()
        with torch.autocast("cuda", torch.bfloat16, enabled=not SMALL):
            hidden = model(tokens_BS[:, :-1])
            nll_T, _ = chunked_nll(hidden.stream_BSD.flatten(0, 1), model.head.weight, tokens_BS[:, 1:].flatten())
        nll_T.mean().backward()
        for gradient in (parameter.grad for parameter in frozen):
            if gradient is not None:
                gradient.zero_()
        mark()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        mark()
        model.zero_grad(set_to_none=True)

    counted = {}
    for compute_all in (False, True):
        for parameter in frozen:
            parameter.requires_grad_(compute_all)
        counted[compute_all] = operations(model) * SEQUENCES * LENGTH
    ceiling = counted[True] / counted[False]
    report.add(
        "",
        f"A step of an expert job, 2 x 7B width, {config.num_layers} layers, {SEQUENCES} sequences of {LENGTH} tokens. "
        "The reference's way computes the gradients of both experts and zeroes the frozen one's; its frozen expert is "
        f"in bf16 here, too, and its optimiser steps the trained one alone. What it computes is {ceiling:.3f} times "
        "ours, attention and head included: the ceiling of the ratio.",
        "",
        "| blocks | | both passes, ms | TFLOP/s | optimiser, ms | ratio, passes | ratio, steps | of the ceiling |",
        "|---|---|---|---|---|---|---|---|",
    )
    for kind in ("eager",) if SMALL else ("eager", "compiled"):
        if kind == "compiled":
            if report.is_late("the compiled step"):
                return
            compile_blocks(model)
        spans = alternate({str(way): functools.partial(step, way) for way in (False, True)})
        passes, whole = (median(spans["True"], part) / median(spans["False"], part) for part in (0, None))
        goals.see_step(kind, passes / ceiling)
        for way, name in ((False, "frozen half skipped"), (True, "computed, then zeroed")):
            times = spans[str(way)]
            reached = rate(counted[way], median(times, 0))
            tail = " | | |" if way else f" {passes:.3f} | {whole:.3f} | {passes / ceiling:.1%} |"
            report.add(
                f"| {kind} | {name} | {with_range([span[:1] for span in times])} | {reached:.3g} | "
                f"{median(times, 1):.3f} |{tail}"
            )


def step_fits(config: ModelConfig, report: Report, goals: "Goals") -> bool:
    """`step_rows`, unless it needs more memory than planned."""
    try:
        step_rows(config, report, goals)
    except torch.OutOfMemoryError:
        report.add("", f"Steps of {config.num_layers} layers, planned to fit, did not.")
        return False
    return True


#: What is wanted on an H100.
GOALS = (
    PRODUCTS := "products at 90% of the cuBLAS loop or more",
    LIBRARY := "products no slower than torch's grouped_mm",
    LAYER := "layer forward and backward at 500 TFLOP/s or more",
    AHEAD := "layer ahead of Liger",
    KEPT := "kept for the backward pass: X and H, and 1% for indices",
    STEP := "expert step at 95% or more of its ceiling over the reference's way",
    ERRORS := "no failure, and errors below 1e-2",
    BITS := "the same bits twice",
)
#: Cases that a line names at most.
MOST_NAMED = 8


class Goals:
    """Which goals were looked at, how often, and what missed them, by how far."""

    def __init__(self) -> None:
        self.seen = dict.fromkeys(GOALS, 0)
        self.missed: dict[str, list[tuple[float, str]]] = {goal: [] for goal in GOALS}

    def see(self, goal: str, is_met: bool, value: float, where: str) -> None:
        self.seen[goal] += 1
        if not is_met:
            self.missed[goal].append((value, f"{where}: {value:.3g}"))

    def see_product(self, where: str, over_loop: float, over_library: float) -> None:
        self.see(PRODUCTS, over_loop >= 0.9, over_loop, where)
        if over_library == over_library:
            self.see(LIBRARY, over_library >= 1, over_library, where)

    def see_layer(self, rows: int, experts: int, found: dict[str, Figures | str]) -> None:
        ours, liger, where = found[OURS], found[LIGER], f"R={rows}, E={experts}"
        for name, figures in found.items():
            if name.startswith("Flexpert"):
                error = figures.check.error if isinstance(figures, Figures) else float("nan")
                self.see(ERRORS, error < 1e-2, error, f"{name} at {where}")
                is_repeatable = isinstance(figures, Figures) and figures.check.is_repeatable
                self.see(BITS, is_repeatable, 0, f"{name} at {where}")
        if isinstance(ours, str):
            return
        reached = rate(18 * rows * HIDDEN * FFN, median(ours.spans))
        self.see(LAYER, reached >= 500, reached, where)
        if isinstance(liger, Figures):
            ratio = median(liger.spans) / median(ours.spans)
            self.see(AHEAD, ratio > 1, ratio, where)
        if ours.memory is not None:
            x_bytes = rows // min(2, experts) * HIDDEN * DTYPE.itemsize
            share = (x_bytes + ours.memory.kept) / (x_bytes + 2 * rows * FFN * DTYPE.itemsize)
            self.see(KEPT, share <= 1.01, share, where)

    def see_step(self, kind: str, share: float) -> None:
        self.see(STEP, share >= 0.95, share, kind)

    @property
    def wrong(self) -> list[str]:
        """What is a defect, on any machine."""
        return [what for goal in (ERRORS, BITS) for _, what in self.missed[goal]]

    def lines(self) -> list[str]:
        text = ["", "Goals on an H100" + (", which mean nothing at this size:" if SMALL else ":"), ""]
        for goal in GOALS:
            missed = [what for _, what in sorted(self.missed[goal])]
            more = f"; and {len(missed) - MOST_NAMED} more" if len(missed) > MOST_NAMED else ""
            verdict = f"missed in {len(missed)} of {self.seen[goal]}: {'; '.join(missed[:MOST_NAMED])}{more}"
            text.append(f"- {goal}: {verdict if missed else 'met' if self.seen[goal] else 'not measured'}.")
        return text


def version(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"no {package}"


def freed() -> None:
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


def compare(report: Report) -> Goals:
    goals = Goals()
    name = f"{platform.machine()}, interpreted" if SMALL else torch.cuda.get_device_name()
    versions = ", ".join(map(version, ("triton", "liger-kernel", "transformers")))
    dense, copied = of_dense(), of_copy()
    report.add(
        f"The expert layer at hidden {HIDDEN}, FFN {FFN}, {str(DTYPE).removeprefix('torch.')}; {date.today()}, {name}, "
        f"PyTorch {torch.__version__}, CUDA {torch.version.cuda}, {versions}, Python {platform.python_version()}.",
        f"A product of {SIDE} x {SIDE} matrices runs at {dense:.3g} TFLOP/s, a copy moves {copied:.2f} TB/s in all.",
        f"R rows are tokens times active experts (2, or 1 of 1). Medians (smallest to largest) of {REPEATS}, in turns.",
    )
    freed()
    tune(report)
    shapes = [(rows, experts) for rows in ROWS for experts in EXPERTS]
    report.add(
        "",
        "The layer with all its gradients: 6·R·D·F operations forward, 12·R·D·F backward. Kept: for the backward pass, "
        "beside the inputs; peak: beside the inputs. Error: the largest relative one of result and gradients, in norm, "
        "against fp32; memory that nobody wrote is NaN in runs of ours. Ratio: its time over ours. transformers: its "
        "FlexOlmo experts, which are given the router's choices as all are.",
        "",
        "| R | E | | both, ms | forward, TFLOP/s | backward, TFLOP/s | both, TFLOP/s | of the square product | ratio | "
        "kept, peak, GiB | error | same bits twice |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    )
    for rows, experts in shapes:
        if report.is_late(f"the layer from R={rows}, E={experts} on"):
            break
        report.add(*layer_rows(rows, experts, dense, goals))
        freed()
    if not report.is_late("products alone"):
        report.add(
            "",
            "The products alone: R·D·F operations times 4 (up, dX, dW13) or 2. Ours gather rows from tokens, and up "
            "computes SwiGLU, too; the others are given gathered rows and do less.",
            "",
            "| R | E | | ours, ms | TFLOP/s | of the square product | cuBLAS loop, TFLOP/s | grouped_mm, TFLOP/s | "
            "ratio to the loop | to grouped_mm |",
            "|---|---|---|---|---|---|---|---|---|---|",
        )
        for rows, experts in shapes:
            report.add(*product_rows(rows, experts, dense, goals))
            freed()
    if not report.is_late("gradients in place"):
        report.add(
            "",
            "dW13 into an fp32 gradient that exists, ms: added to in the kernel; and as a tensor of its own, alone, "
            "then added, then cast and added, as autograd does. Ratio: what accumulating in place would gain.",
            "",
            "| R | E | in place | alone | then added | then cast and added | ratio |",
            "|---|---|---|---|---|---|---|",
        )
        for rows in ROWS:
            report.add(*sink_rows(rows, max(EXPERTS)))
            freed()
    if not report.is_late("the expert step"):
        config = shape_of_step()
        while not step_fits(config, report, goals):
            config = replace(config, num_layers=config.num_layers - 2)
            freed()
    report.add("", f"At the end a square product runs at {of_dense():.3g} TFLOP/s.", *goals.lines())
    report.add("", f"{time.monotonic() - report.started:.0f} s in all.")
    return goals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--output", type=Path, default=None if SMALL else RESULT, help="where the tables go")
    output = parser.parse_args().output
    if not SMALL and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device here: --small shows that the script runs")
    warnings.filterwarnings("ignore", message=".*deterministic.*")  # `poisoned` wants its NaN, not the determinism
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as cache:
        if SMALL:  # what is tuned in the interpreter is for nobody
            os.environ["XDG_CACHE_HOME"] = cache
        wrong = compare(Report(output)).wrong
    assert not wrong, wrong


if __name__ == "__main__":
    main()
