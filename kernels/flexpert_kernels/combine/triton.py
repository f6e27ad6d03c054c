"""`combine` and its gradients as streaming kernels; `reference.py` has the same names in plain PyTorch.

Shapes: T tokens, D residual width, E experts, K active experts, N = T·K rows: pairs (t, k) sorted by expert. Inside a
kernel a suffix names a block's dimension: T tokens, D columns.

A token's rows are visited by one program, in the order of k: sums have one order, nothing is added atomically. Rows
past offsets[E] are masked, so they are not even read.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexpert_kernels.arguments import check_kernel, check_shape

ELEMENTS = 2048  # of a block: two loads of 16 bytes in bf16 for each of a program's 128 threads


@triton.jit
def combine_kernel(
    y, places, weights, end, z, num_tokens, width, K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    token_T = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    column_D = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    is_token_T = token_T < num_tokens
    inside_D = (column_D < width) | EVEN
    num_rows = tl.load(end)
    sum_TD = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for k in tl.range(0, K, loop_unroll_factor=4):  # four rows on their way at once
        row_T = tl.load(places + token_T * K + k, mask=is_token_T, other=0).to(tl.int64)
        here_T = is_token_T & (row_T < num_rows)
        entry_TD = row_T[:, None] * width + column_D[None, :]
        y_TD = tl.load(y + entry_TD, mask=here_T[:, None] & inside_D[None, :], other=0).to(tl.float32)
        if weights is not None:
            y_TD *= tl.load(weights + token_T * K + k, mask=here_T, other=0).to(tl.float32)[:, None]
        sum_TD += y_TD
    entry_TD = token_T.to(tl.int64)[:, None] * width + column_D[None, :]
    tl.store(z + entry_TD, sum_TD.to(z.dtype.element_ty), mask=is_token_T[:, None] & inside_D[None, :])


@triton.jit
def combine_backward_kernel(
    dz, y, weights, places, end, dy, dweights, num_tokens, width, K: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    token_T = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    is_token_T = token_T < num_tokens
    num_rows = tl.load(end)
    for k in range(K):
        row_T = tl.load(places + token_T * K + k, mask=is_token_T, other=0).to(tl.int64)
        here_T = is_token_T & (row_T < num_rows)
        weight_T = tl.full([BLOCK_T], 1, tl.float32)
        if weights is not None:
            weight_T = tl.load(weights + token_T * K + k, mask=here_T, other=0).to(tl.float32)
        sum_TD = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
        for first in range(0, width, BLOCK_D):
            column_D = first + tl.arange(0, BLOCK_D)
            inside_D = (column_D < width) | EVEN
            read_TD = here_T[:, None] & inside_D[None, :]
            entry_TD = row_T[:, None] * width + column_D[None, :]
            dz_TD = tl.load(dz + token_T.to(tl.int64)[:, None] * width + column_D[None, :], mask=read_TD, other=0)
            dz_TD = dz_TD.to(tl.float32)
            dy_TD = (weight_T[:, None] * dz_TD).to(dy.dtype.element_ty)
            tl.store(dy + entry_TD, dy_TD, mask=is_token_T[:, None] & inside_D[None, :])
            if weights is not None:
                sum_TD += dz_TD * tl.load(y + entry_TD, mask=read_TD, other=0).to(tl.float32)
        if weights is not None:
            sum_T = tl.sum(sum_TD, 1).to(dweights.dtype.element_ty)
            tl.store(dweights + token_T * K + k, sum_T, mask=is_token_T)


def combine(y_ND: Tensor, places_TK: Tensor, weights_TK: Tensor | None, offsets: Tensor) -> Tensor:
    """`z_t = Σ_k w_tk · y[places_tk]` over the places before offsets[E], in fp32, [T, D]; in y's dtype."""
    y_ND, places_TK = y_ND.contiguous(), places_TK.contiguous()
    check_kernel(y_ND=y_ND)
    check_shape("places_TK", places_TK, (None, None))
    num_tokens, top_k = places_TK.shape
    check_shape("y_ND", y_ND, (num_tokens * top_k, None))
    if weights_TK is not None:
        check_shape("weights_TK", weights_TK, (num_tokens, top_k))
        weights_TK = weights_TK.contiguous()
    z_TD = y_ND.new_empty(num_tokens, y_ND.shape[1])
    if z_TD.numel():
        block_t, block_d, even = blocks(z_TD)
        combine_kernel[(triton.cdiv(num_tokens, block_t), triton.cdiv(z_TD.shape[1], block_d))](
            y_ND, places_TK, weights_TK, offsets[-1:], z_TD, num_tokens, z_TD.shape[1], top_k, block_t, block_d, even
        )
    return z_TD


def combine_backward(
    dz_TD: Tensor, y_ND: Tensor, weights_TK: Tensor | None, places_TK: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor | None]:
    """`dy_n = w_n dz_t(n)` in y's dtype, `dw_tk = <dz_t, y_n>` in the weights'; 0 for rows past offsets[E]."""
    dz_TD, y_ND, places_TK = dz_TD.contiguous(), y_ND.contiguous(), places_TK.contiguous()
    check_kernel(dz_TD=dz_TD, y_ND=y_ND)
    check_shape("places_TK", places_TK, (len(dz_TD), None))
    num_tokens, top_k = places_TK.shape
    check_shape("y_ND", y_ND, (num_tokens * top_k, dz_TD.shape[1]))
    dweights_TK = None
    if weights_TK is not None:
        check_shape("weights_TK", weights_TK, (num_tokens, top_k))
        weights_TK = weights_TK.contiguous()
        dweights_TK = torch.empty_like(weights_TK)
    dy_ND = torch.empty_like(y_ND)
    if dy_ND.numel():
        block_t, block_d, even = blocks(dz_TD)
        combine_backward_kernel[(triton.cdiv(num_tokens, block_t),)](
            dz_TD, y_ND, weights_TK, places_TK, offsets[-1:], dy_ND, dweights_TK, num_tokens, dz_TD.shape[1], top_k,
            block_t, block_d, even,
        )  # fmt: skip
    return dy_ND, dweights_TK


def blocks(x_TD: Tensor) -> tuple[int, int, bool]:
    """Tokens and columns of a block, whether columns fill all blocks. Several tokens where rows are short."""
    block_d = min(ELEMENTS, triton.next_power_of_2(x_TD.shape[1]))
    return ELEMENTS // block_d, block_d, x_TD.shape[1] % block_d == 0
