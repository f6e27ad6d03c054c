"""`flexpert plan`: what each stage up to a model takes on a cluster, before a node is booked."""

import sys
from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from flexpert.config.groups import ModelConfig
from flexpert.config.stages import PlanConfig
from flexpert.errors import UserError
from flexpert.planning.goodput import HOURS_BETWEEN_FAILURES, checkpoint_bytes, saving_of
from flexpert.planning.job import Job, jobs_of
from flexpert.planning.memory import HALF
from flexpert.planning.search import GIB, Choice, choices_of


def run(config: PlanConfig, resolved: str) -> None:
    """Print a table for each question.

    Raises:
        UserError: a stage fits in no layout; the vocabulary, which nothing can be counted without, is not given.
    """
    if config.model.vocab_size is None:
        raise UserError("plan needs model.vocab_size=…: there is no tokenizer to ask")
    choices = [choices_of(job, config) for job in jobs_of(config)]
    best = [fitting[0] for fitting in choices]
    # Where there is no terminal, rich takes 80 columns and breaks what is wider.
    console = Console(width=None if sys.stdout.isatty() else 1000, highlight=False)
    model, cluster = config.model, config.cluster
    console.print(
        f"{billions(model.num_params())} parameters, {billions(model.num_active_params())} active; "
        f"{config.nodes} x {cluster.gpus_per_node} {cluster.name} for each run\n"
    )
    tables = [
        booking_table(best, config),
        memory_table(best, config),
        step_table(best, config),
        layout_table(choices, config),
        file_table(best, config),
    ]
    for table in tables:
        console.print(table)
    console.print(checkpoint_line(best, config) + "\n")
    console.print(
        f"Assumed, and measured by no run on such a cluster: GPUs compute at {config.mfu:.0%} of their peak (mfu), and "
        f"links carry {config.link_share:.0%} of their rate (link_share). Times are without evaluation, checkpoints, "
        "restarts and waiting for data."
    )


def billions(number: float) -> str:
    return f"{number / 1e9:,.2f}B" if number >= 1e8 else f"{number / 1e6:,.2f}M"


def seconds(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def days(choice: Choice, config: PlanConfig) -> float:
    return choice.cost.seconds * num_steps(choice.job, config) / 86400


def num_steps(job: Job, config: PlanConfig) -> int:
    return -(-job.tokens // config.batch_tokens)


def table_of(
    title: str, columns: Iterable[str], rows: Iterable[Iterable[str]], total: list[str] | None = None
) -> Table:
    """The first column is of words, the others of numbers; `total` stands under a line."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    if total is not None:
        table.add_section()
        table.add_row(*total)
    return table


def booking_table(best: list[Choice], config: PlanConfig) -> Table:
    """Time and node-hours of every stage, each in its best layout."""
    rows, sum_days, sum_hours = [], 0.0, 0.0
    for choice in best:
        job, each = choice.job, days(choice, config)
        hours = each * 24 * config.nodes * job.count
        sum_days, sum_hours = sum_days + each, sum_hours + hours
        sizes = (job.model.num_params(), job.model.num_active_params(), job.num_trained(), job.tokens)
        rows.append([
            job.stage, f"{job.count}", *map(billions, sizes), f"{num_steps(job, config):,}",
            seconds(choice.cost.seconds), f"{each:,.2f}", f"{hours / job.count:,.0f}", f"{hours:,.0f}",
        ])  # fmt: skip
    columns = ("stage", "runs", "parameters", "active", "trained", "tokens of a run", "steps", "s a step",
               "days of a run", "node-hours of a run", "node-hours in all")  # fmt: skip
    total = ["all, experts at once", "", "", "", "", "", "", "", f"{sum_days:,.2f}", "", f"{sum_hours:,.0f}"]
    return table_of("what to book", columns, rows, total if len(best) > 1 else None)


def memory_table(best: list[Choice], config: PlanConfig) -> Table:
    """Memory of the fullest GPU."""
    rows = []
    for choice in best:
        memory = choice.memory
        parts = (memory.weights, memory.gradients, memory.optimizer, memory.gathered, memory.activations,
                 memory.working, memory.total)  # fmt: skip
        rows.append([choice.job.stage, *(f"{part / GIB:.2f}" for part in parts)])
    limit = config.cluster.memory_gib - config.reserve_gib
    columns = ("stage", "weights", "gradients", "optimiser", "gathered blocks", "activations", "working", "total")
    return table_of(f"GiB on a GPU, of {limit:.1f} that may be used", columns, rows)


def step_table(best: list[Choice], config: PlanConfig) -> Table:
    """What a step computes and sends, and where its time goes."""
    rows = []
    for choice in best:
        cost = choice.cost
        peak = choice.layout.num_ranks * config.cluster.peak_flops
        sent = (cost.tensor_bytes, cost.expert_bytes, cost.data_bytes)
        rows.append([
            choice.job.stage, f"{cost.flops / 1e15:,.1f}", *(f"{part / 1e9:,.2f}" for part in sent),
            seconds(cost.compute_seconds), seconds(cost.waiting_seconds),
            f"{config.batch_tokens / cost.seconds:,.0f}", f"{cost.flops / cost.seconds / peak:.1%}",
        ])  # fmt: skip
    columns = ("stage", "PFLOP", "GB sent, tensor", "GB sent, expert", "GB sent, data", "s of computing",
               "s of waiting", "tokens/s", "projected MFU")  # fmt: skip
    return table_of(f"a step of {config.batch_tokens:,} tokens; bytes that each GPU sends", columns, rows)


def layout_table(choices: list[list[Choice]], config: PlanConfig) -> Table:
    rows = []
    for fitting in choices:
        for choice in fitting[: config.layouts]:
            layout = choice.layout
            numbers = (layout.tensor, layout.expert, layout.expert_tensor, layout.data)
            rows.append([
                choice.job.stage, *map(str, numbers), str(layout.sequence).lower(), f"{choice.memory.total / GIB:.1f}",
                seconds(choice.cost.seconds), f"{days(choice, config):,.2f}",
            ])  # fmt: skip
    columns = ("stage", "parallel.tensor", ".expert", ".expert_tensor", ".data", ".sequence", "GiB a GPU", "s a step",
               "days")  # fmt: skip
    found = ", ".join(f"{len(fitting)} of {fitting[0].job.stage}" for fitting in choices)
    return table_of(f"layouts that fit ({found}), best first", columns, rows)


def checkpoint_line(best: list[Choice], config: PlanConfig) -> str:
    """How often each stage is best saved, and the share of its time that then trains."""
    parts = []
    for choice in best:
        saving = saving_of(choice, config)
        interval = saving.best_interval()
        parts.append(
            f"{interval} of {choice.job.stage} ({seconds(interval * saving.step)} s, {saving.goodput(interval):.1%})"
        )
    return (
        f"checkpoint.interval that loses least where a run fails every {HOURS_BETWEEN_FAILURES:g} h (seconds of "
        f"training, share of the time that trains): {', '.join(parts)}"
    )


def model_bytes(model: ModelConfig) -> int:
    """The weights of a model directory, in bf16."""
    return HALF * model.num_params()


def contribution_bytes(model: ModelConfig) -> int:
    """The weights of a contribution, in bf16: an FFN and its router rows."""
    return HALF * (model.num_ffn_params() + model.num_router_params() // model.num_experts)


def file_table(best: list[Choice], config: PlanConfig) -> Table:
    """What is read and written, and how long the file system takes to write it."""
    files = []
    for choice in best:
        files.append((f"checkpoint of {choice.job.stage}", 0, checkpoint_bytes(choice.job)))
        if choice.job.stage == "pretrain":
            files.append(("public model", 0, model_bytes(choice.job.model)))
        if choice.job.stage == "expert":
            files.append(("contribution", 0, contribution_bytes(config.model)))
    if config.stage == "all" and config.model.num_experts > 1:
        others = (config.model.num_experts - 1) * contribution_bytes(config.model)
        files.append(("assembly", model_bytes(best[0].job.model) + others, model_bytes(config.model)))
        files.append(("tuned model", model_bytes(config.model), model_bytes(config.model)))
    rows = [
        [name, f"{read / 1e9:,.2f}" if read else "", f"{written / 1e9:,.2f}",
         seconds(written / config.cluster.write_gbs / 1e9)]
        for name, read, written in files
    ]  # fmt: skip
    return table_of(
        f"files; a file system that takes {config.cluster.write_gbs:g} GB/s from all nodes together",
        ("", "GB read", "GB written", "s to write"),
        rows,
    )
