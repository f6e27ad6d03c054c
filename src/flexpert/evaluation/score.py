"""Score held-out documents with one model: likelihood, answers and routing.

Shapes: B windows, S positions, L layers, E experts.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flexpert.evaluation.documents import EvaluationSet, windows
from flexpert.model.loss import IGNORE
from flexpert.model.transformer import Transformer


@dataclass(frozen=True)
class Scores:
    """One model on one data set.

    Attributes:
        nll: per document, the negative log-likelihood of each token, nats.
        right: per document, whether each token is the model's first choice given those before.
        routing: share of the router weight that each expert has, [documents, L, E]; None for a dense model.
    """

    nll: list[NDArray[np.float64]]
    right: list[NDArray[np.bool_]]
    routing: NDArray[np.float64] | None


@torch.no_grad()
def score(model: Transformer, data: EvaluationSet, length: int, batch: int) -> Scores:
    """Run the model over every document once."""
    device = model.head.weight.device
    nll: list[list[NDArray[np.float64]]] = [[] for _ in data.documents]
    right: list[list[NDArray[np.bool_]]] = [[] for _ in data.documents]
    experts, layers = model.config.num_experts, model.config.num_layers
    routing = np.zeros((len(data.documents), layers, experts)) if experts else None
    for owners, block in windows(data.documents, data.manifest.eos_id, length, batch):
        block = block.to(device)
        inputs, targets = block[:, :-1].clamp(min=0), block[:, 1:]
        hidden = model(inputs)
        logits = model.head(hidden.stream_BSD).float()
        picked = logits.gather(2, targets.clamp(min=0)[..., None])[..., 0]
        loss = (logits.logsumexp(2) - picked).double().cpu().numpy()
        first = (logits.argmax(2) == targets).cpu().numpy()
        valid = (targets != IGNORE).cpu().numpy()
        shares = None
        if routing is not None:
            shares = np.stack([weight_shares(r.weights_TK, r.indices_TK, experts) for r in hidden.routings], axis=1)
            shares = shares.reshape(*valid.shape, layers, experts)
        for row, owner in enumerate(owners):
            nll[owner].append(loss[row][valid[row]])
            right[owner].append(first[row][valid[row]])
            if routing is not None and shares is not None:
                routing[owner] += shares[row][valid[row]].sum(0)
    if routing is not None:
        routing /= routing.sum(-1, keepdims=True)
    return Scores([np.concatenate(part) for part in nll], [np.concatenate(part) for part in right], routing)


def weight_shares(weights_TK: torch.Tensor, indices_TK: torch.Tensor, experts: int) -> NDArray[np.float64]:
    """Router weights of the active experts, in a row of all of them, [T, E]."""
    shares = torch.zeros(len(weights_TK), experts, dtype=torch.double, device=weights_TK.device)
    return shares.scatter_(1, indices_TK, weights_TK.double()).cpu().numpy()


def bits_per_byte(nll: list[NDArray[np.float64]], data: EvaluationSet) -> float:
    """Total negative log-likelihood in bits over the bytes of text; comparable between tokenizers."""
    return float(sum(part.sum() for part in nll)) / math.log(2) / data.num_bytes


def answer_accuracy(scores: Scores, data: EvaluationSet) -> float | None:
    """Share of documents whose answer greedy decoding would give, exactly, after the text before it.

    Greedy decoding reproduces a known continuation if and only if each of its tokens is the first choice given the
    ones before, so one forward pass decides it. None where the data has no answers.
    """
    verdicts = [
        bool(right[document.answer_start :].all())
        for right, document in zip(scores.right, data.documents, strict=True)
        if document.answer_start is not None
    ]
    return sum(verdicts) / len(verdicts) if verdicts else None


def summary(scores: Scores, data: EvaluationSet, experts: list[str]) -> dict[str, Any]:
    """What evaluation.json says of one model on one data set."""
    result: dict[str, Any] = {"bits_per_byte": bits_per_byte(scores.nll, data)}
    accuracy = answer_accuracy(scores, data)
    if accuracy is not None:
        result["answer_accuracy"] = accuracy
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
