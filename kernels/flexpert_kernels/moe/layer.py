"""The expert layer with its backward pass, over any backend's products. The definition is `reference.py`.

Shapes: T tokens, D residual width, F FFN width, E experts, K active experts, N = T·K rows: pairs of a token and an
expert of its, in the order of their experts. Row n is the pair order_N[n] = t·K + k, and places_TK[t, k] = n. offsets
[E+1] are each expert's first row, and the last one's end; rows of experts held elsewhere come after it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flexpert_kernels.moe.backends import Backend, backend_of
from flexpert_kernels.moe.check import check_mixing, check_moe, check_order, check_sort
from flexpert_kernels.moe.dispatch import choose, computed_dtype, elementwise
from flexpert_kernels.moe.reference import reference_moe
from flexpert_kernels.precision import result_dtype
from flexpert_kernels.route import Order


def moe_ffn(
    x_TD: Tensor,
    weights_TK: Tensor,
    indices_TK: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    *,
    backend: str = "auto",
    checked: bool = True,
    is_part: bool = False,
) -> Tensor:
    """Each token through its own experts: `y_t = Σ_k w_tk · W2_e (silu(W1_e x_t) ⊙ W3_e x_t)`, e = indices_tk, [T, D].

    No token is dropped, a token's experts are summed in the order of its choices and nothing is added atomically: the
    result and its gradients are the same bits each time. The backward pass keeps x and the two projections of each row.

    Args:
        x_TD: tokens.
        weights_TK: of each token's experts.
        indices_TK: each token's experts, in [0, E), each at most once; negative: held elsewhere, adds nothing.
        gate_up_E2FD: W1 (index 0) and W3 (index 1) of every expert. Gets no gradient, at no cost, where it needs none.
        down_EDF: W2 of every expert; likewise.
        backend: auto (see `dispatch.choose`), reference, dense, loop, grouped_mm or triton.
        checked: whether to look for an index of E or more; on a GPU that waits for it. False: the caller knows that
            there is none, as where a top-k made them; what one would do is undefined.
        is_part: some tokens' experts are held elsewhere, which `auto` shall know: with K = E, too, it then computes a
            token's own experts alone. The result is the same.

    Raises:
        ValueError: an argument's type, device, shape or stride does not fit, or an index is E or more.
    """
    if not torch.compiler.is_compiling():  # what is compiled has fixed types, and its products refuse shapes
        check_moe(x_TD, weights_TK, indices_TK, gate_up_E2FD, down_EDF, backend, checked)
    (num_experts, width, ffn), (tokens, top_k) = down_EDF.shape, indices_TK.shape
    if backend == "auto":
        dtype, is_dense_memory = result_dtype(x_TD), gate_up_E2FD.is_contiguous() and down_EDF.is_contiguous()
        backend = choose(num_experts, top_k, tokens * top_k, dtype, x_TD.device, (width, ffn), is_part)
        backend = "loop" if backend == "triton" and not is_dense_memory else backend
    if backend == "dense":
        probs_TE = weights_TK.new_zeros(len(x_TD), len(down_EDF))
        is_here = indices_TK >= 0
        probs_TE = probs_TE.scatter_add(1, indices_TK.clamp(min=0), weights_TK.where(is_here, 0))
        return dense_mixing(x_TD, probs_TE, gate_up_E2FD, down_EDF)
    x, gate_up, down = as_computed(x_TD, gate_up_E2FD, down_EDF)
    with torch.autocast(x.device.type, enabled=False):  # they are in its type, or in a better one
        if backend == "reference":
            y_TD = reference_moe(x, weights_TK, indices_TK, gate_up, down)
        else:
            y_TD = Routed.apply(x, weights_TK, indices_TK, gate_up, down, backend)  # type: ignore[no-untyped-call]
    return y_TD.to(result_dtype(x_TD))


def dense_mixing(x_TD: Tensor, probs_TE: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor) -> Tensor:
    """Every expert on every token: `y = Σ_e W2_e (p_e ⊙ silu(W1_e x) ⊙ W3_e x)`, [T, D].

    Nothing is sorted, and the router's weight is applied before the down projection, so experts' outputs are never held
    side by side. The backward pass keeps x and the two projections; frozen experts (weights that need no gradient) cost
    it no products for weights.

    Raises:
        ValueError: an argument's type, device or shape does not fit.
    """
    if not torch.compiler.is_compiling():
        check_mixing(x_TD, probs_TE, gate_up_E2FD, down_EDF)
    x, gate_up, down = as_computed(x_TD, gate_up_E2FD, down_EDF)
    with torch.autocast(x.device.type, enabled=False):
        y_TD: Tensor = Mixed.apply(x, probs_TE, gate_up, down, elementwise(x))  # type: ignore[no-untyped-call]
    return y_TD.to(result_dtype(x_TD))


def sort_by_expert(indices_TK: Tensor, num_experts: int) -> Order:
    """Rows of an expert in the order of their pairs; indices outside [0, E), held elsewhere, come last.

    Raises:
        ValueError: the indices are no matrix of int32 or int64, or the number of experts is none that can be sorted by.
    """
    if not torch.compiler.is_compiling():
        check_sort(indices_TK, num_experts)
    return Order(*backend_of(elementwise(indices_TK, num_experts)).sort(indices_TK, num_experts))


def spread(x_TD: Tensor, order: Order) -> Tensor:
    """Each row's token, [N, D]; its gradient is gathered, where indexing's own would be added row by row.

    Raises:
        ValueError: the tokens are not those of the order, by number or device, or no matrix of floating-point numbers.
    """
    if not torch.compiler.is_compiling():
        check_order(order, x_TD=x_TD)
    x_ND: Tensor = Spread.apply(x_TD, *order)  # type: ignore[no-untyped-call]
    return x_ND


def combine(y_ND: Tensor, weights_TK: Tensor, order: Order) -> Tensor:
    """`Σ_k w_tk · y[places_tk]`, [T, D].

    Raises:
        ValueError: as `spread`, of rows and weights.
    """
    if not torch.compiler.is_compiling():
        check_order(order, y_ND=y_ND, weights_TK=weights_TK)
    z_TD: Tensor = Combine.apply(y_ND, weights_TK, *order)  # type: ignore[no-untyped-call]
    return z_TD


class Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_N: Tensor, places_TK: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(places_TK, offsets)
        return x_TD.index_select(0, order_N // places_TK.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        places_TK, offsets = ctx.saved_tensors
        return backend_of(elementwise(grads[0])).combine(grads[0], places_TK, None, offsets), None, None, None


class Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y_ND: Tensor, weights_TK: Tensor, order_N: Tensor, places_TK: Tensor, offsets: Tensor
    ) -> Tensor:
        ctx.save_for_backward(y_ND, weights_TK, places_TK, offsets)
        return backend_of(elementwise(y_ND)).combine(y_ND, places_TK, weights_TK, offsets)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        y_ND, weights_TK, places_TK, offsets = ctx.saved_tensors
        ops = backend_of(elementwise(y_ND))
        dy_ND, dweights_TK = ops.combine_backward(grads[0], y_ND, weights_TK, places_TK, offsets)
        return dy_ND, dweights_TK.to(weights_TK.dtype), None, None, None


def as_computed(*tensors: Tensor) -> tuple[Tensor, ...]:
    """In the type of the products of the first."""
    dtype = computed_dtype(tensors[0])
    return tuple(tensor.to(dtype) for tensor in tensors)


class Routed(torch.autograd.Function):
    """`moe_ffn` over a backend. With z_n = W2 a_n of a row and dy_n its token's gradient, the backward pass computes

    da_n = W2ᵀ dy_n, unweighted; from it dw_n = ⟨da_n, a_n⟩ and, w_n times, what goes through SwiGLU into dh_n; then
    dW2 = Σ dy_n (w_n a_n)ᵀ, dx_t = Σ_k W13ᵀ dh_n, dW13 = Σ dh_n x_nᵀ.
    """

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor, gate_up: Tensor, down: Tensor, name: str
    ) -> Tensor:
        ops = backend_of(name, elementwise(x_TD, len(down)))
        order_N, places_TK, offsets = ops.sort(indices_TK, len(down))
        bounds = offsets.cpu() if ops.on_host else offsets  # the one time that the host waits for a GPU
        x, gather = of_rows(ops, x_TD, order_N, places_TK)
        h_N2F, a_NF = ops.up(x, *gather, gate_up, bounds)
        y_TD: Tensor = ops.combine(ops.rows(a_NF, down, bounds), places_TK, weights_TK, offsets)
        ctx.name = name
        kept_TD = x_TD if ctx.needs_input_grad[3] else None
        ctx.save_for_backward(kept_TD, weights_TK, order_N, places_TK, offsets, bounds, h_N2F, gate_up, down)
        return y_TD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weights_TK, order_N, places_TK, offsets, bounds, h_N2F, gate_up, down = ctx.saved_tensors
        ops = backend_of(ctx.name, elementwise(h_N2F, len(down)))
        need_x, need_weights, _, need_gate_up, need_down, _ = ctx.needs_input_grad
        dx_TD = dweights_TK = dgate_up = ddown = None
        dy, gather = of_rows(ops, grads[0], order_N, places_TK)
        da_NF = ops.rows(dy, down, bounds, True, *gather)
        weights_N = weights_TK.flatten()[order_N]
        dh_N2F, a_NF, dweights_N = ops.swiglu_backward(h_N2F, da_NF, weights_N, offsets[-1:])
        if need_weights:
            dweights_TK = dweights_N[places_TK].to(weights_TK.dtype)
        if need_down:
            ddown = ops.outer_y(dy, a_NF, bounds, *gather)
        if need_x:
            dx_ND = ops.rows(dh_N2F, gate_up.flatten(1, 2), bounds, True)
            dx_TD = ops.combine(dx_ND, places_TK, None, offsets)
        if need_gate_up:
            x, gather = of_rows(ops, x_TD, order_N, places_TK)
            dgate_up = ops.outer_x(dh_N2F, x, bounds, *gather).view_as(gate_up)
        return dx_TD, dweights_TK, None, dgate_up, ddown, None


def of_rows(ops: Backend, x_TD: Tensor, order_N: Tensor, places_TK: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
    """What a product reads its rows from: the tokens, and where each row's is; or the rows themselves, copied."""
    top_k = places_TK.shape[1]
    return (x_TD.contiguous(), (order_N, top_k)) if ops.gathers else (x_TD.index_select(0, order_N // top_k), ())


class Mixed(torch.autograd.Function):
    """`dense_mixing`, expert by expert."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, probs_TE: Tensor, gate_up: Tensor, down: Tensor, name: str) -> Tensor:
        ops, kept, y_TD = backend_of(name), [], None
        for probs_T, gate_up_2FD, down_DF in zip(probs_TE.unbind(1), gate_up.flatten(1, 2), down, strict=True):
            h_T2F = F.linear(x_TD, gate_up_2FD)
            a_TF = ops.swiglu(h_T2F, probs_T)
            # Not in place: selective recomputation keeps what a product returns.
            y_TD = F.linear(a_TF, down_DF) if y_TD is None else torch.addmm(y_TD, a_TF, down_DF.T)
            kept.append(h_T2F)
        assert y_TD is not None, "a group holds at least one expert"
        ctx.name = name
        ctx.save_for_backward(x_TD if ctx.needs_input_grad[2] else None, probs_TE, gate_up, down, *kept)
        return y_TD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ops, dx_TD, (dy_TD,) = backend_of(ctx.name), None, grads
        x_TD, probs_TE, gate_up, down, *kept = ctx.saved_tensors
        need_x, need_probs, need_gate_up, need_down, _ = ctx.needs_input_grad
        dprobs, dgate_up, ddown = [], [], []
        for probs_T, gate_up_2FD, down_DF, h_T2F in zip(
            probs_TE.unbind(1), gate_up.flatten(1, 2), down, kept, strict=True
        ):
            dh_T2F, a_TF, dprobs_T = ops.swiglu_backward(h_T2F, dy_TD @ down_DF, probs_T)
            dprobs.append(dprobs_T)
            if need_down:
                ddown.append(dy_TD.T @ a_TF)
            if need_x:
                dx_TD = dh_T2F @ gate_up_2FD if dx_TD is None else dx_TD.addmm_(dh_T2F, gate_up_2FD)
            if need_gate_up:
                dgate_up.append(dh_T2F.T @ x_TD)
        return (
            dx_TD,
            torch.stack(dprobs, 1).to(probs_TE.dtype) if need_probs else None,
            stacked(dgate_up).view_as(gate_up) if need_gate_up else None,
            stacked(ddown) if need_down else None,
            None,
        )


def stacked(parts: list[Tensor]) -> Tensor:
    return parts[0][None] if len(parts) == 1 else torch.stack(parts)
