"""The router's choice with its backward pass: one kernel where Triton runs, plain PyTorch elsewhere.

Shapes: T tokens, E experts, K active experts.
"""

from typing import Any

import torch
from torch import Tensor

from flexpert_kernels.moe.backends import load
from flexpert_kernels.moe.check import check_route
from flexpert_kernels.moe.dispatch import elementwise
from flexpert_kernels.route import reference


def route(logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Softmax over all experts, then the K largest, with no renormalisation (FlexOlmo, arXiv 2507.07024); in fp32.

    Returns: probabilities [T, E]; the chosen ones' [T, K], largest first; their experts [T, K], the smaller index first
        among equals; log Σ_e exp(logit_e − mean logit) [T], for the z-loss.

    Raises:
        ValueError: the logits are no matrix of floating-point numbers, or `top_k` is not from 1 to E.
    """
    if not torch.compiler.is_compiling():
        check_route(logits_TE, top_k)
    if elementwise(logits_TE, logits_TE.shape[1]) == "loop":
        return reference.route(logits_TE, top_k)
    return Route.apply(logits_TE, top_k)  # type: ignore[no-any-return, no-untyped-call]


class Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        load()  # of the operator
        probs_TE, weights_TK, indices_TK, normaliser_T = torch.ops.flexpert.route_of(logits_TE, top_k)
        ctx.mark_non_differentiable(indices_TK)
        ctx.save_for_backward(probs_TE, indices_TK)
        return probs_TE, weights_TK, indices_TK, normaliser_T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        dprobs_TE, dweights_TK, _, dnormaliser_T = grads
        probs_TE, indices_TK = ctx.saved_tensors
        dprobs_TE = dprobs_TE.scatter_add(1, indices_TK, dweights_TK)
        dlogits_TE = probs_TE * (dprobs_TE - (dprobs_TE * probs_TE).sum(-1, keepdim=True))
        return dlogits_TE + dnormaliser_T[:, None] * (probs_TE - 1 / probs_TE.shape[1]), None
