"""What the expert layer is computed with: a set of functions for each backend that sorts tokens by expert."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexpert_kernels.combine.reference import combine, combine_backward
from flexpert_kernels.moe import loop
from flexpert_kernels.route.reference import sort_by_expert
from flexpert_kernels.swiglu.reference import swiglu


class Backend(NamedTuple):
    """Functions as the kernels' `reference.py` define them; outer_y and outer_x are `outer`.

    Attributes:
        gathers: up, rows, outer_y (of y) and outer_x (of x) take the order of the rows and K, too, and read each row's
            token where it lies; others are given rows.
        on_host: products need the offsets on the host.
    """

    sort: Callable[..., tuple[Tensor, Tensor, Tensor]]
    up: Callable[..., tuple[Tensor, Tensor]]
    rows: Callable[..., Tensor]
    outer_y: Callable[..., Tensor]
    outer_x: Callable[..., Tensor]
    combine: Callable[..., Tensor]
    combine_backward: Callable[..., tuple[Tensor, Any]]  # the latter None without weights
    swiglu: Callable[..., Tensor]
    swiglu_backward: Callable[..., tuple[Tensor, Tensor, Any]]
    gathers: bool = False
    on_host: bool = False


def of_products(name: str) -> Backend:
    """The functions of CPUs, around some products of PyTorch's."""
    products = loop.Products(*loop.OPERATORS[name])
    return Backend(
        sort_by_expert, products.up, products.rows, products.outer, products.outer, combine, combine_backward, swiglu,
        loop.swiglu_backward, on_host=name == "loop",
    )  # fmt: skip


BACKENDS = {name: of_products(name) for name in loop.OPERATORS}


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
                up=products.up, rows=products.rows, outer_y=products.outer, outer_x=products.outer, gathers=False,
                on_host=name == "loop",
            )  # fmt: skip
