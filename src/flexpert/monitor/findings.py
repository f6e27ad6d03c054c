"""What an evaluation shows, in sentences and rows: made from its numbers alone, whichever way they point."""

from dataclasses import dataclass
from typing import Any

from flexpert.errors import UserError
from flexpert.evaluation.gates import GATES, check_gates, expert_domains

MODEL, SOUP, BTM, PUBLIC = "model", "soup", "btm", "public"
#: Values that agree to this many digits count as equal: no more are shown.
DIGITS = 3


@dataclass(frozen=True)
class MethodRow:
    """One row of the method tables.

    Attributes:
        key: "public", "soup", "btm", "dense", "model" or "active k".
        label: for people.
        bits: domain → bits per byte, where it was measured.
        accuracy: domain → share of right answers, likewise.
        comparable: one deployment serves every domain. Not so the dense fine-tunes: each column is another model.
        active_experts: k of a mixture, None for anything else.
    """

    key: str
    label: str
    bits: dict[str, float]
    accuracy: dict[str, float]
    comparable: bool = True
    active_experts: int | None = None

    def mean(self, domains: list[str]) -> float | None:
        """Mean bits per byte over `domains`; None where one was not measured."""
        if not domains or any(name not in self.bits for name in domains):
            return None
        return sum(self.bits[name] for name in domains) / len(domains)


@dataclass(frozen=True)
class VerdictRow:
    """A gate as the report shows it; `holds` is None where it could not be checked, and `detail` says why."""

    claim: str
    holds: bool | None
    detail: str


def signed(value: float, digits: int = DIGITS) -> str:
    """A change, with a true minus sign; one that rounds to nothing has no sign."""
    text = f"{value:+.{digits}f}".replace("-", "−")
    return text if text.strip("+−0.") else text[1:]


def join(items: list[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def number(count: int) -> str:
    words = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    return words[count] if count < len(words) else str(count)


def below(value: float, other: float) -> bool:
    """Lower, as far as the shown digits tell."""
    return round(value, DIGITS) < round(other, DIGITS)


def private_domains(content: dict[str, Any]) -> list[str]:
    """The domains that an expert of the model was trained for."""
    return expert_domains(content)


def values(content: dict[str, Any], method: str, key: str) -> dict[str, float]:
    domains = content["methods"].get(method, {"domains": {}})["domains"]
    return {name: result[key] for name, result in domains.items() if key in result}


def method_rows(content: dict[str, Any]) -> list[MethodRow]:
    """Baselines, the dense fine-tunes as one row, the model, and the model at each number of active experts."""

    def row(key: str, label: str, active: int | None = None) -> MethodRow:
        bits, accuracy = values(content, key, "bits_per_byte"), values(content, key, "answer_accuracy")
        return MethodRow(key, label, bits, accuracy, active_experts=active)

    methods = content["methods"]
    labels = {PUBLIC: "Public model", SOUP: "Soup", BTM: "BTM"}
    rows = [row(key, label) for key, label in labels.items() if key in methods]
    own: dict[str, dict[str, float]] = {"bits_per_byte": {}, "answer_accuracy": {}}
    for domain in content["domains"]:
        for key, cells in own.items():
            if domain in (measured := values(content, f"dense {domain}", key)):
                cells[domain] = measured[domain]
    if own["bits_per_byte"]:
        label = "Dense fine-tune, own domain"
        rows.append(MethodRow("dense", label, own["bits_per_byte"], own["answer_accuracy"], comparable=False))
    experts = len(methods[MODEL]["experts"])
    active = methods[MODEL]["active_experts"]
    rows.append(row(MODEL, "Flexpert" if active is None else f"Flexpert, {active} of {experts} active", active))
    for key, method in methods.items():
        if key.startswith("active "):
            rows.append(row(key, f"Flexpert, {method['active_experts']} of {experts} active", method["active_experts"]))
    return rows


def num_ensemble_members(content: dict[str, Any]) -> int:
    """Models that BTM runs on every token: the public one and each fine-tune."""
    return sum(name == PUBLIC or name.startswith("dense ") for name in content["methods"])


def removal_deltas(content: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Removed expert → domain → change of bits per byte."""
    full = values(content, MODEL, "bits_per_byte")
    deltas = {}
    for method in content["methods"]:
        if method.startswith("without "):
            left = values(content, method, "bits_per_byte")
            deltas[method.removeprefix("without ")] = {name: left[name] - full[name] for name in full}
    return deltas


def spread(numbers: list[float]) -> str:
    low, high = signed(min(numbers)), signed(max(numbers))
    return low if low == high else f"{low} to {high}"


def headline(content: dict[str, Any], tuned: bool) -> str:
    """One sentence: what the mixture gained over the public model, and what removal does."""
    rows = {row.key: row for row in method_rows(content)}
    private = private_domains(content)
    domains = private or list(content["domains"])
    model, start = rows[MODEL], "with router tuning" if tuned else "with no joint training"
    after = model.mean(domains)
    assert after is not None, "the model is evaluated on every domain"
    count = len([name for name in content["methods"][MODEL]["experts"] if name != PUBLIC])
    plural, singular = ("", "s") if count == 1 else ("s", "")
    subject = f"{number(count).capitalize()} expert{plural} trained apart and assembled {start}"
    before = rows[PUBLIC].mean(domains) if PUBLIC in rows else None
    if before is None:
        verb = "reaches" if count == 1 else "reach"
        sentence = f"{subject} {verb} {after:.3f} bits per byte on held-out text; the public model was not evaluated"
    else:
        verb = "lower" if below(after, before) else "raise" if below(before, after) else "leave"
        better = sum(below(model.bits[name], rows[PUBLIC].bits[name]) for name in domains)
        where = "every one" if better == len(domains) else f"{better} of {len(domains)}"
        place = f"the owner{'’s domain' if count == 1 else 's’ domains'}" if private else "the domains"
        sentence = (
            f"{subject} {verb}{singular} held-out bits per byte on {place} from "
            f"{before:.3f} to {after:.3f} ({signed(100 * (after / before - 1), 1)}%)"
        )
        if len(domains) > 1:
            sentence += f", better than the public model on {where}"
    deltas = removal_deltas(content)
    own = [deltas[name][name] for name in deltas if name in deltas[name]]
    others = [delta for name, row in deltas.items() for domain, delta in row.items() if domain != name]
    if own and others:
        sentence += f"; taking one out changes its own domain by {spread(own)} and any other by {spread(others)}"
    return sentence + "."


def better_methods(content: dict[str, Any]) -> str:
    """One sentence that names every method with fewer bits per byte where `headline` looks; empty if there is none."""
    rows = method_rows(content)
    domains = private_domains(content) or list(content["domains"])
    own = next(row.mean(domains) for row in rows if row.key == MODEL)
    labels = {
        PUBLIC: "the public model",
        SOUP: "the soup",
        BTM: "BTM",
        "dense": "dense fine-tunes on their own domains",
    }
    means = {labels[row.key]: row.mean(domains) for row in rows if row.key in labels}
    lower = [f"{name} ({m:.3f})" for name, m in means.items() if m is not None and own is not None and below(m, own)]
    return f"Lower on the same text: {join(lower)}." if lower else ""


def verdicts(content: dict[str, Any] | None, thresholds: dict[str, float]) -> list[VerdictRow]:
    """Each gate of the pipeline, checked by itself, so that one without its numbers hides no other."""
    rows = []
    for name, threshold in thresholds.items():
        claim, _, above = GATES.get(name, (name, None, True))
        claim = claim[:1].upper() + claim[1:]
        limit = f"must be {'above' if above else 'below'} {threshold:g}"
        if content is None:
            rows.append(VerdictRow(claim, None, f"{limit}: nothing was evaluated"))
            continue
        if name in GATES and not private_domains(content):
            rows.append(VerdictRow(claim, None, f"{limit}: no domain has an expert of its own"))
            continue
        try:
            gate = check_gates(content, {name: threshold})[0]
        except UserError as error:
            rows.append(VerdictRow(claim, None, f"{limit}: {error}"))
            continue
        rows.append(VerdictRow(claim, gate.holds, f"worst: {gate.value:.4f} ({gate.where}), {limit}"))
    return rows


def shortcomings(content: dict[str, Any]) -> list[str]:
    """What does not speak for the mixture, one sentence each."""
    rows = {row.key: row for row in method_rows(content)}
    model, domains = rows.pop(MODEL), list(content["domains"])
    others = [row for row in rows.values() if not row.key.startswith("active ")]
    notes = [note for row in others if (note := lead_over(row, model, content))]
    own_mean = model.mean(domains)
    fewer = [(mean, row) for row in rows.values() if row not in others and (mean := row.mean(domains)) is not None]
    if fewer and own_mean is not None:
        mean, row = min(fewer, key=lambda pair: pair[0])
        if below(mean, own_mean):
            means = f"mean of all domains {mean:.3f} against {own_mean:.3f}"
            notes.append(f"With {row.active_experts} active the mixture is better: {means}.")
    deltas = removal_deltas(content)
    gains = [(d, name, domain) for name, row in deltas.items() for domain, d in row.items() if below(d, 0.0)]
    if gains:
        delta, name, domain = min(gains)
        cells = sum(len(row) for row in deltas.values())
        notes.append(
            f"In {len(gains)} of {cells} cells of the removal map a domain gains by losing an expert, most "
            f"{domain} without {name} ({signed(delta)})."
        )
    for domain, result in content["methods"][MODEL]["domains"].items():
        share = result.get("routing", {}).get("share", {})
        first = max(share, key=lambda name: share[name], default=domain)
        if domain in share and first != domain:
            notes.append(
                f"On {domain} the router prefers {first} ({share[first]:.0%}) to the domain’s own expert "
                f"({share[domain]:.0%})."
            )
    return notes


def lead_over(row: MethodRow, model: MethodRow, content: dict[str, Any]) -> str:
    """Where another method is better than the model; empty where it is not."""
    domains, members = list(content["domains"]), num_ensemble_members(content)
    subject = {
        PUBLIC: "The public model alone",
        SOUP: "The soup",
        BTM: f"BTM, which runs {number(members)} full models on every token,",
        "dense": "The owner’s own dense fine-tune, which serves nobody else,",
    }[row.key]
    clauses = []
    if lost := [name for name in row.bits if below(row.bits[name], model.bits[name])]:
        cells = []
        for name in lost:
            theirs, ours = row.bits[name], model.bits[name]
            cells.append(f"{name} ({theirs:.3f}, {ours:.3f}: {signed(100 * (ours / theirs - 1), 1)}%)")
        clauses.append(f"is better on {join(cells)}")
    if wrong := [name for name in row.accuracy if below(model.accuracy[name], row.accuracy[name])]:
        cells = [f"{name} ({row.accuracy[name]:.1%} against {model.accuracy[name]:.1%})" for name in wrong]
        clauses.append(f"gives more right answers on {join(cells)}")
    if not clauses:
        return ""
    mean, own_mean = row.mean(domains), model.mean(domains)
    if mean is not None and own_mean is not None:
        word = "better" if below(mean, own_mean) else "worse" if below(own_mean, mean) else "equal"
        size = f" by {abs(own_mean - mean):.3f}" if word != "equal" else ""
        clauses.append(f"is {word}{size} on the mean of all domains")
    return f"{subject} {join(clauses)}."
