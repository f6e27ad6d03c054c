"""Branch-Train-Merge: an ensemble of whole models, weighted by how well each has explained the text so far.

arXiv 2208.03306. The weight of model i at token t is `softmax(-L_i / τ)` over its negative log-likelihood L_i of the
tokens *before* t in the document (a uniform prior, updated by Bayes' rule where τ = 1): nothing of the token that is
scored enters its own weight. Probabilities are averaged, so the likelihood of the text needs only each model's
likelihood of its tokens.
"""

import numpy as np
from numpy.typing import NDArray


def btm_nll(models: list[list[NDArray[np.float64]]], temperature: float) -> list[NDArray[np.float64]]:
    """Negative log-likelihood per token of the ensemble.

    Args:
        models: for each model, per document the negative log-likelihood of each token, nats.
        temperature: τ.

    Returns: per document, nats per token.
    """
    result = []
    for parts in zip(*models, strict=True):
        nll = np.stack(parts)  # [models, tokens]
        evidence = np.cumsum(nll, axis=1) - nll
        log_weights = -evidence / temperature
        log_weights -= np.logaddexp.reduce(log_weights, axis=0)
        result.append(-np.logaddexp.reduce(log_weights - nll, axis=0))
    return result
