"""Parts of the kernels: which tile is whose, and reading and writing one.

E experts. A suffix names a block's dimension: M rows of a tile, N its columns.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def rows_of_experts(offsets, EXPERTS: tl.constexpr):
    """Rows of each expert, filled up with zeros to a power of two."""
    e_E = tl.arange(0, triton.next_power_of_2(EXPERTS))
    owned = e_E < EXPERTS
    return tl.load(offsets + e_E + 1, mask=owned, other=0) - tl.load(offsets + e_E, mask=owned, other=0)


@triton.jit
def locate(tile, tiles_E):
    """The expert that a tile belongs to, and the tile's number among that expert's."""
    before_E = tl.cumsum(tiles_E, 0) <= tile
    return tl.sum(before_E.to(tl.int32), 0), tile - tl.sum(tl.where(before_E, tiles_E, 0), 0)


@triton.jit
def order_tiles(tile, tiles_m, TILES_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Row and column of an expert's tile: down a group of GROUP_M rows, then the next column, for the L2 cache."""
    group = tile // (GROUP_M * TILES_N)
    within = tile % (GROUP_M * TILES_N)
    height = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    return group * GROUP_M + within % height, within // height


@triton.jit
def load(pointers, mask, EVEN: tl.constexpr):
    """0 where the mask is false; EVEN says that it is true everywhere."""
    if EVEN:
        return tl.load(pointers)
    return tl.load(pointers, mask=mask, other=0)


@triton.jit
def store(y, y_MN, num_rows, n_N, WIDTH: tl.constexpr, STRIDE: tl.constexpr, EVEN: tl.constexpr):
    """A tile from its first row, `y`, on: columns n_N below WIDTH of its first num_rows rows.

    Addresses count from the tile, so that 32 bits are enough for them.
    """
    in_M = tl.arange(0, y_MN.shape[0])
    mask = (in_M < num_rows)[:, None]
    if not EVEN:
        mask &= (n_N < WIDTH)[None, :]
    tl.store(y + in_M[:, None] * STRIDE + n_N[None, :], y_MN.to(y.dtype.element_ty), mask=mask)


@triton.jit
def halves(acc):
    """Left and right half of a tile's columns. Both halves of a row are in one thread: nothing moves."""
    return acc.reshape(acc.shape[0], 2, acc.shape[1] // 2).permute(0, 2, 1).split()
