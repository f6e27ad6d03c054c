"""`route` and `sort_by_expert` in plain PyTorch, on any device: the definition, and the path of CPUs.

Shapes: T tokens, E experts, K active experts, N = T·K pairs (t, k) of a token and one of its experts.
"""

import torch
from torch import Tensor

from flexpert_kernels.precision import wide

# Stable sorting of 16-bit integers takes a third of the time of 64-bit ones on a CPU at N = 65,536.
KEY = torch.int16
#: One more than the last expert must be a key, too.
MOST_EXPERTS = torch.iinfo(KEY).max


def route(
    logits_TE: Tensor, top_k: int, bias_E: Tensor | None = None, renormalise: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Softmax over all experts, then the K largest; in fp64 for fp64 logits, else in fp32 (arXiv 2507.07024).

    Logits get `min(bias, 0)`, so that a bias only makes an expert harder to choose, and are centred: what is added to
    all of a token's logits does not change its softmax, and shall not change what the z-loss squares.

    Args:
        top_k: K, from 1 to E.
        renormalise: divide a token's weights by their sum.

    Returns: `probs_TE`; `weights_TK`, largest first; `indices_TK` int64, the smaller index first among equals;
        `normaliser_T`, log Σ_e exp of the centred logits.
    """
    logits_TE = wide(logits_TE)
    if bias_E is not None:
        logits_TE = logits_TE + bias_E.to(logits_TE.dtype).clamp(max=0)
    logits_TE = logits_TE - logits_TE.mean(-1, keepdim=True)
    normaliser_T = logits_TE.logsumexp(-1)
    probs_TE = (logits_TE - normaliser_T[:, None]).exp()
    indices_TK = first_largest(probs_TE.detach(), top_k)
    weights_TK = probs_TE.gather(1, indices_TK)
    if renormalise:
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    return probs_TE, weights_TK, indices_TK, normaliser_T


def first_largest(probs_TE: Tensor, top_k: int) -> Tensor:
    """`topk`'s indices with a defined order of equals, which `topk` leaves open: `max` returns the first of them."""
    left_TE, chosen = probs_TE.clone(), []
    for _ in range(top_k):
        chosen.append(left_TE.max(-1, keepdim=True).indices)
        left_TE.scatter_(1, chosen[-1], -1)
    return torch.cat(chosen, 1)


def sort_by_expert(indices_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """The order of pairs by expert, their own order kept within an expert; indices outside [0, E) come last.

    Returns: `order_N`, the pair t·K + k at each row; `places_TK`, the row of each pair; `offsets` [E + 1], where each
        expert's rows begin and the last one's end. All int64.
    """
    inside_TK = (indices_TK >= 0) & (indices_TK < num_experts)
    experts_N, order_N = torch.where(inside_TK, indices_TK, num_experts).flatten().to(KEY).sort(stable=True)
    rows_N = torch.arange(order_N.shape[0], device=order_N.device)
    places_TK = torch.empty_like(order_N).scatter_(0, order_N, rows_N).view(indices_TK.shape)
    offsets = torch.searchsorted(experts_N, torch.arange(num_experts + 1, dtype=KEY, device=order_N.device))
    return order_N, places_TK, offsets
