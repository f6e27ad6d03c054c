"""Which steps are not taken: those whose loss or gradient is not finite, or far above what it has been lately.

"Far" is a robust z-score: the distance to the median of the last steps, in units of a standard deviation that outliers
do not move, nor a loss that falls: 1.4826 / √2 times the median absolute difference between a step and the next.
"""

import math
from collections import deque
from itertools import pairwise
from statistics import median

#: Steps whose deviation counts, and of these the last ones, whose median does.
WINDOW, RECENT = 128, 16
#: Median absolute difference of two normally distributed values → their standard deviation.
TO_SIGMA = 1.4826 / math.sqrt(2)
#: Least standard deviations that are believed: of the loss in nats, and of the gradient norm's logarithm.
LEAST_SIGMA = {"loss": 0.1, "gradient norm": 0.25}
#: n values know their deviation poorly: it is taken (1 + FEW / n) times as large.
FEW = 4.0


class Guard:
    """Judges steps.

    Before there is a step, the loss is compared with that of guessing, ln V: no model that can be trained is far worse.

    Args:
        threshold: robust z-score above which a step is not taken; None: only what is not finite.
        vocab: V.
    """

    def __init__(self, threshold: float | None, vocab: int) -> None:
        self.threshold, self.guessing = threshold, math.log(vocab)
        self.history: dict[str, deque[float]] = {name: deque(maxlen=WINDOW) for name in LEAST_SIGMA}

    def objection(self, loss: float, grad_norm: float) -> str | None:
        """Why a step with this loss (nats a token) and norm is not to be taken; None: nothing speaks against it."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return "loss or gradient is not finite"
        values = {"loss": loss, "gradient norm": log_norm(grad_norm)}
        for name, value in values.items():
            far, usual = self.deviation(name, value)
            if self.threshold is not None and far > self.threshold:
                shown = (value, usual) if name == "loss" else (math.exp(value), math.exp(usual))
                above = f"{far:.3g} robust standard deviations above {shown[1]:.4g}"
                return f"{name} {shown[0]:.4g} is {above} (train.spike_threshold={self.threshold:g})"
        return None

    def accept(self, loss: float, grad_norm: float) -> None:
        """The step was taken, and counts from now on."""
        self.history["loss"].append(loss)
        self.history["gradient norm"].append(log_norm(grad_norm))

    def deviation(self, name: str, value: float) -> tuple[float, float]:
        """Robust z-score of a value, and the median that it is compared with."""
        seen = list(self.history[name])
        if not seen:
            if name != "loss":
                return 0.0, value
            seen = [self.guessing]
        middle = median(seen[-RECENT:])
        differences = [abs(after - before) for before, after in pairwise(seen)] or [0.0]
        sigma = max(TO_SIGMA * median(differences), LEAST_SIGMA[name])
        return (value - middle) / (sigma * (1 + FEW / len(seen))), middle

    def state(self) -> dict[str, list[float]]:
        """For a checkpoint, as JSON."""
        return {name: list(values) for name, values in self.history.items()}

    def restore(self, state: dict[str, list[float]]) -> None:
        for name, values in state.items():
            self.history[name].extend(values)


def log_norm(norm: float) -> float:
    return math.log(max(norm, 1e-30))
