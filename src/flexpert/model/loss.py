"""Cross-entropy and z-losses, a chunk of tokens at a time: full logits [T, V] are never stored.

Shapes: T tokens, D residual width, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from flexpert.model.router import Routing

#: Target of a position that is not predicted.
IGNORE = -100


class Vocabulary:
    """Which rows of the head a process has: all of them, from row `first` = 0 on; `flexpert.parallel` has some."""

    first = 0

    def logsumexp(self, part_T: Tensor) -> Tensor:
        """Of all rows, from that of this process's."""
        return part_T

    def sum(self, part_T: Tensor) -> Tensor:
        """Over all processes that share the vocabulary."""
        return part_T

    def argmax(self, logits_TV: Tensor) -> Tensor:
        """The likeliest tokens [T], of all rows, from the logits of this process's."""
        return logits_TV.argmax(1)


class ChunkedNLL(torch.autograd.Function):
    """Negative log-likelihood and log-normaliser per token; logits of one chunk live at a time, in fp32.

    nll_t = lse_t − z_t[y_t],  lse_t = log Σ_v exp z_tv,  z = h Wᵀ.
    dz = g_nll (softmax(z) − onehot(y)) + g_lse softmax(z).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, chunk_tokens: int, vocabulary: Vocabulary
    ) -> tuple[Tensor, Tensor]:
        picked_T = torch.empty(hidden_TD.shape[0], dtype=torch.float, device=hidden_TD.device)
        lse_T = torch.empty_like(picked_T)
        index_T, elsewhere_T = place(targets_T, len(weight_VD), vocabulary)
        for start in range(0, hidden_TD.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            logits = (hidden_TD[rows] @ weight_VD.T).float()
            picked_T[rows] = logits.gather(1, index_T[rows, None])[:, 0]
            lse_T[rows] = logits.logsumexp(1)
        lse_T = vocabulary.logsumexp(lse_T)
        nll_T = lse_T - vocabulary.sum(picked_T.masked_fill_(elsewhere_T, 0.0))
        nll_T.masked_fill_(targets_T == IGNORE, 0.0)
        ctx.save_for_backward(hidden_TD, weight_VD, targets_T, lse_T)
        ctx.chunk_tokens, ctx.vocabulary = chunk_tokens, vocabulary
        return nll_T, lse_T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        hidden_TD, weight_VD, targets_T, lse_T = ctx.saved_tensors
        grad_nll_T = grads[0].masked_fill(targets_T == IGNORE, 0.0)
        grad_sum_T = grad_nll_T + grads[1]
        index_T, elsewhere_T = place(targets_T, len(weight_VD), ctx.vocabulary)
        grad_picked_T = grad_nll_T.masked_fill(elsewhere_T, 0.0)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden_TD) if need_hidden else None
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.float) if need_weight else None
        for start in range(0, hidden_TD.shape[0], ctx.chunk_tokens):
            rows = slice(start, start + ctx.chunk_tokens)
            grad = (hidden_TD[rows] @ weight_VD.T).float().sub_(lse_T[rows, None]).exp_()
            grad.mul_(grad_sum_T[rows, None])
            grad.scatter_add_(1, index_T[rows, None], -grad_picked_T[rows, None])
            grad = grad.to(hidden_TD.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad @ weight_VD
            if grad_weight is not None:
                grad_weight += grad.T @ hidden_TD[rows]
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight_VD.dtype), None, None, None


def place(targets_T: Tensor, num_rows: int, vocabulary: Vocabulary) -> tuple[Tensor, Tensor]:
    """Targets as rows of this process, and which of them are no row of it."""
    index_T = targets_T - vocabulary.first
    elsewhere_T = (index_T < 0) | (index_T >= num_rows)
    return index_T.masked_fill(elsewhere_T, 0), elsewhere_T


def chunked_nll(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    chunk_tokens: int = 1024,
    vocabulary: Vocabulary = Vocabulary(),  # noqa: B008 (it has no state)
) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood (nats) and log-normaliser of every token, both fp32 [T].

    Targets equal to `IGNORE` have likelihood 1 and no gradient through it; their log-normaliser is still given.
    Differentiable once in `hidden_TD` and `weight_VD`.
    """
    if torch.is_autocast_enabled(hidden_TD.device.type):
        dtype = torch.get_autocast_dtype(hidden_TD.device.type)
        hidden_TD, weight_VD = hidden_TD.to(dtype), weight_VD.to(dtype)
    nll_T, lse_T = ChunkedNLL.apply(hidden_TD, weight_VD, targets_T, chunk_tokens, vocabulary)  # type: ignore[no-untyped-call]
    return nll_T, lse_T


def router_z_sum(routings: list[Routing], valid_T: Tensor | None = None) -> Tensor:
    """Σ over layers and tokens of the squared log-normaliser of centred logits, which is least where all are equal.

    Tokens where `valid_T` is False do not count.
    """
    squares = torch.stack([routing.normaliser_T.square() for routing in routings]).sum(0)
    return (squares if valid_T is None else squares * valid_T).sum()
