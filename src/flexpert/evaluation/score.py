"""Score held-out documents with one model: likelihood, answers and routing.

Shapes: B windows, S positions, T their tokens without padding, D residual width, V vocabulary, L layers, E experts.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from flexpert.evaluation.documents import EvaluationSet, windows
from flexpert.model.loss import IGNORE
from flexpert.model.transformer import Transformer

#: Tokens whose logits are in memory at a time.
CHUNK_TOKENS = 1024


@dataclass(frozen=True)
class Scores:
    """One model on one data set.

    Attributes:
        nll: per document, the negative log-likelihood of each token, nats.
        answers: per document whose answer fits a window, whether greedy decoding gives exactly that answer.
        routing: share of the router weight that each expert has, [documents, L, E]; None for a dense model.
    """

    nll: list[NDArray[np.float64]]
    answers: list[bool]
    routing: NDArray[np.float64] | None


@torch.no_grad()
def score(model: Transformer, data: EvaluationSet, length: int, batch: int) -> Scores:
    """Run the model over every document once, and over the end of those whose answer needs a window of its own.

    Greedy decoding reproduces a known continuation if and only if each of its tokens is the first choice given the
    ones before, so one forward pass judges an answer.
    """
    device = model.head.weight.device
    nll: list[list[NDArray[np.float64]]] = [[] for _ in data.documents]
    answers: list[bool] = []
    experts, layers = model.config.num_experts, model.config.num_layers
    routing = np.zeros((len(data.documents), layers, experts)) if experts else None
    for members, block in windows(data.documents, data.manifest.eos_id, length, batch):
        block = block.to(device)
        inputs_BS, targets_T = block[:, :-1].clamp(min=0), block[:, 1:].flatten()
        hidden = model(inputs_BS)
        valid_T = targets_T != IGNORE
        nll_T, first_T = predict(model.head, hidden.stream_BSD.flatten(0, 1)[valid_T], targets_T[valid_T])
        shares_TLE = None
        if routing is not None:
            by_layer = [weight_shares(r.weights_TK[valid_T], r.indices_TK[valid_T], experts) for r in hidden.routings]
            shares_TLE = np.stack(by_layer, axis=1)
        end = 0
        for window in members:
            tokens = slice(end, end + len(window.tokens) - 1)
            end = tokens.stop
            if window.counted:
                nll[window.document].append(nll_T[tokens])
                if routing is not None and shares_TLE is not None:
                    routing[window.document] += shares_TLE[tokens].sum(0)
            if window.num_answer_tokens:
                answers.append(bool(first_T[end - window.num_answer_tokens : end].all()))
    if routing is not None:
        routing /= routing.sum(-1, keepdims=True)
    return Scores([np.concatenate(part) for part in nll], answers, routing)


def predict(
    head: nn.Module, hidden_TD: torch.Tensor, targets_T: torch.Tensor
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Each target's negative log-likelihood, nats, and whether it is the first choice; a chunk's logits at a time."""
    nll, first = [], []
    for rows_TD, rows_T in zip(torch.split(hidden_TD, CHUNK_TOKENS), torch.split(targets_T, CHUNK_TOKENS), strict=True):
        logits_TV = head(rows_TD).float()
        nll.append(logits_TV.logsumexp(1) - logits_TV.gather(1, rows_T[:, None])[:, 0])
        first.append(logits_TV.argmax(1) == rows_T)
    return torch.cat(nll).double().cpu().numpy(), torch.cat(first).cpu().numpy()


def weight_shares(weights_TK: torch.Tensor, indices_TK: torch.Tensor, experts: int) -> NDArray[np.float64]:
    """Router weights of the active experts, in a row of all of them, [T, E]."""
    shares = torch.zeros(len(weights_TK), experts, dtype=torch.double, device=weights_TK.device)
    return shares.scatter_(1, indices_TK, weights_TK.double()).cpu().numpy()


def bits_per_byte(nll: list[NDArray[np.float64]], data: EvaluationSet) -> float:
    """Total negative log-likelihood in bits over the bytes of text; comparable between tokenizers."""
    return float(sum(part.sum() for part in nll)) / math.log(2) / data.num_bytes


def summary(scores: Scores, data: EvaluationSet, experts: list[str]) -> dict[str, Any]:
    """What evaluation.json says of one model on one data set; `answers` counts the documents of `answer_accuracy`."""
    result: dict[str, Any] = {"bits_per_byte": bits_per_byte(scores.nll, data)}
    if scores.answers:
        result["answer_accuracy"] = sum(scores.answers) / len(scores.answers)
        result["answers"] = len(scores.answers)
    if scores.routing is not None:
        tokens = np.array([len(document.tokens) for document in data.documents], dtype=np.float64)
        by_layer = np.average(scores.routing, axis=0, weights=tokens)
        top = scores.routing.mean(1).argmax(1)
        result["routing"] = {
            "share": dict(zip(experts, by_layer.mean(0).tolist(), strict=True)),
            "share_by_layer": [dict(zip(experts, layer.tolist(), strict=True)) for layer in by_layer],
            "top_expert_of_documents": {name: float((top == index).mean()) for index, name in enumerate(experts)},
        }
    return result
