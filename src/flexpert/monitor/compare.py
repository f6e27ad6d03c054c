"""Several runs on one page: their methods side by side, their loss curves in one panel for each stage.

A letter and a colour stand for a run. What is not the same text is not compared in silence: the page says so.
"""

import itertools
from dataclasses import replace
from html import escape

from flexpert.monitor import findings
from flexpert.monitor.findings import MODEL, PUBLIC, MethodRow, below
from flexpert.monitor.page import DASH, count, page, scroll, table
from flexpert.monitor.plots import loss_figure, train_curve, valid_curve
from flexpert.monitor.run_directory import TRAINING_KINDS, RunDirectory, Training, in_order


class Comparison:
    """The sections of a page about several runs."""

    def __init__(self, runs: list[RunDirectory]) -> None:
        self.runs = {chr(ord("A") + place): run for place, run in enumerate(runs)}
        self.roles = {letter: f"d{place}" for place, letter in enumerate(self.runs)}
        self.evaluations = {letter: run.evaluation for letter, run in self.runs.items() if run.evaluation is not None}
        self.rows = {
            letter: {row.key: row for row in findings.method_rows(content)}
            for letter, content in self.evaluations.items()
        }

    def html(self) -> str:
        sections = [
            ("runs", "The runs", self.overview()),
            ("methods", "Methods compared", self.methods()),
            ("losses", "Training", self.losses()),
        ]
        name = ", ".join(f"{letter} {run.name}" for letter, run in self.runs.items())
        return page(name, sections, "Flexpert runs")

    def swatch(self, letter: str) -> str:
        return f'<span class="name"><i style="background:var(--{self.roles[letter]})"></i>{letter}</span>'

    def overview(self) -> str:
        body = []
        for letter, run in self.runs.items():
            gates = findings.verdicts(run.evaluation, run.graph.get("gates") or {})
            held = f"{sum(gate.holds is True for gate in gates)} of {len(gates)}" if gates else DASH
            seed = (run.pipeline or {}).get("seed")
            texts = [run.name, run.path.resolve().name, DASH if seed is None else str(seed)]
            size = DASH if run.model is None else count(run.model.num_params())
            body.append((letter, [self.swatch(letter), *map(escape, texts), size, held, str(len(run.missing))]))
        head = ["run", "name", "directory", "seed", "parameters", "claims that hold", "missing parts"]
        return scroll(table(head, body, "runs"))

    def methods(self) -> str:
        if not self.evaluations:
            return '<p class="absent">Nothing to show: none of the runs has evaluation/evaluation.json.</p>'
        domains = [list(content["domains"]) for content in self.evaluations.values()]
        private = [findings.private_domains(content) for content in self.evaluations.values()]
        everywhere, owned = in_all(domains), in_all(private)
        groups = {"mean": everywhere, **{name: [name] for names in domains for name in names}}
        if len(owned) > 1 and owned != everywhere:
            groups = {"private mean": owned, **groups}
        figures = []
        for place, (title, members) in enumerate(groups.items()):
            if members:
                cells = scroll(self.method_table(members, f"bits{place}"))
                figures.append(f"<figure><h4>{escape(title)}</h4>{cells}</figure>")
        notes = ["Bold: lowest of its row.", *self.differences(everywhere)]
        return (
            "<p>Bits that a method needs for each byte of held-out text, in each run: lower is better.</p>"
            f'<div class="maps">{"".join(figures)}</div><p class="note">{escape(" ".join(notes))}</p>'
        )

    def method_table(self, domains: list[str], name: str) -> str:
        """Rows: methods; columns: runs; cells: mean bits per byte over `domains`."""
        body = []
        for key, label in self.labels().items():
            means = [row.mean(domains) if (row := self.method(letter, key)) else None for letter in self.runs]
            known = [value for value in means if value is not None]
            if not known:
                continue
            stands_out = below(min(known), max(known))
            cells = [
                DASH if value is None
                else f"<strong>{value:.3f}</strong>" if stands_out and not below(min(known), value)
                else f"{value:.3f}"
                for value in means
            ]  # fmt: skip
            body.append((key, [escape(label), *cells]))
        return table(["", *map(self.swatch, self.runs)], body, name)

    def method(self, letter: str, key: str) -> MethodRow | None:
        return self.rows.get(letter, {}).get(key)

    def labels(self) -> dict[str, str]:
        """Method → its name, without the number of experts where runs have different ones."""
        labels: dict[str, str] = {}
        for rows in self.rows.values():
            for key, row in rows.items():
                if labels.setdefault(key, row.label) != row.label:
                    labels[key] = "Flexpert" if key == MODEL else f"Flexpert, {row.active_experts} active"
        return {key: labels[key] for key in in_order(list(labels), ["public", "soup", "btm", "dense", MODEL])}

    def differences(self, everywhere: list[str]) -> list[str]:
        """What keeps two numbers from being comparable, one sentence each."""
        notes = [f"{letter} was not evaluated." for letter in self.runs if letter not in self.evaluations]
        sizes = [content["domains"] for content in self.evaluations.values()]
        if partial := [name for name in dict.fromkeys(itertools.chain(*sizes)) if name not in everywhere]:
            notes.append(f"Not in every run: {findings.join(partial)}.")
        if other := [name for name in everywhere if any(size[name] != sizes[0][name] for size in sizes)]:
            notes.append(f"Not the same held-out text in every run: {findings.join(other)}.")
        return notes

    def losses(self) -> str:
        trained = {letter: {part.place: part for part in run.trainings} for letter, run in self.runs.items()}
        stages = {place: part for parts in trained.values() for place, part in parts.items()}
        if not stages:
            return '<p class="absent">Nothing to show: no stage has a metrics.jsonl.</p>'
        figures = []
        for kind in TRAINING_KINDS:
            for place, stage in stages.items():
                if stage.kind == kind:
                    parts = {letter: found[place] for letter, found in trained.items() if place in found}
                    figures.append(self.loss_panel(place, stage, parts))
        return (
            "<p>Loss in nats per token, of the runs that have the stage. Thin line: training, each point the mean of "
            "the steps that it stands for. Thick line: held-out text of the same domain.</p>"
            f'<div class="grid">{"".join(figures)}</div>'
        )

    def loss_panel(self, place: str, stage: Training, parts: dict[str, Training]) -> str:
        curves = []
        for letter, part in parts.items():
            role = self.roles[letter]
            if (train := train_curve(part.rows, role)) is not None:
                curves.append(replace(train, label=f"{letter} train", band=None))
            if (valid := valid_curve(part.rows, f"{letter} valid", role, width=2.2, dots=True)) is not None:
                curves.append(valid)
        if not curves:
            return ""
        ends = ", ".join(f"{curve.label} {curve.losses[-1]:.3f}" for curve in curves)
        figure = loss_figure(curves, place, escape(f"Loss of {place}: {ends}"), label_width=92)
        words = TRAINING_KINDS[stage.kind]
        title = words if stage.domain in (None, PUBLIC) else f"{stage.domain} {words}"
        return f"<figure><h4>{escape(title)}</h4>{figure}</figure>"


def in_all(lists: list[list[str]]) -> list[str]:
    """What every list holds, in the first one's order."""
    return [item for item in lists[0] if all(item in other for other in lists)]
