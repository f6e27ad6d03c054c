"""The layouts of a job that fit a cluster, best first."""

import itertools
from dataclasses import dataclass

from flexpert.config.stages import PlanConfig
from flexpert.errors import UserError
from flexpert.parallel.layout import Layout, check_layout, problem
from flexpert.planning.cost import Cost, cost_of
from flexpert.planning.job import Job
from flexpert.planning.memory import Memory, memory_of

GIB = 1 << 30


@dataclass(frozen=True)
class Choice:
    """A layout of a job, and what it takes."""

    job: Job
    layout: Layout
    memory: Memory
    cost: Cost


def layouts_of(job: Job, config: PlanConfig) -> list[Layout]:
    """All layouts that the model can be held in and that `config.parallel` admits.

    Raises:
        UserError: there is none; the message is the one that training would give.
    """
    num_ranks, asked = config.nodes * config.cluster.gpus_per_node, config.parallel
    sizes = [size for size in range(1, num_ranks + 1) if num_ranks % size == 0]
    is_mixture = job.model.num_experts > 0  # what is asked of experts is not asked of a dense model

    def admitted(wanted: int | None) -> list[int]:
        return sizes if wanted is None else [wanted]

    numbers = itertools.product(
        admitted(asked.tensor),
        admitted(asked.expert) if is_mixture else [1],
        admitted(asked.expert_tensor) if is_mixture else [1],
        [False, True] if asked.sequence is None else [asked.sequence],
    )
    options = {
        Layout(num_ranks, tensor, expert, expert_tensor, sequence and tensor > 1): None
        for tensor, expert, expert_tensor, sequence in numbers
    }
    length = config.sequence_length
    layouts = [layout for layout in options if problem(layout, job.model, job.group_sizes, length) is None]
    if not layouts:
        check_layout(next(iter(options)), job.model, job.group_sizes, length)
    return layouts


def choices_of(job: Job, config: PlanConfig) -> list[Choice]:
    """Layouts that fit, the shortest step first, of equally short ones the one that needs least memory.

    Raises:
        UserError: none fits; the message says what would.
    """
    tokens = config.sequence_length * config.microbatch_sequences
    layouts = layouts_of(job, config)
    even = [layout for layout in layouts if config.batch_tokens % (tokens * layout.data) == 0]
    if not even:
        fewest = min(layout.data for layout in layouts)
        raise UserError(
            f"{job.stage}: the {config.batch_tokens // tokens} microbatches of a step do not divide among the data "
            f"ranks of any layout, of which there are {fewest} or more: change batch_tokens, nodes or parallel.tensor"
        )
    memories = {layout: memory_of(job, layout, tokens, config.loss_chunk_tokens, config.recompute) for layout in even}
    limit = (config.cluster.memory_gib - config.reserve_gib) * GIB
    fitting = [layout for layout in even if memories[layout].total <= limit]
    if not fitting:
        least = min(even, key=lambda layout: memories[layout].total)
        remedies = "more nodes" if config.recompute == "full" else "more nodes, recompute=full"
        raise UserError(
            f"{job.stage}: no layout fits {config.nodes} x {config.cluster.gpus_per_node} {config.cluster.name} of "
            f"{config.cluster.memory_gib:g} GiB, {config.reserve_gib:g} GiB of them reserved: the least is "
            f"{memories[least].total / GIB:.1f} GiB a GPU, with {least}; take {remedies} or shorter microbatches"
        )
    choices = [Choice(job, layout, memories[layout], cost_of(job, layout, config)) for layout in fitting]
    return sorted(choices, key=lambda choice: (choice.cost.seconds, choice.memory.total))
