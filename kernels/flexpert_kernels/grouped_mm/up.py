"""`up`: gate and up projection of each row and SwiGLU, in one kernel. Its loops are those of `rows.py`.

Shapes: T tokens, K active experts, N = T·K rows sorted by expert, E experts, D residual width, F FFN width. Inside the
kernel a suffix names a block's dimension: M rows, N columns of gate and up together, F of one of them, K inputs.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexpert_kernels.arguments import check_index, check_kernel, check_shape, check_tokens
from flexpert_kernels.grouped_mm.launch import Plan, descriptor, fits_tma, plan
from flexpert_kernels.grouped_mm.tiles import halves, load, locate, order_tiles, rows_of_experts, store


@triton.jit
def up_kernel(
    x,
    gate_up,
    order,
    offsets,
    h,
    a,
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    FFN: tl.constexpr,
    INPUTS: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """A tile holds BLOCK_N / 2 columns of gate and the same of up, read side by side, so that one product does both."""
    BLOCK_F: tl.constexpr = BLOCK_N // 2
    TILES_N: tl.constexpr = (FFN + BLOCK_F - 1) // BLOCK_F
    EVEN_F: tl.constexpr = FFN % BLOCK_F == 0
    EVEN_K: tl.constexpr = INPUTS % BLOCK_K == 0
    tiles_E = tl.cdiv(rows_of_experts(offsets, EXPERTS), BLOCK_M) * TILES_N
    in_M = tl.arange(0, BLOCK_M)
    in_N = tl.arange(0, BLOCK_N)
    in_K = tl.arange(0, BLOCK_K)
    for tile in tl.range(tl.program_id(0), tl.sum(tiles_E, 0), tl.num_programs(0), flatten=True):
        e, tile_e = locate(tile, tiles_E)
        begin = tl.load(offsets + e)
        end = tl.load(offsets + e + 1)
        m, f = order_tiles(tile_e, tl.cdiv(end - begin, BLOCK_M), TILES_N, GROUP_M)
        m = begin + m * BLOCK_M
        f = f * BLOCK_F
        row_M = tl.load(order + tl.minimum(m + in_M, end - 1)) // TOP_K
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in tl.range(0, INPUTS, BLOCK_K):
            x_MK = x + row_M.to(tl.int64)[:, None] * INPUTS + (k + in_K)[None, :]
            x_MK = load(x_MK, (k + in_K < INPUTS)[None, :], EVEN_K)
            if TMA:
                w_NK = gate_up.load([e * 2, f, k]).reshape(BLOCK_N, BLOCK_K)
            else:
                f_N = f + in_N % BLOCK_F
                w_NK = gate_up + ((e.to(tl.int64) * 2 + in_N // BLOCK_F) * FFN + f_N)[:, None] * INPUTS
                w_NK = load(
                    w_NK + (k + in_K)[None, :], (f_N < FFN)[:, None] & (k + in_K < INPUTS)[None, :], EVEN_F and EVEN_K
                )
            acc = tl.dot(x_MK, w_NK.T, acc, input_precision="ieee")
        gate, up = halves(acc)
        f_F = f + tl.arange(0, BLOCK_F)
        h_tile = h + m.to(tl.int64) * (2 * FFN)
        store(h_tile, gate, end - m, f_F, FFN, 2 * FFN, EVEN_F)
        store(h_tile + FFN, up, end - m, f_F, FFN, 2 * FFN, EVEN_F)
        store(a + m.to(tl.int64) * FFN, gate * tl.sigmoid(gate) * up, end - m, f_F, FFN, FFN, EVEN_F)


def up(x_TD: Tensor, order_N: Tensor, top_k: int, gate_up_E2FD: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Gate and up projection of each row, and `silu(gate) ⊙ up`.

    Args:
        x_TD: inputs; row n reads the token `order_N[n] // top_k`.
        order_N: int32.
        gate_up_E2FD: gate's matrix (index 0) and up's of each expert.
        offsets: expert e's rows are offsets[e] ≤ n < offsets[e + 1], [E + 1] int32.

    Returns: `h_N2F`, gate and up side by side, and `a_NF`, from h before it was rounded to the inputs' dtype. Rows past
        the last expert's are left as they were allocated.

    Raises:
        ValueError: arguments that do not fit each other, are not contiguous, or of a dtype that is not supported.
    """
    check_kernel(x_TD=x_TD, gate_up_E2FD=gate_up_E2FD)
    check_shape("gate_up_E2FD", gate_up_E2FD, (None, 2, None, None))
    how = plan("up", 2 * gate_up_E2FD.shape[2], gate_up_E2FD.shape[3], x_TD)
    return run_up(x_TD, order_N, top_k, gate_up_E2FD, offsets, how)


def run_up(
    x_TD: Tensor, order_N: Tensor, top_k: int, gate_up_E2FD: Tensor, offsets: Tensor, how: Plan
) -> tuple[Tensor, Tensor]:
    """`up` as planned."""
    experts, _, ffn, inputs = gate_up_E2FD.shape
    check_shape("x_TD", x_TD, (None, inputs))
    check_index("offsets", offsets, experts + 1, x_TD.device)
    check_index("order_N", order_N, None, x_TD.device)
    check_tokens("x_TD", x_TD, order_N, top_k)
    h_N2F = x_TD.new_empty(len(order_N), 2 * ffn)
    a_NF = x_TD.new_empty(len(order_N), ffn)
    if len(order_N) == 0:
        return h_N2F, a_NF
    config = how.config
    tma = how.tma and fits_tma(gate_up_E2FD)
    with torch.cuda.device_of(x_TD):
        up_kernel[(how.programs,)](
            x_TD,
            descriptor(gate_up_E2FD.flatten(0, 1), (2, config.block_n // 2, config.block_k)) if tma else gate_up_E2FD,
            order_N,
            offsets,
            h_N2F,
            a_NF,
            TOP_K=top_k,
            EXPERTS=experts,
            FFN=ffn,
            INPUTS=inputs,
            TMA=tma,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            GROUP_M=config.group_m,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return h_N2F, a_NF
