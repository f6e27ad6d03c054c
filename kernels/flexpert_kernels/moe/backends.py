"""What the expert layer is computed with: a set of functions for each backend that sorts tokens by expert."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexpert_kernels.combine.reference import combine, combine_backward
from flexpert_kernels.moe import loop
from flexpert_kernels.route.reference import route, sort_by_expert
from flexpert_kernels.swiglu.reference import swiglu


class Backend(NamedTuple):
    """Functions as the kernels' `reference.py` define them. `gathers`: products read a token's row where it lies."""

    route: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    sort: Callable[..., tuple[Tensor, Tensor, Tensor]]
    up: Callable[..., tuple[Tensor, Tensor]]
    rows: Callable[..., Tensor]
    outer: Callable[..., Tensor]
    combine: Callable[..., Tensor]
    combine_backward: Callable[..., tuple[Tensor, Any]]  # the latter None without weights
    swiglu: Callable[..., Tensor]
    swiglu_backward: Callable[..., tuple[Tensor, Tensor, Any]]
    gathers: bool = False


def of_products(products: loop.Products) -> Backend:
    """The functions of CPUs, around some products of PyTorch's."""
    return Backend(route, sort_by_expert, products.up, products.rows, products.outer, combine, combine_backward, swiglu,
                   loop.swiglu_backward)  # fmt: skip


BACKENDS = {name: of_products(loop.Products(*operators)) for name, operators in loop.OPERATORS.items()}


def backend_of(name: str, around: str = "loop") -> Backend:
    """The functions of a backend.

    Args:
        name: loop, grouped_mm or triton.
        around: where that is triton, kernels do all but the products of the other two.
    """
    if "triton" in (name, around):
        load()
    return BACKENDS[name if around != "triton" or name == "triton" else f"{name} and triton"]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def load() -> None:
    """Triton is imported for the first layer that it computes."""
    if "triton" not in BACKENDS:
        from flexpert_kernels.moe.kernels import BACKEND

        BACKENDS["triton"] = BACKEND
        for name, operators in loop.OPERATORS.items():
            products = loop.Products(*operators, swiglu=BACKEND.swiglu)
            BACKENDS[f"{name} and triton"] = BACKEND._replace(
                up=products.up, rows=products.rows, outer=products.outer, gathers=False
            )
