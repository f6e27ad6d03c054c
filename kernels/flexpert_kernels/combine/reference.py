"""`combine` and its gradients in plain PyTorch, on any device: the definition, and the path of CPUs.

Shapes: T tokens, D residual width, E experts, K active experts, N = T·K rows: pairs (t, k) sorted by expert.

Rows past offsets[E] belong to no expert here and may hold NaN, so that a zero weight would not silence them: they must
not be read. PyTorch's `embedding_bag` sums weighted rows without a copy of them, three to seven times faster on a CPU
than indexing and summing. It has no mask, but its bags' lengths are data: pairs left out go to one more bag, which
reads row 0 in their place and is dropped.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from flexpert_kernels.precision import wide


def combine(y_ND: Tensor, places_TK: Tensor, weights_TK: Tensor | None, offsets: Tensor) -> Tensor:
    """`z_t = Σ_k w_tk y[places_tk]` over the places before offsets[E], [T, D].

    Args:
        places_TK: the row of each pair.
        weights_TK: None for ones.
        offsets: [E + 1]; only its last entry is read.

    Returns: z in y's dtype, summed in fp64 for fp64 rows, else in fp32.
    """
    num_tokens, top_k = places_TK.shape
    if num_tokens == 0:  # embedding_bag wants a row to leave out
        return y_ND.new_zeros(0, y_ND.shape[1])
    inside_N = places_TK.flatten() < offsets[-1]
    counts_N = inside_N.cumsum(0)
    starts = F.pad(counts_N[top_k - 1 :: top_k], (1, 0))
    # One more slot than pairs: where those left out are written, one over another.
    slots_N = torch.where(inside_N, counts_N - 1, num_tokens * top_k)
    bags = torch.zeros(num_tokens * top_k + 1, dtype=torch.int64, device=y_ND.device)
    bags = bags.scatter_(0, slots_N, places_TK.flatten().long())
    rows_ND = wide(y_ND)
    weights = None
    if weights_TK is not None:
        weights = rows_ND.new_zeros(num_tokens * top_k + 1)
        weights = weights.scatter(0, slots_N, weights_TK.flatten().to(rows_ND.dtype))
    return F.embedding_bag(bags, rows_ND, starts, mode="sum", per_sample_weights=weights)[:-1].to(y_ND.dtype)


def combine_backward(
    dz_TD: Tensor, y_ND: Tensor, weights_TK: Tensor | None, places_TK: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor | None]:
    """`dy_n = w_n dz_t(n)` and `dw_tk = <dz_t, y_n>`; both are 0 for rows past offsets[E].

    Args:
        weights_TK: None for ones, which have no gradient.
        places_TK: the row of each pair.

    Returns: `dy_ND` in y's dtype, `dweights_TK` in the weights'.
    """
    (num_rows, _), (num_tokens, top_k) = y_ND.shape, places_TK.shape
    if num_tokens == 0:
        return torch.zeros_like(y_ND), None if weights_TK is None else torch.zeros_like(weights_TK)
    dz, dtype, places_N = wide(dz_TD), y_ND.dtype, places_TK.flatten().long()
    rows_N = torch.arange(num_rows + 1, device=y_ND.device)
    starts = rows_N.clamp(max=offsets[-1])
    rows_N = rows_N[:-1]
    order_N = torch.empty_like(rows_N).scatter_(0, places_N, rows_N)  # the pair t·K + k at each row
    tokens_N = torch.where(rows_N < offsets[-1], order_N // top_k, 0)
    if weights_TK is None:
        return F.embedding_bag(tokens_N, dz, starts, mode="sum")[:-1].to(dtype), None
    weights_N = weights_TK.flatten()[order_N].to(dz.dtype)
    dy_ND = F.embedding_bag(tokens_N, dz, starts, mode="sum", per_sample_weights=weights_N)[:-1].to(dtype)
    # The operator behind embedding_bag's own gradient: rows' inner products without a copy of them. A row of −1 is
    # padding to it, which gives 0. It asks for the bag, here the token, of each row, and where bags begin, unused.
    places_N = torch.where(places_N < offsets[-1], places_N, -1)
    dweights_N = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        dz, wide(y_ND), places_N, rows_N, rows_N // top_k, 0, -1
    )
    return dy_ND, dweights_N.view_as(weights_TK).to(weights_TK.dtype)
