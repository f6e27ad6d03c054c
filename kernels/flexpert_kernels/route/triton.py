"""`route` and `sort_by_expert` as kernels; `reference.py` has the same names in plain PyTorch.

Shapes: T tokens, E experts, K active experts, N = T·K pairs (t, k) of a token and one of its experts. Inside a kernel a
suffix names a block's dimension: T or N of so many tokens or pairs, E and K filled up to a power of two.

Sorting counts, twice over the same pairs: how many of each expert are in each tile of consecutive pairs; then, from the
sums of those, where each pair goes. A program computes the sums that it needs from the whole table, which stays small:
the number of tiles is bounded, and a tile is worked through in as many rounds as it takes. Nothing is added atomically.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexpert_kernels.arguments import INTEGERS, check_count, check_dtype, check_kernel, check_shape
from flexpert_kernels.route import MAX_EXPERTS

MAX_TILES = 256
ELEMENTS = 4096  # of a block of pairs or tiles × experts
PLACE_WARPS = 8  # with 4, three such blocks in registers come close to 255 a thread
LOWEST = tl.constexpr(-(2**63))


@triton.jit
def route_kernel(
    logits, bias, probs, weights, indices, normalisers, num_tokens, E: tl.constexpr, K: tl.constexpr,
    RENORMALISE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    token_T = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    expert_E = tl.arange(0, BLOCK_E)
    choice_K = tl.arange(0, BLOCK_K)
    real_E = expert_E < E
    is_token_T = token_T < num_tokens
    entry_TE = token_T.to(tl.int64)[:, None] * E + expert_E[None, :]
    is_entry_TE = is_token_T[:, None] & real_E[None, :]

    logits_TE = tl.load(logits + entry_TE, mask=is_entry_TE, other=0).to(tl.float32)
    if bias is not None:
        logits_TE += tl.minimum(tl.load(bias + expert_E, mask=real_E, other=0).to(tl.float32), 0)[None, :]
    logits_TE -= (tl.sum(logits_TE, 1) / E)[:, None]
    logits_TE = tl.where(real_E[None, :], logits_TE, float("-inf"))
    largest_T = tl.max(logits_TE, 1)
    normaliser_T = largest_T + tl.log(tl.sum(tl.exp(logits_TE - largest_T[:, None]), 1))
    probs_TE = tl.exp(logits_TE - normaliser_T[:, None])
    tl.store(probs + entry_TE, probs_TE, mask=is_entry_TE)
    tl.store(normalisers + token_T, normaliser_T, mask=is_token_T)

    # A probability's bits order like its value: above the expert's number counted from the end they make one integer
    # whose maximum is the largest, and the first of equals. Whatever the logits are, NaN too, K experts are distinct.
    key_TE = (probs_TE.to(tl.int32, bitcast=True).to(tl.int64) << 32) | (BLOCK_E - 1 - expert_E)[None, :]
    key_TE = tl.where(real_E[None, :], key_TE, LOWEST)
    weights_TK = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
    indices_TK = tl.zeros([BLOCK_T, BLOCK_K], tl.int32)
    for k in range(K):
        best_T = tl.max(key_TE, 1)
        expert_T = BLOCK_E - 1 - (best_T & 0xFFFFFFFF).to(tl.int32)
        weight_T = (best_T >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        indices_TK = tl.where(choice_K[None, :] == k, expert_T[:, None], indices_TK)
        weights_TK = tl.where(choice_K[None, :] == k, weight_T[:, None], weights_TK)
        key_TE = tl.where(expert_E[None, :] == expert_T[:, None], LOWEST, key_TE)
    if RENORMALISE:
        weights_TK = weights_TK / tl.sum(weights_TK, 1)[:, None]
    pair_TK = token_T.to(tl.int64)[:, None] * K + choice_K[None, :]
    is_pair_TK = is_token_T[:, None] & (choice_K < K)[None, :]
    tl.store(weights + pair_TK, weights_TK, mask=is_pair_TK)
    tl.store(indices + pair_TK, indices_TK.to(tl.int64), mask=is_pair_TK)


@triton.jit
def load_experts(indices, pair_N, num_pairs, E: tl.constexpr):
    """The pairs' experts; -1 for those outside [0, E), and past the last pair."""
    expert_N = tl.load(indices + pair_N, mask=pair_N < num_pairs, other=-1)
    return tl.where((expert_N >= 0) & (expert_N < E), expert_N, -1).to(tl.int32)


@triton.jit
def count_kernel(indices, counts, num_pairs, rounds, E: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr):
    """Each tile's pairs of each expert, [tiles, BLOCK_E]. A tile is `rounds` blocks of BLOCK_N pairs."""
    tile = tl.program_id(0)
    expert_E = tl.arange(0, BLOCK_E)
    count_E = tl.zeros([BLOCK_E], tl.int32)
    for i in range(rounds):
        expert_N = load_experts(indices, (tile * rounds + i) * BLOCK_N + tl.arange(0, BLOCK_N), num_pairs, E)
        count_E += tl.sum((expert_N[:, None] == expert_E[None, :]).to(tl.int32), 0)
    tl.store(counts + tile * BLOCK_E + expert_E, count_E)


@triton.jit
def place_kernel(
    indices, counts, order, places, offsets, num_pairs, num_tiles, rounds, E: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    expert_E = tl.arange(0, BLOCK_E)
    total_E = tl.zeros([BLOCK_E], tl.int32)
    before_E = tl.zeros([BLOCK_E], tl.int32)
    for first in range(0, num_tiles, BLOCK_N):
        tile_N = first + tl.arange(0, BLOCK_N)
        entry_NE = tile_N[:, None] * BLOCK_E + expert_E[None, :]
        count_NE = tl.load(counts + entry_NE, mask=(tile_N < num_tiles)[:, None], other=0)
        total_E += tl.sum(count_NE, 0)
        before_E += tl.sum(tl.where((tile_N < tile)[:, None], count_NE, 0), 0)
    start_E = tl.cumsum(total_E, 0) - total_E
    num_inside = tl.sum(total_E, 0)
    if tile == 0:
        tl.store(offsets + expert_E, start_E, mask=expert_E < E)
        tl.store(offsets + E, num_inside)

    next_E = start_E + before_E  # where the next pair of each expert goes
    num_before = tl.sum(before_E, 0)  # pairs of any expert so far
    for i in range(rounds):
        pair_N = (tile * rounds + i) * BLOCK_N + tl.arange(0, BLOCK_N)
        expert_N = load_experts(indices, pair_N, num_pairs, E)
        hot_NE = (expert_N[:, None] == expert_E[None, :]).to(tl.int32)
        rank_NE = tl.cumsum(hot_NE, 0)
        place_N = tl.sum(hot_NE * (next_E[None, :] + rank_NE - 1), 1)
        # A pair of no expert comes after all others and after as many of its kind as precede it.
        outside_N = num_inside + pair_N - num_before - tl.sum(rank_NE, 1)
        place_N = tl.where(expert_N >= 0, place_N, outside_N)
        tl.store(places + pair_N, place_N, mask=pair_N < num_pairs)
        tl.store(order + place_N, pair_N, mask=pair_N < num_pairs)
        next_E += tl.sum(hot_NE, 0)
        num_before += tl.sum(tl.sum(hot_NE, 0), 0)


def route(
    logits_TE: Tensor, top_k: int, bias_E: Tensor | None = None, renormalise: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`probs_TE`, `weights_TK` (largest first), `indices_TK` and `normaliser_T`, in fp32; indices int64.

    Logits get min(bias, 0) and are centred; equals come in the order of their indices.
    """
    logits_TE = logits_TE.contiguous()
    check_kernel(logits_TE=logits_TE)
    check_shape("logits_TE", logits_TE, (None, None))
    num_tokens, num_experts = logits_TE.shape
    check_count("num_experts", num_experts, MAX_EXPERTS)
    check_count("top_k", top_k, num_experts)
    if bias_E is not None:
        check_shape("bias_E", bias_E, (num_experts,))
        bias_E = bias_E.contiguous()
    probs_TE = torch.empty_like(logits_TE, dtype=torch.float32)
    weights_TK = probs_TE.new_empty(num_tokens, top_k)
    indices_TK = torch.empty_like(weights_TK, dtype=torch.int64)
    normaliser_T = probs_TE.new_empty(num_tokens)
    block_e, block_k = triton.next_power_of_2(num_experts), triton.next_power_of_2(top_k)
    block_t = max(1, ELEMENTS // 4 // block_e)
    if num_tokens:
        route_kernel[(triton.cdiv(num_tokens, block_t),)](
            logits_TE, bias_E, probs_TE, weights_TK, indices_TK, normaliser_T, num_tokens, num_experts, top_k,
            renormalise, block_t, block_e, block_k,
        )  # fmt: skip
    return probs_TE, weights_TK, indices_TK, normaliser_T


def sort_by_expert(indices_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """`order_N`, `places_TK` and `offsets` [E + 1], int32, of a stable sort; indices outside [0, E) come last."""
    indices_TK = indices_TK.contiguous()
    check_shape("indices_TK", indices_TK, (None, None))
    check_dtype("indices_TK", indices_TK, INTEGERS)
    check_count("num_experts", num_experts, MAX_EXPERTS)
    num_pairs = indices_TK.numel()
    places_TK = torch.empty_like(indices_TK, dtype=torch.int32)
    order_N = places_TK.new_empty(num_pairs)
    offsets = places_TK.new_empty(num_experts + 1)
    block_n, block_e, rounds, num_tiles = tiles(num_pairs, num_experts)
    counts = places_TK.new_empty(num_tiles, block_e)
    count_kernel[(num_tiles,)](indices_TK, counts, num_pairs, rounds, num_experts, block_n, block_e)
    place_kernel[(num_tiles,)](
        indices_TK, counts, order_N, places_TK, offsets, num_pairs, num_tiles, rounds, num_experts, block_n, block_e,
        num_warps=PLACE_WARPS,
    )  # fmt: skip
    return order_N, places_TK, offsets


def tiles(num_pairs: int, num_experts: int) -> tuple[int, int, int, int]:
    """BLOCK_N, BLOCK_E, rounds of a tile, number of tiles."""
    block_e = triton.next_power_of_2(num_experts)
    block_n = min(ELEMENTS // block_e, 256)
    rounds = max(1, triton.cdiv(num_pairs, block_n * MAX_TILES))
    return block_n, block_e, rounds, max(1, triton.cdiv(num_pairs, block_n * rounds))
