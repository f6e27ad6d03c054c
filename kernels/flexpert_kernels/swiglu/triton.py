"""`swiglu` and its gradients as streaming kernels; `reference.py` has the same names in plain PyTorch.

Shapes: F FFN width, N rows. Inside a kernel a suffix names a block's dimension: N rows, F columns.

A weight's gradient is a sum over a whole row, so one program of the backward kernel goes through all of a row's
blocks in order: no atomics, the same bits each time. Rows from `num_rows` on are masked: not read, and written as
zeros.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexpert_kernels.arguments import check_kernel, check_shape, expect

ELEMENTS = 1024  # of a block: a load of 16 bytes in bf16 of each operand for each of a program's 128 threads


@triton.jit
def swiglu_kernel(
    h, weights, num_rows, a, allocated, width, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, EVEN: tl.constexpr
):
    row_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_F = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside_F = (column_F < width) | EVEN
    is_row_N = row_N < allocated
    live_N = is_row_N
    if num_rows is not None:
        live_N = is_row_N & (row_N < tl.load(num_rows))
    read_NF = live_N[:, None] & inside_F[None, :]
    gate = h + row_N.to(tl.int64)[:, None] * (2 * width) + column_F[None, :]
    gate_NF = tl.load(gate, mask=read_NF, other=0).to(tl.float32)
    up_NF = tl.load(gate + width, mask=read_NF, other=0).to(tl.float32)
    a_NF = gate_NF * tl.sigmoid(gate_NF) * up_NF
    if weights is not None:
        a_NF *= tl.load(weights + row_N, mask=live_N, other=0).to(tl.float32)[:, None]
    entry_NF = row_N.to(tl.int64)[:, None] * width + column_F[None, :]
    tl.store(a + entry_NF, a_NF.to(a.dtype.element_ty), mask=is_row_N[:, None] & inside_F[None, :])


@triton.jit
def swiglu_backward_kernel(
    h, da, weights, num_rows, dh, a, dweights, allocated, width, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    row_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row_N = row_N < allocated
    live_N = is_row_N
    if num_rows is not None:
        live_N = is_row_N & (row_N < tl.load(num_rows))
    weight_N = tl.full([BLOCK_N], 1, tl.float32)
    if weights is not None:
        weight_N = tl.load(weights + row_N, mask=live_N, other=0).to(tl.float32)
    sum_NF = tl.zeros([BLOCK_N, BLOCK_F], tl.float32)
    for first in range(0, width, BLOCK_F):
        column_F = first + tl.arange(0, BLOCK_F)
        inside_F = (column_F < width) | EVEN
        read_NF = live_N[:, None] & inside_F[None, :]
        write_NF = is_row_N[:, None] & inside_F[None, :]
        gate = row_N.to(tl.int64)[:, None] * (2 * width) + column_F[None, :]
        entry_NF = row_N.to(tl.int64)[:, None] * width + column_F[None, :]
        gate_NF = tl.load(h + gate, mask=read_NF, other=0).to(tl.float32)
        up_NF = tl.load(h + gate + width, mask=read_NF, other=0).to(tl.float32)
        da_NF = tl.load(da + entry_NF, mask=read_NF, other=0).to(tl.float32)
        sigmoid_NF = tl.sigmoid(gate_NF)
        silu_NF = gate_NF * sigmoid_NF
        a_NF = silu_NF * up_NF
        if weights is not None:
            sum_NF += da_NF * a_NF
            da_NF *= weight_N[:, None]
            a_NF *= weight_N[:, None]
        # The derivative of g·σ(g) is σ + g·σ·(1 − σ).
        dgate_NF = da_NF * up_NF * (sigmoid_NF + silu_NF * (1 - sigmoid_NF))
        tl.store(dh + gate, dgate_NF.to(dh.dtype.element_ty), mask=write_NF)
        tl.store(dh + gate + width, (da_NF * silu_NF).to(dh.dtype.element_ty), mask=write_NF)
        tl.store(a + entry_NF, a_NF.to(a.dtype.element_ty), mask=write_NF)
    if weights is not None:
        tl.store(dweights + row_N, tl.sum(sum_NF, 1), mask=is_row_N)


def swiglu(h_N2F: Tensor, weights_N: Tensor | None = None, num_rows: Tensor | None = None) -> Tensor:
    """`w · silu(gate) ⊙ up` of rows [gate | up], [N, F]; zeros from row `num_rows` (one integer on the device) on."""
    h_N2F, weights_N = prepared(h_N2F, weights_N)
    a_NF = h_N2F.new_empty(len(h_N2F), h_N2F.shape[1] // 2)
    if a_NF.numel():
        block_n, block_f, even = blocks(a_NF)
        swiglu_kernel[(triton.cdiv(len(a_NF), block_n), triton.cdiv(a_NF.shape[1], block_f))](
            h_N2F, weights_N, num_rows, a_NF, len(a_NF), a_NF.shape[1], block_n, block_f, even
        )
    return a_NF


def swiglu_backward(
    h_N2F: Tensor, da_NF: Tensor, weights_N: Tensor | None = None, num_rows: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`dh_N2F`, the weighted activations `a_NF`, and `dweights_N` in fp32 (None without weights).

    `da_NF` is the gradient of a row before its weight; `reference.py` has the formulas.
    """
    h_N2F, weights_N = prepared(h_N2F, weights_N)
    da_NF = da_NF.contiguous()
    check_kernel(h_N2F=h_N2F, da_NF=da_NF)
    check_shape("da_NF", da_NF, (len(h_N2F), h_N2F.shape[1] // 2))
    dh_N2F, a_NF = torch.empty_like(h_N2F), torch.empty_like(da_NF)
    dweights_N = None if weights_N is None else torch.empty_like(weights_N, dtype=torch.float32)
    if a_NF.numel():
        block_n, block_f, even = blocks(a_NF)
        swiglu_backward_kernel[(triton.cdiv(len(a_NF), block_n),)](
            h_N2F, da_NF, weights_N, num_rows, dh_N2F, a_NF, dweights_N, len(a_NF), a_NF.shape[1], block_n, block_f,
            even,
        )  # fmt: skip
    return dh_N2F, a_NF, dweights_N


def prepared(h_N2F: Tensor, weights_N: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Checked and dense."""
    h_N2F = h_N2F.contiguous()
    check_kernel(h_N2F=h_N2F)
    expect(h_N2F.dim() == 2 and h_N2F.shape[1] % 2 == 0, "h_N2F", "rows of a gate and an up half", tuple(h_N2F.shape))
    if weights_N is not None:
        check_shape("weights_N", weights_N, (len(h_N2F),))
        weights_N = weights_N.contiguous()
    return h_N2F, weights_N


def blocks(a_NF: Tensor) -> tuple[int, int, bool]:
    """Rows and columns of a block, whether columns fill all blocks. Several rows where they are short."""
    block_f = min(ELEMENTS, triton.next_power_of_2(a_NF.shape[1]))
    return ELEMENTS // block_f, block_f, a_NF.shape[1] % block_f == 0
