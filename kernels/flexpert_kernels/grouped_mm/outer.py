"""`outer`: the gradients of the experts' matrices, Σ_n y_n x_nᵀ over each expert's rows.

Shapes: T tokens, N rows sorted by expert, K active experts, E experts, O outputs and I inputs of a matrix. Inside the
kernel a suffix names a block's dimension: M of the O outputs, N of the I inputs, K of the rows, which are summed.

Experts have different numbers of rows, so the compiler cannot fuse the loop over tiles with that over rows (rows.py).
Here they are one loop by hand, over all blocks of rows of all tiles of a program; a new tile starts where the last
block of the one before is done.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexpert_kernels.arguments import (
    check_dtype,
    check_index,
    check_kernel,
    check_layout,
    check_shape,
    check_tokens,
    expect,
)
from flexpert_kernels.grouped_mm.launch import Plan, descriptor, fits_tma, plan
from flexpert_kernels.grouped_mm.tiles import halves, load, locate, order_tiles, rows_of_experts


@triton.jit
def blocks_of(num_rows, BLOCK_K: tl.constexpr):
    """An expert without rows takes a block too, in which its zeros are written."""
    return tl.maximum(tl.cdiv(num_rows, BLOCK_K), 1)


@triton.jit
def outer_kernel(
    y,
    x,
    order,
    offsets,
    out,
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    GATHER_Y: tl.constexpr,
    GATHER_X: tl.constexpr,
    TMA: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """With TMA the operand that is not gathered (`y` if neither is) is a descriptor.

    A block of a descriptor cannot end where an expert does. The last block of an expert is therefore moved up, until it
    ends with the expert, and the other operand, read by pointers, is 0 in the rows that the block before had already:
    each row counts once, and rows past the last expert, which may hold anything, are never read. Only for an expert of
    fewer rows than a block the moved block begins in other experts' rows; those are multiplied by 0 and so have to be
    finite.
    """
    TILES_M: tl.constexpr = (OUTPUTS + BLOCK_M - 1) // BLOCK_M
    TILES_N: tl.constexpr = (INPUTS + BLOCK_N - 1) // BLOCK_N
    EVEN: tl.constexpr = OUTPUTS % BLOCK_M == 0 and INPUTS % BLOCK_N == 0
    num_E = rows_of_experts(offsets, EXPERTS)
    e_E = tl.arange(0, triton.next_power_of_2(EXPERTS))
    worked = e_E < EXPERTS
    if ADD:
        worked &= num_E > 0
    tiles_E = tl.where(worked, TILES_M * TILES_N, 0)
    # The tiles of an expert are numbered [first, last); every num_programs-th of all is this program's.
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    last_E = tl.cumsum(tiles_E, 0)
    mine_E = mine(last_E, program, programs) - mine(last_E - tiles_E, program, programs)
    num_blocks = tl.sum(mine_E * blocks_of(num_E, BLOCK_K), 0)

    in_M = tl.arange(0, BLOCK_M)
    in_N = tl.arange(0, BLOCK_N)
    in_K = tl.arange(0, BLOCK_K)
    tile = program - programs
    e = 0
    m = 0
    n = 0
    begin = 0
    end = 0
    k = 0
    blocks = 0
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in tl.range(0, num_blocks):
        if k == blocks:
            tile += programs
            e, tile_e = locate(tile, tiles_E)
            begin = tl.load(offsets + e)
            end = tl.load(offsets + e + 1)
            m, n = order_tiles(tile_e, TILES_M, TILES_N, GROUP_M)
            m = m * BLOCK_M
            n = n * BLOCK_N
            k = 0
            blocks = blocks_of(end - begin, BLOCK_K)
        # An expert without rows reads rows before the first: TMA gives zeros.
        first = tl.where(end > begin, tl.minimum(begin + k * BLOCK_K, end - BLOCK_K), -BLOCK_K)
        row_K = first + in_K
        fresh_K = in_K >= begin + k * BLOCK_K - first
        if GATHER_Y or GATHER_X:
            token_K = tl.load(order + row_K, mask=fresh_K, other=0) // TOP_K
        if TMA and not GATHER_Y:
            y_MK = y.load([first, m]).T
        else:
            y_K = (token_K if GATHER_Y else row_K).to(tl.int64) * OUTPUTS
            y_mask = fresh_K[None, :] if EVEN else fresh_K[None, :] & (m + in_M < OUTPUTS)[:, None]
            y_MK = tl.load(y + (m + in_M)[:, None] + y_K[None, :], mask=y_mask, other=0)
        if TMA and GATHER_Y:
            x_KN = x.load([first, n])
        else:
            x_K = (token_K if GATHER_X else row_K).to(tl.int64) * INPUTS
            x_mask = fresh_K[:, None] if EVEN else fresh_K[:, None] & (n + in_N < INPUTS)[None, :]
            x_KN = tl.load(x + x_K[:, None] + (n + in_N)[None, :], mask=x_mask, other=0)
        acc = tl.dot(y_MK, x_KN, acc, input_precision="ieee")
        if k == blocks - 1:
            w_tile = out + (tl.cast(e, tl.int64) * OUTPUTS + m) * INPUTS
            sides = halves(acc)
            for i in tl.static_range(2):
                quarters = halves(sides[i])
                for j in tl.static_range(2):
                    write(w_tile, quarters[j], OUTPUTS - m, n + (2 * i + j) * (BLOCK_N // 4), INPUTS, ADD, EVEN)
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        k += 1


@triton.jit
def mine(tiles, program, programs):
    """How many of the tiles below this number are the program's."""
    return tl.maximum(tl.cdiv(tiles - program, programs), 0)


@triton.jit
def write(w, w_MN, num_rows, n, INPUTS: tl.constexpr, ADD: tl.constexpr, EVEN: tl.constexpr):
    """A part of a tile, whose first row begins at `w`, from column n on."""
    in_M = tl.arange(0, w_MN.shape[0])
    n_N = n + tl.arange(0, w_MN.shape[1])
    w += in_M[:, None] * INPUTS + n_N[None, :]
    mask = (in_M < num_rows)[:, None] & (n_N < INPUTS)[None, :]
    if ADD:
        w_MN += load(w, mask, EVEN)
    if EVEN:
        tl.store(w, w_MN.to(w.dtype.element_ty))
    else:
        tl.store(w, w_MN.to(w.dtype.element_ty), mask=mask)


def outer(
    y: Tensor,
    x: Tensor,
    offsets: Tensor,
    order_N: Tensor | None = None,
    top_k: int = 1,
    gathered: str | None = None,
    out: Tensor | None = None,
    beta: int = 0,
) -> Tensor:
    """`Σ_n y_n x_nᵀ` over the rows of each expert; 0 for an expert without rows.

    Args:
        y, x: [N, O] and [N, I]; the one that `gathered` names has T rows, and row n reads `order_N[n] // top_k` of it.
        offsets: expert e's rows are offsets[e] ≤ n < offsets[e + 1], [E + 1] int32. What lies past the last expert's is
            not read; all that is read has to be finite (`outer_kernel` says why).
        order_N: int32; needed if `gathered` is "y" or "x".
        out: fp32 [E, O, I] to write into (`beta` 0) or to add to (1); a new tensor in the inputs' dtype if left out.

    Returns: `out`, or the new tensor. Rows are summed in fp32, in order: the same bits each time.

    Raises:
        ValueError: arguments that do not fit each other, are not contiguous, or of a dtype that is not supported.
    """
    check_kernel(y=y, x=x)
    check_shape("y", y, (None, None))
    check_shape("x", x, (None, None))
    how = plan("outer_y" if gathered == "y" else "outer_x", y.shape[1], x.shape[1], x)
    return run_outer(y, x, offsets, order_N, top_k, gathered, out, beta, how)


def run_outer(
    y: Tensor,
    x: Tensor,
    offsets: Tensor,
    order_N: Tensor | None,
    top_k: int,
    gathered: str | None,
    out: Tensor | None,
    beta: int,
    how: Plan,
) -> Tensor:
    """`outer` as planned."""
    experts, outputs, inputs = len(offsets) - 1, y.shape[1], x.shape[1]
    check_index("offsets", offsets, None, x.device)
    expect(gathered in (None, "y", "x"), "gathered", "None, 'y' or 'x'", repr(gathered))
    if gathered is None:
        check_shape("y", y, (len(x), None))
    elif order_N is None:
        raise ValueError(f"order_N: the order of rows expected where gathered is {gathered!r}, None given")
    else:
        sources, dense = (y, x) if gathered == "y" else (x, y)
        check_index("order_N", order_N, len(dense), x.device)
        check_tokens(gathered, sources, order_N, top_k)
    expect(beta == 0 or (beta == 1 and out is not None), "beta", "0, or 1 with an `out` to add to", beta)
    if out is None:
        out = x.new_empty(experts, outputs, inputs)
    else:
        check_shape("out", out, (experts, outputs, inputs))
        check_layout("out", out, x.device)
        check_dtype("out", out, (torch.float32,))
    config = how.config
    by_tma, block = (x, config.block_n) if gathered == "y" else (y, config.block_m)
    if len(by_tma) == 0:
        return out if beta else out.zero_()
    tma = how.tma and fits_tma(by_tma)
    described = descriptor(by_tma, (config.block_k, block)) if tma else by_tma
    with torch.cuda.device_of(x):
        outer_kernel[(how.programs,)](
            y if gathered == "y" else described,
            described if gathered == "y" else x,
            order_N,
            offsets,
            out,
            TOP_K=top_k,
            EXPERTS=experts,
            OUTPUTS=outputs,
            INPUTS=inputs,
            GATHER_Y=gathered == "y",
            GATHER_X=gathered == "x",
            TMA=tma,
            ADD=beta == 1,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            GROUP_M=config.group_m,
            num_warps=config.num_warps,
            # Row numbers are fetched a block ahead of what they point to, which takes half of the compiler's stages.
            num_stages=config.num_stages if gathered is None else 2 * config.num_stages - 1,
        )
    return out
