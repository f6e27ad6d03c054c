"""`flexpert report`: one page about a pipeline's run, made of what its directory holds; or about several of them.

The page is a single file without scripts and without anything to fetch. The same run gives the same bytes. Every text
that comes from a file passes `html.escape`: owners choose titles and licences, and a page is no place for their markup.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from html import escape
from pathlib import Path

from flexpert.config.stages import ReportConfig
from flexpert.errors import UserError
from flexpert.monitor import findings
from flexpert.monitor.compare import Comparison
from flexpert.monitor.findings import BTM, MODEL, PUBLIC, MethodRow, below
from flexpert.monitor.page import DASH, count, duration, page, scroll, size_of, table
from flexpert.monitor.plots import (
    Bar,
    Matrix,
    bars_figure,
    domain_role,
    loss_figure,
    matrix_figure,
    summary_png,
    train_curve,
    valid_curve,
)
from flexpert.monitor.results import monitor_config, publish
from flexpert.monitor.run_directory import TRAINING_KINDS, RunDirectory, Training, in_order, read_run
from flexpert.monitor.wandb import wandb_mode


def run(config: ReportConfig, resolved: str) -> None:
    """Write `report.html`, and `report.png` beside it in the run directory where there is an evaluation to show.

    Several runs give one page, and nothing but that.

    Raises:
        UserError: a run directory holds no run, or the output cannot be written.
    """
    paths = [config.run] if config.run is not None else config.runs
    contents = [read_run(Path(path)) for path in paths]
    output = Path(config.output) if config.output is not None else contents[0].path / "report.html"
    if output.is_dir() or not output.parent.is_dir():
        raise UserError(f"output={output} cannot be written: give a file in a directory that exists")
    if config.runs:
        write_file(output, Comparison(contents).html().encode())
    else:
        write_report(contents[0], output, config.wandb)
    print(output)


def write_report(content: RunDirectory, output: Path, wandb: str | None) -> None:
    monitor = monitor_config(content, wandb)
    mode = wandb_mode(monitor)
    report, picture = Report(content), content.path / "report.png"
    if content.evaluation is not None:
        write_file(picture, report.picture())
    else:
        picture.unlink(missing_ok=True)  # it would show an evaluation that is no longer there
    write_file(output, report.html().encode())
    if mode != "off":
        publish(content, monitor, mode, report.routing_matrix(None) if content.evaluation is not None else None)


def write_file(path: Path, data: bytes) -> None:
    """Write through a temporary file: a reader sees the old content or the new."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


class Report:
    """The sections of a run's page."""

    def __init__(self, content: RunDirectory) -> None:
        self.run, self.evaluation = content, content.evaluation
        evaluated = list(self.evaluation["domains"]) if self.evaluation is not None else []
        experts = self.evaluation["methods"][MODEL]["experts"] if self.evaluation is not None else []
        names = {*evaluated, *experts, *content.owners, PUBLIC}
        owners = [*content.owners, *sorted(names - {*content.owners, PUBLIC})]
        self.roles = {name: domain_role(name, owners) for name in [PUBLIC, *owners]}
        self.rows = findings.method_rows(self.evaluation) if self.evaluation is not None else []
        self.private = findings.private_domains(self.evaluation) if self.evaluation is not None else []

    def html(self) -> str:
        sections: list[tuple[str, str, Callable[[], str]]] = [
            ("result", "What this run showed", self.result),
            ("methods", "Methods compared", self.methods),
            ("routing", "Which expert works on which text", self.routing),
            ("removal", "What removing an expert changes", self.removal),
            ("losses", "Training", self.losses),
            ("facts", "Facts", self.facts),
        ]
        return page(self.run.name, [(name, title, body()) for name, title, body in sections])

    def swatch(self, name: str) -> str:
        """A name of a domain or expert, with its colour."""
        role = self.roles.get(name, PUBLIC)
        return f'<span class="name"><i style="background:var(--{role})"></i>{escape(name)}</span>'

    def absent(self, what: str) -> str:
        return f'<p class="absent">Nothing to show: {what}.</p>'

    # Section 1

    def headline(self) -> str:
        if self.evaluation is not None:
            tuned = any(part.kind == "tuned" for part in self.run.trainings)
            return findings.headline(self.evaluation, tuned)
        done = sum(part.steps == part.planned_steps for part in self.run.trainings)
        stages = f"{findings.number(done)} training stage{'s are' if done != 1 else ' is'} finished"
        return f"This run has no evaluation yet: {stages}, and what the experts are worth is not known."

    def result(self) -> str:
        parts = [f'<p class="headline">{escape(self.headline())}</p>']
        if self.evaluation is not None and (better := findings.better_methods(self.evaluation)):
            parts.append(f"<p>{escape(better)}</p>")
        gates = findings.verdicts(self.evaluation, self.run.graph.get("gates") or {})
        if gates:
            held, unchecked = (sum(gate.holds is state for gate in gates) for state in (True, None))
            later = f", {unchecked} not checked" if unchecked else ""
            parts.append(f"<h3>{held} of {len(gates)} claims hold{later}</h3>")
            items = []
            for gate in gates:
                kind, mark, word = {
                    True: ("good", "✓", "holds"),
                    False: ("bad", "✗", "does not hold"),
                    None: ("open", "?", "not checked"),
                }[gate.holds]
                items.append(
                    f'<li class="{kind}"><b>{mark} {word}</b><span>{escape(gate.claim)}'
                    f"<small>{escape(gate.detail)}</small></span></li>"
                )
            parts.append(f'<ul class="gates">{"".join(items)}</ul>')
        else:
            parts.append('<p class="note">The pipeline sets no claims to check (<code>pipeline.gates</code>).</p>')
        if self.run.missing:
            items = [f"<li>{escape(name)}</li>" for name in self.run.missing]
            parts.append(f'<div class="missing"><h3>Missing from this run</h3><ul>{"".join(items)}</ul></div>')
        return "".join(parts)

    # Section 2

    def methods(self) -> str:
        if self.evaluation is None:
            return self.absent("evaluation/evaluation.json is missing")
        domains = list(self.evaluation["domains"])
        parts = [
            "<p>Bits that a method needs for each byte of held-out text: lower is better.</p>",
            self.method_bars(domains),
            "<h3>Bits per byte</h3>",
            self.bits_table(domains),
        ]
        if any(row.accuracy for row in self.rows):
            parts += ["<h3>Right answers</h3>", self.accuracy_table(domains)]
        notes = findings.shortcomings(self.evaluation)
        parts.append("<h3>Where Flexpert falls short</h3>")
        if notes:
            items = "".join(f"<li>{escape(note)}</li>" for note in notes)
            intro = "In brackets: the other’s bits per byte, Flexpert’s, and how much higher Flexpert’s is."
            parts.append(f'<p class="note">{intro}</p><ul>{items}</ul>')
        else:
            parts.append("<p>By these numbers, nowhere.</p>")
        seed = (self.run.pipeline or {}).get("seed")
        once = f"One run{'' if seed is None else f' with seed {seed}'}: no number here has an error bar."
        parts.append(f'<p class="note">{escape(once)}</p>')
        return "".join(parts)

    def bars(self, domains: list[str]) -> list[Bar]:
        """Mean bits per byte of each method that was measured on all of `domains`; the mixture stands out."""
        bars = []
        for row in self.rows:
            mean = row.mean(domains)
            if mean is not None and not row.key.startswith("active "):
                label = {"dense": "Own dense fine-tune", MODEL: "Flexpert"}.get(row.key, row.label)
                bars.append(Bar(label, mean, "accent" if row.key == MODEL else "bar"))
        return bars

    def method_bars(self, domains: list[str]) -> str:
        titles = {name: [name] for name in domains}
        if len(self.private) > 1:
            titles = {"private mean": self.private, **titles}
        figures = []
        for place, (title, members) in enumerate(titles.items()):
            bars = self.bars(members)
            label = escape("; ".join([title, *(f"{bar.label} {bar.value:.3f}" for bar in bars)]))
            head = self.swatch(title) if title in self.roles else escape(title)
            figures.append(f"<figure><h4>{head}</h4>{bars_figure(bars, f'bars{place}', label)}</figure>")
        return f'<div class="grid narrow">{"".join(figures)}</div>'

    def cost(self, row: MethodRow) -> str:
        """Parameters that work on one token."""
        shape = self.run.model
        assert self.evaluation is not None
        if shape is None:
            return DASH
        dense = replace(shape, num_experts=0, active_experts=1).num_params()
        if row.active_experts is not None:
            experts = len(self.evaluation["methods"][MODEL]["experts"])
            mixture = replace(shape, num_experts=experts, active_experts=row.active_experts)
            return count(mixture.num_active_params())
        return count(dense * (findings.num_ensemble_members(self.evaluation) if row.key == BTM else 1))

    def bits_table(self, domains: list[str]) -> str:
        has_private = 0 < len(self.private) < len(domains)
        groups = {**{name: [name] for name in domains}, "private mean": self.private, "mean": domains}
        if not has_private:
            del groups["private mean"]
        means = {title: [row.mean(members) for row in self.rows] for title, members in groups.items()}
        best = {}
        for title, column in means.items():
            fair = [v for v, row in zip(column, self.rows, strict=True) if v is not None and row.comparable]
            best[title] = min(fair, default=None)
        body = []
        for place, row in enumerate(self.rows):
            cells = []
            for title in groups:
                value, lowest = means[title][place], best[title]
                text = DASH if value is None else f"{value:.3f}"
                if value is not None and lowest is not None and row.comparable and not below(lowest, value):
                    text = f"<strong>{text}</strong>"
                cells.append(text)
            body.append((row.key, [escape(row.label), *cells, self.cost(row)]))
        head = ["", *(self.swatch(n) if n in self.roles else n for n in groups), "parameters per token"]
        note = "Bold: lowest of the column among methods that serve every domain at once."
        if not all(row.comparable for row in self.rows):
            note += (
                " The dense fine-tunes are not among them: each column is another owner’s model, used only on its own "
                "domain."
            )
        if has_private:
            note += " Private mean: over the domains that have an expert."
        return scroll(table(head, body, "methods")) + f'<p class="note">{note}</p>'

    def accuracy_table(self, domains: list[str]) -> str:
        shown = [name for name in domains if any(name in row.accuracy for row in self.rows)]
        fair = [row.accuracy for row in self.rows if row.comparable]
        best = {name: max((cells[name] for cells in fair if name in cells), default=0.0) for name in shown}
        body = []
        for row in (row for row in self.rows if row.accuracy):
            cells = []
            for name in shown:
                value = row.accuracy.get(name)
                text = DASH if value is None else f"{value:.1%}"
                cells.append(f"<strong>{text}</strong>" if row.comparable and value == best[name] > 0 else text)
            body.append((row.key, [escape(row.label), *cells]))
        note = "Share of held-out documents whose answer greedy decoding gives exactly, after the text before it."
        return scroll(table(["", *map(self.swatch, shown)], body, "answers")) + f'<p class="note">{note}</p>'

    # Sections 3 and 4

    def routing_matrix(self, layer: int | None) -> Matrix | None:
        """Share of each expert in each domain, in one layer or on average; None for a model without experts."""
        assert self.evaluation is not None
        model = self.evaluation["methods"][MODEL]
        routed = {name: part["routing"] for name, part in model["domains"].items() if "routing" in part}
        if not routed:
            return None
        shares = [part["share"] if layer is None else part["share_by_layer"][layer] for part in routed.values()]
        experts, values = model["experts"], [[row.get(name) for name in model["experts"]] for row in shares]
        return Matrix(list(routed), experts, values, self.roles, digits=2 if layer is None else None)

    def routing(self) -> str:
        if self.evaluation is None:
            return self.absent("evaluation/evaluation.json is missing")
        matrix = self.routing_matrix(None)
        if matrix is None:
            return self.absent("the evaluated model has no router")
        model = self.evaluation["methods"][MODEL]["domains"]
        layers = min(len(model[name]["routing"]["share_by_layer"]) for name in matrix.rows)
        figure = matrix_figure(matrix, "routing", "Share of each expert in each domain", (66, 34), 12)
        tops = []
        for name in matrix.rows:
            top = model[name]["routing"]["top_expert_of_documents"]
            first = max(top, key=lambda expert: top[expert])
            own = f"{top[name]:.0%}" if name in top else DASH
            tops.append((name, [self.swatch(name), own, f"{self.swatch(first)} {top[first]:.0%}"]))
        small = []
        for layer in range(layers):
            part = self.routing_matrix(layer)
            assert part is not None
            svg = matrix_figure(part, f"layer{layer}", f"Share of each expert, layer {layer}", (24, 18), 10)
            small.append(f"<figure><h4>layer {layer}</h4>{svg}</figure>")
        return (
            "<p>Share of the router’s weight that each expert (column) has on each domain’s held-out text (row), "
            "averaged over tokens and layers. Outlined: a domain’s own expert.</p>"
            f'<div class="pair">{scroll(figure)}'
            f"<div><h3>The expert with the largest share of a document</h3>"
            f"{scroll(table(['text', 'own expert', 'most often'], tops, 'tops'))}</div></div>"
            f'<h3>Layer by layer</h3><div class="maps">{"".join(small)}</div>'
        )

    def removal_matrix(self, digits: int) -> Matrix | None:
        assert self.evaluation is not None
        deltas = findings.removal_deltas(self.evaluation)
        if not deltas:
            return None
        domains = list(self.evaluation["domains"])
        values = [[row.get(name) for name in domains] for row in deltas.values()]
        return Matrix(list(deltas), domains, values, self.roles, digits=digits, signed=True)

    def removal(self) -> str:
        if self.evaluation is None:
            return self.absent("evaluation/evaluation.json is missing")
        matrix = self.removal_matrix(3)
        if matrix is None:
            return self.absent("no expert was left out (<code>evaluate leave_one_out=true</code>)")
        figure = matrix_figure(matrix, "removal", "Change of bits per byte by removal", (66, 34), 12)
        return (
            "<p>Change of bits per byte on each domain (column) when one expert (row) is removed from the model, with "
            "no training afterwards. Outlined: the removed expert’s own domain, where a loss is what removal is for. "
            f"Elsewhere the change should be near 0. Blue is worse, red is better.</p>{scroll(figure)}"
        )

    # Section 5

    def losses(self) -> str:
        if not self.run.trainings:
            were_sent = self.run.sent and self.run.owners == [*self.run.sent]
            return self.absent("the experts’ owners trained them" if were_sent else "no stage has a metrics.jsonl")
        figures = []
        for part in self.run.trainings:
            if part.kind == "dense" and self.run.training("expert", part.domain) is not None:
                continue  # drawn beside the expert
            role = self.roles.get(part.domain or PUBLIC, PUBLIC)
            dense = self.run.training("dense", part.domain) if part.kind == "expert" else None
            curves = [train_curve(part.rows, role), valid_curve(part.rows, "valid", role, width=2.2, dots=True)]
            if dense is not None:
                curves.append(valid_curve(dense.rows, "dense", "muted", width=1, dashed=True))
            drawn = [curve for curve in curves if curve is not None]
            if not drawn:
                continue
            title = self.stage_name(part)
            ends = ", ".join(f"{curve.label} {curve.losses[-1]:.3f}" for curve in drawn)
            figure = loss_figure(drawn, part.place, escape(f"Loss of {part.place}: {ends}"))
            figures.append(f"<figure><h4>{title}</h4>{figure}</figure>")
        has_dense = any(part.kind == "dense" for part in self.run.trainings)
        return (
            "<p>Loss in nats per token. Thin line and band: training, mean and range of the steps that each point "
            "stands for. Thick line: held-out text of the same domain."
            f"{' Dashed: the dense fine-tune on that text.' if has_dense else ''}</p>"
            f'<div class="grid">{"".join(figures)}</div>'
        )

    def stage_name(self, part: Training) -> str:
        words = TRAINING_KINDS[part.kind]
        return f"{self.swatch(part.domain)} {words}" if part.domain not in (None, PUBLIC) else words

    # Section 6

    def facts(self) -> str:
        return self.model_facts() + self.stage_facts() + self.data_facts() + self.expert_facts()

    def model_facts(self) -> str:
        shape = self.run.model
        if shape is None:
            return self.absent("assembled/config.json is missing, so the model’s size is not known")
        dense = replace(shape, num_experts=0, active_experts=1).num_params()
        return (
            f"<p>The assembled model has <b>{count(shape.num_params())}</b> parameters, of which "
            f"<b>{count(shape.num_active_params())}</b> work on each token ({shape.active_experts} of "
            f"{shape.num_experts} experts). The public model has {count(dense)}, one expert "
            f"{count(shape.num_ffn_params())}.</p>"
        )

    def stage_facts(self) -> str:
        body = []
        for part in self.run.trainings:
            last = part.rows[-1]
            steps = f"{part.steps:,}"
            if part.planned_steps not in (None, part.steps):
                steps += f" of {part.planned_steps:,}"
            skipped = f" ({int(last['skipped_steps'])} skipped)" if last["skipped_steps"] else ""
            loss = [DASH if (v := part.last(key)) is None else f"{v:.3f}" for key in ("loss", "valid_loss")]
            speed = count(last["tokens"] / part.seconds) if part.seconds else DASH
            cost = [count(last["tokens"]), duration(part.seconds), speed]
            body.append((part.place, [self.stage_name(part), steps + skipped, *cost, *loss]))
        if not body:
            return ""
        total = duration(sum(part.seconds for part in self.run.trainings))
        head = ["stage", "steps", "tokens", "time", "tokens per second", "last train loss", "last valid loss"]
        note = f'<p class="note">Time is that of the optimiser steps alone: {total} over all stages.</p>'
        return f"<h3>Training stages</h3>{scroll(table(head, body, 'stages'))}{note}"

    def data_facts(self) -> str:
        body = []
        for name, manifest in self.run.data.items():
            cells = [self.swatch(name), escape(str(manifest.get("license") or "not stated"))]
            for split in ("train", "valid"):
                part = manifest["splits"][split]
                documents, size = part["documents"], part["bytes"]  # null of token files that are used as they are
                cells += [
                    DASH if documents is None else f"{documents:,}",
                    count(part["tokens"]),
                    DASH if size is None else size_of(size),
                ]
            body.append((name, cells))
        if not body:
            return ""
        measures = [f"{split} {what}" for split in ("train", "held-out") for what in ("documents", "tokens", "text")]
        head = ["data", "licence", *measures]
        return f"<h3>Data</h3>{scroll(table(head, body, 'data'))}"

    def expert_facts(self) -> str:
        body = []
        entries = {entry["id"]: entry for entry in (self.run.assembly or {"experts": []})["experts"]}
        for name in in_order([*{**self.run.contributions, **entries}], list(entries)):
            record, entry = self.run.contributions.get(name), entries.get(name)
            known = record or entry or {}
            digest = record["digest"] if record is not None else known.get("contribution")
            state = "in the model" if entry is not None and entry["contribution"] == digest else "not in the model"
            if name == PUBLIC:
                digest, state = (self.run.assembly or {}).get("base_digest"), "base"
            licence = escape(str(known.get("license") or "not stated"))
            cells = [self.swatch(name), escape(str(known.get("title", name))), licence, state]
            body.append((name, [*cells, f"<code>{escape(str(digest or DASH))}</code>"]))
        if not body:
            return ""
        head = ["expert", "title", "licence", "state", "digest of the contribution"]
        return f"<h3>Experts</h3>{scroll(table(head, body, 'experts'))}"

    def picture(self) -> bytes:
        """report.png."""
        assert self.evaluation is not None
        domains = self.private or list(self.evaluation["domains"])
        unit = "mean of the private domains" if self.private else "mean of the domains"
        matrices = (self.routing_matrix(None), self.removal_matrix(2))
        routing, removal = (None if matrix is None else replace(matrix, label_length=11) for matrix in matrices)
        return summary_png(self.headline(), self.bars(domains), unit, routing, removal)
