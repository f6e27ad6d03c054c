"""For `gpu_moe.py`: the expert layer's definition, everybody who computes it, their tiles, errors and memory.

Shapes: T tokens, D residual width, F FFN width, E experts, K active experts, R = T·K rows.
"""

import contextlib
import functools
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import torch
import torch.nn.functional as F
from flexpert_kernels import moe_ffn, tuning
from moe_timing import Setting, time_of
from torch import Tensor

OURS, LIGER = "Flexpert, triton", "Liger fused_moe"


class Inputs(NamedTuple):
    """What a layer is given, and the gradient of its result."""

    x_TD: Tensor
    weights_TK: Tensor
    indices_TK: Tensor
    gate_up_E2FD: Tensor
    down_EDF: Tensor
    dy_TD: Tensor

    def gradients(self, y_TD: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y_TD, (self.x_TD, self.weights_TK, self.gate_up_E2FD, self.down_EDF), self.dy_TD)

    def in_fp32(self) -> "Inputs":
        return Inputs(*(t.detach().float().requires_grad_() if t.is_floating_point() else t for t in self))


Way = Callable[[Inputs], Tensor]


def draw(setting: Setting, rows: int, experts: int, uneven: bool = False) -> Inputs:
    """Fresh inputs, of 2 active experts, or 1 of 1. Uneven: the first of more than two gets no row, the last most."""
    top_k = min(2, experts)
    scores_TE = torch.rand(rows // top_k, experts, device=setting.device)
    if uneven:
        scores_TE *= torch.linspace(0 if experts > top_k else 0.5, 1, experts, device=setting.device)
    best_TK, indices_TK = scores_TE.topk(top_k)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=setting.device, dtype=setting.dtype) * scale).requires_grad_()

    return Inputs(
        random(rows // top_k, setting.hidden),
        best_TK.softmax(1).to(setting.dtype).requires_grad_(),
        indices_TK,
        random(experts, 2, setting.ffn, setting.hidden, scale=setting.hidden**-0.5),
        random(experts, setting.hidden, setting.ffn, scale=setting.ffn**-0.5),
        random(rows // top_k, setting.hidden).detach(),
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


def of_backend(name: str) -> Way:
    return lambda inputs: moe_ffn(*inputs[:5], backend=name, checked=False)


def of_liger(inputs: Inputs) -> Tensor:
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction  # type: ignore[import-not-found]

    x_TD, weights_TK, indices_TK, gate_up_E2FD, down_EDF, _ = inputs
    y_TD: Tensor = LigerFusedMoEFunction.apply(x_TD, gate_up_E2FD.flatten(1, 2), down_EDF, indices_TK.int(), weights_TK)
    return y_TD


@functools.cache
def transformers_block(implementation: str, experts: int, hidden: int, ffn: int) -> torch.nn.Module:
    from transformers import FlexOlmoConfig
    from transformers.models.flex_olmo.modeling_flex_olmo import FlexOlmoExperts

    config = FlexOlmoConfig(hidden_size=hidden, intermediate_size=ffn, num_experts=experts)
    config._experts_implementation = implementation
    with torch.device("meta"):
        block: torch.nn.Module = FlexOlmoExperts(config)
    return block


def of_transformers(implementation: str) -> Way:
    """FlexOlmo's block without its router, whose choices are given to all."""

    def way(inputs: Inputs) -> Tensor:
        x_TD, weights_TK, indices_TK, gate_up_E2FD, down_EDF, _ = inputs
        weights = {"gate_up_proj": gate_up_E2FD.flatten(1, 2), "down_proj": down_EDF}
        block = transformers_block(implementation, *down_EDF.shape)
        y_TD: Tensor = torch.func.functional_call(block, weights, (x_TD, indices_TK, weights_TK))
        return y_TD

    return way


#: Ours, of which dense mixing computes the shapes whose experts are all active, and others'.
OF_US: dict[str, Way] = {
    OURS: of_backend("triton"),
    "Flexpert, dense mixing": of_backend("dense"),
    "Flexpert, cuBLAS loop": of_backend("loop"),
    "Flexpert, torch grouped_mm": of_backend("grouped_mm"),
}
PEERS: dict[str, Way] = {
    LIGER: of_liger,
    "transformers, eager": of_transformers("eager"),
    "transformers, grouped_mm": of_transformers("grouped_mm"),
}


def results(way: Way, inputs: Inputs) -> list[Tensor]:
    """The layer's result and the gradient of each of its inputs."""
    y_TD = way(inputs)
    return [y_TD.detach(), *inputs.gradients(y_TD)]


def check(way: Way, inputs: Inputs, wanted: list[Tensor], poison: bool) -> tuple[float, bool]:
    """The largest ‖found − wanted‖ / ‖wanted‖ of result and gradients, and whether two runs gave the same bits.

    Poison: in the first run, memory that nobody has written is full of NaN.
    """
    with poisoned() if poison else contextlib.nullcontext():
        first = results(way, inputs)
    second = results(way, inputs)
    errors = torch.stack([(a.float() - b).norm() / b.norm() for a, b in zip(first, wanted, strict=True)])
    return errors.max().item(), all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def memory(way: Way, inputs: Inputs) -> tuple[int, int]:
    """Bytes beside the inputs: kept for the backward pass, the result not counted, and the most at any time.

    Of what has run on the GPU before, so that libraries have taken their workspaces.
    """
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y_TD = way(inputs)
    kept = torch.cuda.memory_allocated() - before - y_TD.nbytes
    inputs.gradients(y_TD)
    return kept, torch.cuda.max_memory_allocated() - before


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(8).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def compile_share(setting: Setting, index: int, count: int) -> None:
    """Compiles one share of all candidates, ours and Liger's, into Triton's cache on disk."""
    for kernel, _, _, run in tuning.products(
        setting.hidden, setting.ffn, max(setting.experts), 256, setting.device, setting.dtype
    ):
        for config in tuning.candidates(kernel, setting.dtype, tuning.capability(setting.device))[index::count]:
            with contextlib.suppress(Exception):  # it will fail again, where that is seen
                run(config)
    with contextlib.suppress(Exception):
        from liger_kernel.ops import fused_moe_kernels  # type: ignore[import-not-found]
        from triton.runtime.autotuner import Autotuner

        for kernel in vars(fused_moe_kernels).values():
            if isinstance(kernel, Autotuner):
                kernel.configs = kernel.configs[index::count]
        for experts in (1, 2):
            results(of_liger, draw(setting, 256, experts))


def tune(setting: Setting, rows: int) -> list[tuning.Tuned]:
    """Everybody's tiles, before anything is timed; ours are returned. Nobody's depend on the number of rows.

    Liger has some 250 candidates. In turn they would take longer to compile than all the rest takes.
    """
    if setting.on_gpu:
        count = min(8, os.cpu_count() or 1)  # each takes some 5 GiB of the GPU's memory
        with (
            contextlib.suppress(Exception),  # then they are compiled one by one
            ProcessPoolExecutor(count, multiprocessing.get_context("spawn")) as pool,
        ):
            list(pool.map(compile_share, [setting] * count, range(count), [count] * count))
        with contextlib.suppress(Exception):  # it will fail again, where that is seen
            results(of_liger, draw(setting, rows, max(setting.experts)))
    timer = None if setting.on_gpu else lambda run: time_of(setting, run)
    return tuning.tune(setting.hidden, setting.ffn, max(setting.experts), rows, setting.device, setting.dtype, timer)
