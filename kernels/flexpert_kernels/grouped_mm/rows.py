"""`rows`: each row times the matrix of its expert, by programs that stay and take tile after tile.

Shapes: T tokens, K active experts, N = T·K rows sorted by expert, E experts, I inputs and O outputs of a matrix. Inside
the kernel a suffix names a block's dimension: M rows, N outputs, K inputs.

The compiler fuses the loop over tiles with the loop over K (`flatten`): the first blocks of a program's next tile are
fetched while the last products of this one run and its results are written. For that the inner loop's bounds must be
known before the outer loop starts. Pointers are computed inside of it, from row numbers: of pointers that a loop
carries the compiler forgets the alignment, and would copy through registers.
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
def rows_kernel(
    x,
    weight,
    order,
    offsets,
    y,
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    GATHER: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """With TMA `weight` is a descriptor, and `x` is one unless it is gathered; else they are pointers."""
    TILES_N: tl.constexpr = (OUTPUTS + BLOCK_N - 1) // BLOCK_N
    EVEN_N: tl.constexpr = OUTPUTS % BLOCK_N == 0
    EVEN_K: tl.constexpr = INPUTS % BLOCK_K == 0
    tiles_E = tl.cdiv(rows_of_experts(offsets, EXPERTS), BLOCK_M) * TILES_N
    in_M = tl.arange(0, BLOCK_M)
    in_N = tl.arange(0, BLOCK_N)
    in_K = tl.arange(0, BLOCK_K)
    for tile in tl.range(tl.program_id(0), tl.sum(tiles_E, 0), tl.num_programs(0), flatten=True):
        e, tile_e = locate(tile, tiles_E)
        begin = tl.load(offsets + e)
        end = tl.load(offsets + e + 1)
        m, n = order_tiles(tile_e, tl.cdiv(end - begin, BLOCK_M), TILES_N, GROUP_M)
        m = begin + m * BLOCK_M
        n = n * BLOCK_N
        if GATHER:
            row_M = tl.load(order + tl.minimum(m + in_M, end - 1)) // TOP_K
        elif not TMA:
            row_M = tl.minimum(m + in_M, end - 1)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in tl.range(0, INPUTS, BLOCK_K):
            if TMA and not GATHER:
                a = x.load([m, k])  # rows past the expert's end are the next one's: computed, never stored
            else:
                a_MK = x + row_M.to(tl.int64)[:, None] * INPUTS + (k + in_K)[None, :]
                a = load(a_MK, (k + in_K < INPUTS)[None, :], EVEN_K)
            if TMA and TRANSPOSED:
                b = weight.load([e, k, n]).reshape(BLOCK_K, BLOCK_N)
            elif TMA:
                b = weight.load([e, n, k]).reshape(BLOCK_N, BLOCK_K).T
            elif TRANSPOSED:
                b_KN = weight + (e.to(tl.int64) * INPUTS + k + in_K)[:, None] * OUTPUTS + (n + in_N)[None, :]
                b = load(b_KN, (k + in_K < INPUTS)[:, None] & (n + in_N < OUTPUTS)[None, :], EVEN_N and EVEN_K)
            else:
                b_NK = weight + (e.to(tl.int64) * OUTPUTS + n + in_N)[:, None] * INPUTS + (k + in_K)[None, :]
                b = load(b_NK, (n + in_N < OUTPUTS)[:, None] & (k + in_K < INPUTS)[None, :], EVEN_N and EVEN_K).T
            acc = tl.dot(a, b, acc, input_precision="ieee")
        left, right = halves(acc)
        n_N = n + tl.arange(0, BLOCK_N // 2)
        y_tile = y + m.to(tl.int64) * OUTPUTS
        store(y_tile, left, end - m, n_N, OUTPUTS, OUTPUTS, EVEN_N)
        store(y_tile, right, end - m, n_N + BLOCK_N // 2, OUTPUTS, OUTPUTS, EVEN_N)


def rows(
    x: Tensor, weight: Tensor, offsets: Tensor, transposed: bool = False, order_N: Tensor | None = None, top_k: int = 1
) -> Tensor:
    """`y_n = W_e x_n` for the rows of each expert.

    Args:
        x: [N, I]; with `order_N` [T, I], of which row n reads the token `order_N[n] // top_k`.
        weight: [E, O, I]; [E, I, O] if `transposed`, for `y_n = W_eᵀ x_n`.
        offsets: expert e's rows are offsets[e] ≤ n < offsets[e + 1], [E + 1] int32.
        order_N: int32.

    Returns: [N, O] in the inputs' dtype, summed in fp32. Rows past the last expert's are left as they were allocated.

    Raises:
        ValueError: arguments that do not fit each other, are not contiguous, or of a dtype that is not supported.
    """
    wide, narrow = (2, 1) if transposed else (1, 2)
    check_kernel(x=x, weight=weight)
    check_shape("weight", weight, (None, None, None))
    kernel = "rows_transposed" if transposed else "rows"
    how = plan(kernel, weight.shape[wide], weight.shape[narrow], x)
    return run_rows(x, weight, offsets, transposed, order_N, top_k, how)


def run_rows(
    x: Tensor, weight: Tensor, offsets: Tensor, transposed: bool, order_N: Tensor | None, top_k: int, how: Plan
) -> Tensor:
    """`rows` as planned."""
    experts, outputs, inputs = weight.mT.shape if transposed else weight.shape
    check_shape("x", x, (None, inputs))
    check_index("offsets", offsets, experts + 1, x.device)
    if order_N is not None:
        check_index("order_N", order_N, None, x.device)
        check_tokens("x", x, order_N, top_k)
    num_rows = len(x if order_N is None else order_N)
    y = x.new_empty(num_rows, outputs)
    if num_rows == 0:
        return y
    config = how.config
    gather = order_N is not None
    tma = how.tma and fits_tma(weight, *(() if gather else (x,)))
    block = (config.block_k, config.block_n) if transposed else (config.block_n, config.block_k)
    with torch.cuda.device_of(x):
        rows_kernel[(how.programs,)](
            descriptor(x, (config.block_m, config.block_k)) if tma and not gather else x,
            descriptor(weight, (1, *block)) if tma else weight,
            order_N,
            offsets,
            y,
            TOP_K=top_k,
            EXPERTS=experts,
            OUTPUTS=outputs,
            INPUTS=inputs,
            TRANSPOSED=transposed,
            GATHER=gather,
            TMA=tma,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            GROUP_M=config.group_m,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return y
