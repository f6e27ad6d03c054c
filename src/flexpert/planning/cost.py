"""What a step moves and how long it takes: operations, bytes between GPUs, seconds. A projection, with its assumptions.

Bytes are what each GPU sends. In a ring (or a better algorithm) of n ranks, gathering parts to N bytes, or summing and
scattering N bytes, sends N (n - 1) / n; an all-reduce is both (Patarasuk and Yuan 2009, section 3; what NCCL calls bus
bandwidth). All-to-all sends the same share of what a rank has.

Sharded data parallelism gathers weights for the forward and for the backward pass and scatters gradients, of every
microbatch, beside the computing, so that only what takes longer than that costs time. Everything else is waited for, as
the layers in `parallel/` do. Latencies, the optimiser's own time and unequally chosen experts are not in it.

Shapes: D residual width, L blocks.
"""

from dataclasses import dataclass

from flexpert.config.stages import ClusterConfig, PlanConfig
from flexpert.parallel.layout import Layout
from flexpert.planning.job import Job
from flexpert.planning.memory import FULL, HALF, expert_rows, unit_bytes


def ring(num_bytes: float, num_ranks: int) -> float:
    """Bytes that each rank sends to gather, or to sum and scatter, `num_bytes`."""
    return num_bytes * (num_ranks - 1) / num_ranks


def link_rate(cluster: ClusterConfig, num_ranks: int, stride: int) -> float:
    """Bytes a second that each rank of a group sends whose ranks are `stride` apart.

    A group within a node has the links between its GPUs. One that spans nodes enters each of them as often as it has
    GPUs there, each with its own way out.
    """
    inside = cluster.intra_node_gbs * 1e9
    if num_ranks * stride <= cluster.gpus_per_node:
        return inside
    members = max(1, cluster.gpus_per_node // stride)
    return min(inside, members * cluster.inter_node_gbs * 1e9)


@dataclass(frozen=True)
class Cost:
    """Of one step.

    Attributes:
        flops: model operations of all GPUs; what is computed a second time does not count.
        tensor_bytes, expert_bytes, data_bytes: sent by each GPU, over the ranks that share a layer, experts, or state.
        compute_seconds: of products, at the assumed share of the peak.
        waiting_seconds: of communication that nothing is computed beside.
    """

    flops: int
    tensor_bytes: float
    expert_bytes: float
    data_bytes: float
    compute_seconds: float
    waiting_seconds: float

    @property
    def seconds(self) -> float:
        return self.compute_seconds + self.waiting_seconds


def tensor_bytes(job: Job, layout: Layout, tokens: int, passes: int) -> float:
    """Each attention, dense FFN and the embedding and head as one: in and out, forward and backward."""
    regions = job.model.num_layers * (1 if job.model.num_experts else 2)
    whole = HALF * tokens * job.model.hidden_size
    # In and out are a gathering and a scattering each way; without sequence parallelism, an all-reduce each way.
    return ring(whole, layout.tensor) * 2 * (regions * passes + 2)


def expert_bytes(job: Job, layout: Layout, tokens: int, passes: int) -> tuple[float, float]:
    """Bytes among ranks that share experts' width, and among those that share experts."""
    if not job.model.num_experts:
        return 0.0, 0.0
    row, layers = HALF * job.model.hidden_size, job.model.num_layers
    rows = expert_rows(job, layout, tokens)
    entered = rows // (layout.expert if job.all_active else job.model.active_experts)  # rows of the width's ranks
    width = ring(row * entered, layout.expert_tensor)
    # All tokens gathered and sums scattered; or each token's rows sent there and back.
    experts = ring(row * rows, layout.expert)
    return 2 * layers * passes * width, 2 * layers * passes * experts


def data_bytes(job: Job, layout: Layout, num_microbatches: int) -> tuple[float, float]:
    """Bytes of a step among data ranks: of the dense part, and of experts. The root is gathered once a microbatch."""
    weights, trained = unit_bytes(job, layout), unit_bytes(job, layout, only_trained=True)
    dense = experts = 0.0
    for unit, gathered in weights.items():
        repeats, gatherings = (1, 1) if unit == "root" else (job.model.num_layers, 2)
        # Gradients are summed in fp32, twice the bytes of what was gathered in bf16; a trained router's is fp32 itself.
        summed = trained.get(unit, 0) * (1 if unit == "router" else FULL // HALF)
        sent = repeats * (gatherings * gathered + summed) * num_microbatches
        if unit.startswith("experts"):
            experts += ring(sent, layout.expert_data)
        else:
            dense += ring(sent, layout.data)
    return dense, experts


def cost_of(job: Job, layout: Layout, config: PlanConfig) -> Cost:
    """A step of `config.batch_tokens` tokens; the data ranks of the layout must share its microbatches evenly."""
    cluster, again = config.cluster, config.recompute == "full"
    tokens = config.sequence_length * config.microbatch_sequences
    num_microbatches = config.batch_tokens // (tokens * layout.data)
    forward, backward = job.flops_per_token(config.sequence_length)
    flops = config.batch_tokens * (forward + backward)
    computed = config.batch_tokens * (forward * (2 if again else 1) + backward)
    compute = computed / (layout.num_ranks * cluster.peak_flops * config.mfu)

    passes = 3 if again else 2
    tensor = num_microbatches * tensor_bytes(job, layout, tokens, passes)
    width, experts = (num_microbatches * sent for sent in expert_bytes(job, layout, tokens, passes))
    dense_data, expert_data = data_bytes(job, layout, num_microbatches)
    shared = layout.expert * layout.expert_tensor

    def seconds(sent: float, num_ranks: int, stride: int) -> float:
        return sent / (link_rate(cluster, num_ranks, stride) * config.link_share)

    waited = seconds(tensor, layout.tensor, 1) + seconds(width, layout.expert_tensor, 1)
    waited += seconds(experts, layout.expert, layout.expert_tensor)
    beside = seconds(dense_data, layout.data, layout.tensor) + seconds(expert_data, layout.expert_data, shared)
    return Cost(
        flops=flops,
        tensor_bytes=tensor,
        expert_bytes=width + experts,
        data_bytes=dense_data + expert_data,
        compute_seconds=compute,
        waiting_seconds=waited + max(0.0, beside - compute),
    )
