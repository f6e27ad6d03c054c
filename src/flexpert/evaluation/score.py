"""Score held-out documents with one model: likelihood, answers and routing.

Shapes: B windows, S positions, T their tokens without padding, D residual width, V vocabulary, L layers, E experts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from flexpert.evaluation.documents import EvaluationSet, Window, windows
from flexpert.model.loss import IGNORE, Vocabulary, place
from flexpert.model.transformer import Transformer
from flexpert.parallel.ranks import ALONE, Ranks
from flexpert.parallel.tensor import local

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


class WindowScore(NamedTuple):
    """A window: its document; if it counts, its tokens' nll and their summed routing, [L, E]; its answer, if any."""

    document: int
    nll: NDArray[np.float64] | None
    routing: NDArray[np.float64] | None
    answer: bool | None


@torch.no_grad()
def score(model: Transformer, data: EvaluationSet, length: int, batch: int, ranks: Ranks = ALONE) -> Scores:
    """Run the model over every document once, and over the end of those whose answer needs a window of its own.

    Greedy decoding reproduces a known continuation if and only if each of its tokens is the first choice given the
    ones before, so one forward pass judges an answer. Batches are dealt out to the processes; each gets all scores.
    """
    experts, layers = model.config.num_experts, model.config.num_layers
    batches = list(windows(data.documents, data.manifest.eos_id, length, batch))
    index, number = ranks.share
    found = {}
    for first in range(0, len(batches), number):
        # Whoever has no batch left runs an empty one: layers are computed together.
        members, block = batches[first + index] if first + index < len(batches) else ([], torch.empty(0, 0))
        if number > 1:
            shape = (batch, max(block.shape[1] for _, block in batches[first : first + number]))
            block = F.pad(block, (0, shape[1] - block.shape[1], 0, shape[0] - len(block)), value=IGNORE)
        found[first + index] = score_batch(model, members, block.long(), ranks)
    rows = [row for _, part in sorted(ranks.collect(found).items()) for row in part]
    nll: list[list[NDArray[np.float64]]] = [[] for _ in data.documents]
    routing = np.zeros((len(data.documents), layers, experts)) if experts else None
    for row in rows:
        if row.nll is not None:
            nll[row.document].append(row.nll)
        if routing is not None and row.routing is not None:
            routing[row.document] += row.routing
    if routing is not None:
        routing /= routing.sum(-1, keepdims=True)
    answers = [row.answer for row in rows if row.answer is not None]
    return Scores([np.concatenate(part) for part in nll], answers, routing)


def score_batch(
    model: Transformer, members: Sequence[Window], block_BS: torch.Tensor, ranks: Ranks
) -> list[WindowScore]:
    """One forward pass; the scores of its windows, in their order."""
    block_BS = block_BS.to(local(model.head.weight).device)
    inputs_BS, targets_T = block_BS[:, :-1].clamp(min=0), block_BS[:, 1:].flatten()
    hidden = model(inputs_BS)
    valid_T = targets_T != IGNORE
    weight_VD = local(model.head.weight)
    vocabulary = ranks.vocabulary(len(weight_VD))
    nll_T, first_T = predict(weight_VD, hidden.stream_BSD.flatten(0, 1)[valid_T], targets_T[valid_T], vocabulary)
    shares_TLE = None
    if hidden.routings:
        experts = model.config.num_experts
        by_layer = [weight_shares(r.weights_TK[valid_T], r.indices_TK[valid_T], experts) for r in hidden.routings]
        shares_TLE = np.stack(by_layer, axis=1)
    rows, end = [], 0
    for window in members:
        tokens = slice(end, end + len(window.tokens) - 1)
        end = tokens.stop
        answer = bool(first_T[end - window.num_answer_tokens : end].all()) if window.num_answer_tokens else None
        counted, routed = window.counted, window.counted and shares_TLE is not None
        rows.append(
            WindowScore(
                window.document,
                nll_T[tokens] if counted else None,
                shares_TLE[tokens].sum(0) if routed and shares_TLE is not None else None,
                answer,
            )
        )
    return rows


def predict(
    weight_VD: torch.Tensor, hidden_TD: torch.Tensor, targets_T: torch.Tensor, vocabulary: Vocabulary
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Each target's negative log-likelihood, nats, and whether it is the first choice; a chunk's logits at a time."""
    nll, first = [], []
    for rows_TD, rows_T in zip(torch.split(hidden_TD, CHUNK_TOKENS), torch.split(targets_T, CHUNK_TOKENS), strict=True):
        if len(rows_T):
            logits_TV = F.linear(rows_TD, weight_VD).float()
            index_T, elsewhere_T = place(rows_T, len(weight_VD), vocabulary)
            picked_T = vocabulary.sum(logits_TV.gather(1, index_T[:, None])[:, 0].masked_fill(elsewhere_T, 0))
            nll.append((vocabulary.logsumexp(logits_TV.logsumexp(1)) - picked_T).double().cpu().numpy())
            first.append((vocabulary.argmax(logits_TV) == rows_T).cpu().numpy())
    return np.concatenate(nll or [np.empty(0)]), np.concatenate(first or [np.empty(0, bool)])


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
