"""Claims that an evaluation must bear out, each with its threshold: what a pipeline's `gates` are checked by."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flexpert.errors import UserError


@dataclass(frozen=True)
class Gate:
    """Attributes: name; claim in words; the worst value seen and where; threshold; whether the claim holds."""

    name: str
    claim: str
    value: float
    where: str
    threshold: float
    holds: bool


def bits(content: dict[str, Any], method: str, domain: str) -> float:
    return float(content["methods"][method]["domains"][domain]["bits_per_byte"])


def mean_bits(content: dict[str, Any], method: str) -> float:
    return sum(bits(content, method, domain) for domain in content["domains"]) / len(content["domains"])


def expert_domains(content: dict[str, Any]) -> list[str]:
    """Domains that have an expert of the same name."""
    return [name for name in content["methods"]["model"]["experts"] if name in content["domains"] and name != "public"]


def gain_over_public(content: dict[str, Any]) -> dict[str, float]:
    return {name: bits(content, "public", name) - bits(content, "model", name) for name in expert_domains(content)}


def gain_over_soup(content: dict[str, Any]) -> dict[str, float]:
    return {"mean": mean_bits(content, "soup") - mean_bits(content, "model")}


def removal_on_own(content: dict[str, Any]) -> dict[str, float]:
    names = expert_domains(content)
    return {name: bits(content, f"without {name}", name) - bits(content, "model", name) for name in names}


def removal_on_others(content: dict[str, Any]) -> dict[str, float]:
    return {
        f"{domain} without {name}": bits(content, f"without {name}", domain) - bits(content, "model", domain)
        for name in expert_domains(content)
        for domain in content["domains"]
        if domain != name
    }


def right_expert_on_top(content: dict[str, Any]) -> dict[str, float]:
    domains = content["methods"]["model"]["domains"]
    return {name: domains[name]["routing"]["top_expert_of_documents"][name] for name in expert_domains(content)}


#: Name → (claim, values by place, whether each value must lie above the threshold or below it).
GATES: dict[str, tuple[str, Callable[[dict[str, Any]], dict[str, float]], bool]] = {
    "gain_over_public": ("bits per byte below the public model's on every private domain", gain_over_public, True),
    "gain_over_soup": ("mean bits per byte below the soup's", gain_over_soup, True),
    "removal_on_own": ("bits per byte that a domain loses with its own expert", removal_on_own, True),
    "removal_on_others": ("bits per byte that a domain loses with another's expert", removal_on_others, False),
    "right_expert_on_top": ("documents whose own expert has the largest share", right_expert_on_top, True),
}


def check_gates(content: dict[str, Any], thresholds: dict[str, float]) -> list[Gate]:
    """Check the gates named in `thresholds` on the content of evaluation.json.

    A value that is not finite bears out no claim, and is worse than any other.

    Raises:
        UserError: an unknown gate, or one whose methods were not evaluated.
    """
    gates = []
    for name, threshold in thresholds.items():
        if name not in GATES:
            raise UserError(f"pipeline.gates.{name} is not one of {', '.join(GATES)}")
        claim, measure, above = GATES[name]
        try:
            values = measure(content)
        except KeyError as error:
            raise UserError(f"gate {name} needs '{error.args[0]}', which was not evaluated") from None
        if not values:
            raise UserError(f"gate {name} has nothing to check: no expert has a data set of its name")
        # NaN compares false with everything, so `min` would find it or not, as it happens to stand.
        failures = [item for item in values.items() if not math.isfinite(item[1])]
        where, value = failures[0] if failures else (min if above else max)(values.items(), key=lambda item: item[1])
        holds = not failures and (value > threshold if above else value < threshold)
        gates.append(Gate(name, claim, value, where, threshold, holds))
    return gates
