"""What a rank holds in memory, byte for byte where it is state, as an estimate where it comes and goes.

State is what `parallel/apply.py` allocates (ZeRO-3, arXiv 1910.02054, section 5): a trained parameter is a shard of
fp32, of its gradient, and of AdamW's two moments, 16 bytes together; a frozen one is a shard of bf16 alone.
Activations are counted tensor by tensor, as for Megatron-LM (arXiv 2205.05198, section 4), but of this model: its norms
keep their fp32 input, attention keeps no scores, and a mixture keeps what each expert was given.

Shapes: T tokens of a microbatch on a data rank, D residual width, K width of keys and values, F FFN width, E experts.
"""

import math
from dataclasses import dataclass

from flexpert.parallel.layout import Layout, width_ways
from flexpert.planning.job import Job, Weight

#: Bytes of an element: fp32, in which what is trained is held, and bf16, in which products are computed.
FULL, HALF = 4, 2


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest rank.

    Attributes:
        weights: its shards of the parameters.
        gradients: fp32, of its shards of the trained ones.
        optimizer: AdamW's two moments of these, in fp32.
        gathered: weights of whole blocks, which `fully_shard` puts together in bf16 and forgets again.
        activations: what the forward pass of one microbatch keeps for the backward pass.
        working: gradients on their way: of activations, and of gathered weights until they are reduced; logits.
    """

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    working: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.gathered + self.activations + self.working


def unsharded(weight: Weight, layout: Layout, group_sizes: tuple[int, ...]) -> tuple[tuple[int, ...], set[int]]:
    """The part of a parameter that data ranks share, and which of its dimensions were split to get it."""
    shape = list(weight.shape)
    if weight.unit.startswith("experts"):
        if layout.expert * layout.expert_tensor == 1:
            return weight.shape, set()
        ways = width_ways(layout, group_sizes)
        shape[2] //= ways
        if ways == layout.expert_tensor:
            shape[0] //= layout.expert
        return tuple(shape), {0, 2} if len(group_sizes) == 1 else {2}
    if weight.tensor_dim is None or layout.tensor == 1:
        return weight.shape, set()
    shape[weight.tensor_dim] //= layout.tensor
    return tuple(shape), {weight.tensor_dim}


def shard_elements(weight: Weight, layout: Layout, group_sizes: tuple[int, ...]) -> int:
    """Elements of the largest shard: `fully_shard` splits a dimension that divides and was not split, or else rows."""
    shape, taken = unsharded(weight, layout, group_sizes)
    ranks = layout.expert_data if weight.unit.startswith("experts") else layout.data
    if any(dim not in taken and size % ranks == 0 for dim, size in enumerate(shape)):
        return math.prod(shape) // ranks
    return -(-shape[0] // ranks) * math.prod(shape[1:])


def state_bytes(job: Job, layout: Layout) -> tuple[int, int, int]:
    """(weights, gradients, optimiser) of the fullest rank."""
    held = trained = 0
    for repeats, weights in ((job.model.num_layers, job.block()), (1, job.root())):
        for weight in weights:
            elements = repeats * shard_elements(weight, layout, job.group_sizes)
            held += elements * (FULL if weight.trained else HALF)
            trained += elements * weight.trained
    return held, FULL * trained, 2 * FULL * trained


def unit_bytes(job: Job, layout: Layout, only_trained: bool = False) -> dict[str, int]:
    """Bytes of each unit once its shards are gathered: in bf16, but for the router, which stays in its own type."""
    units: dict[str, int] = {}
    for weight in job.block() + job.root():
        if weight.trained or not only_trained:
            size = FULL if weight.unit == "router" and weight.trained else HALF
            elements = math.prod(unsharded(weight, layout, job.group_sizes)[0])
            units[weight.unit] = units.get(weight.unit, 0) + elements * size
    return units


def gathered_bytes(job: Job, layout: Layout) -> int:
    """The root, which stays gathered from forward to backward; a block; and the next unit, with its message buffer.

    One process alone shards nothing, and autocast keeps a bf16 copy of all that is trained.
    """
    if layout.num_ranks == 1:
        return HALF * job.num_trained()
    units = unit_bytes(job, layout)
    root = units.pop("root")
    return root + sum(units.values()) + 2 * max(units.values())


def stream_tokens(layout: Layout, tokens: int) -> int:
    """Tokens whose residual stream a rank has."""
    return tokens // layout.tensor if layout.sequence else tokens


def expert_rows(job: Job, layout: Layout, tokens: int) -> int:
    """Rows that the experts of a rank get, each of which all of them compute, or, where k < E, one of them.

    Where tokens are routed this is their mean, as if experts were chosen equally often.
    """
    same_tokens = layout.tensor > 1 and not layout.sequence
    rows = stream_tokens(layout, tokens) * (1 if same_tokens else layout.expert_tensor)
    return rows * (layout.expert if job.all_active else job.model.active_experts)


def block_activations(job: Job, layout: Layout, tokens: int, has_gradient: bool, fused_norms: bool) -> int:
    """Bytes that a block keeps.

    Args:
        has_gradient: of its input.
        fused_norms: RMSNorm is one kernel, as on CUDA. On a CPU PyTorch composes it, and one that is trained keeps what
            it normed beside its input.
    """
    model, tensor = job.model, layout.tensor
    D, F, K = model.hidden_size, model.intermediate_size, model.kv_heads * model.head_dim
    T, stream = tokens, stream_tokens(layout, tokens)
    norm = FULL * stream * D * (2 if job.trains_trunk and not fused_norms else 1)
    kept = norm
    if has_gradient:
        kept += HALF * T * D * job.trains_trunk  # the input of the projections, of all ranks of tensor
        # A norm over heads that ranks share is composed, too.
        copies = 2 if job.trains_trunk and (tensor > 1 or not fused_norms) else 1
        kept += copies * FULL * T * (D + K) // tensor
        kept += (
            HALF * T * (2 * D + 2 * K) // tensor + FULL * T * model.num_heads // tensor
        )  # attention, log-normalisers
        kept += norm
    if not model.num_experts:
        return kept + HALF * (T * D + 4 * T * F // tensor)  # gate, silu(gate), up, and their product
    return kept + expert_activations(job, layout, tokens, has_gradient)


def expert_activations(job: Job, layout: Layout, tokens: int, has_gradient: bool) -> int:
    """Bytes that router and experts of a block keep."""
    model, stream, rows = job.model, stream_tokens(layout, tokens), expert_rows(job, layout, tokens)
    D, width = model.hidden_size, model.intermediate_size // width_ways(layout, job.group_sizes)
    kept = FULL * stream * (D + 3 * model.num_experts)  # the router's own fp32 input, and its probabilities
    trained = any(job.trains_experts)
    if not job.all_active:
        # Gate and up, and where each row is; the input for the gradient of weights.
        if layout.expert == 1:
            return kept + HALF * (rows // model.active_experts * D * trained + rows * 2 * width) + rows * 2 * 8
        # What comes back is kept to be weighted.
        through = has_gradient or trained
        return kept + HALF * rows * (D + through * 2 * width + trained * D) + rows * (2 + 2 * through) * 8
    kept += HALF * rows * D * trained
    ways = layout.expert if len(job.group_sizes) == 1 else 1
    return kept + HALF * rows * 2 * width * sum(job.group_sizes) // ways


def activation_bytes(job: Job, layout: Layout, tokens: int, recompute: str = "none", fused_norms: bool = True) -> int:
    """Bytes of one microbatch of `tokens` tokens; with `recompute="full"`, blocks' inputs and one block at a time."""
    layers, stream = job.model.num_layers, stream_tokens(layout, tokens)
    D = job.model.hidden_size
    first = block_activations(job, layout, tokens, job.trains_trunk, fused_norms)
    other = block_activations(job, layout, tokens, True, fused_norms)
    blocks = first + (layers - 1) * other if recompute == "none" else layers * HALF * stream * D + max(first, other)
    # Targets and ids, the input of the last norm, and that of the head, which all ranks of tensor have whole.
    norms = 2 if job.trains_trunk and not fused_norms else 1
    return blocks + 2 * 8 * tokens + norms * FULL * stream * D + HALF * tokens * D


def working_bytes(job: Job, layout: Layout, tokens: int, loss_chunk_tokens: int) -> int:
    """The larger of what the loss and what a block's backward pass need for a moment."""
    model = job.model
    D, rows = model.hidden_size, tokens
    vocab, width = model.vocab // layout.tensor, model.intermediate_size // layout.tensor
    if model.num_experts:
        rows, width = expert_rows(job, layout, tokens), model.intermediate_size // width_ways(layout, job.group_sizes)
    # Logits in bf16 and fp32, and their gradient in bf16; the head's gradient, summed in fp32.
    head = (HALF + FULL) * vocab * D * job.trains_trunk
    loss = min(loss_chunk_tokens, tokens) * vocab * (2 * HALF + FULL) + head
    trained = [size for unit, size in unit_bytes(job, layout, only_trained=True).items() if unit != "root"]
    # A unit's gradients in bf16 and, for the sum over ranks, in fp32; those of gate, up and product; of two norms.
    block = 3 * max(trained) + 3 * HALF * rows * width + 2 * FULL * tokens * D
    return max(loss, block + HALF * vocab * D * job.trains_trunk)


def memory_of(job: Job, layout: Layout, tokens: int, loss_chunk_tokens: int, recompute: str) -> Memory:
    """Memory of a job whose data ranks have `tokens` tokens in a microbatch."""
    return Memory(
        *state_bytes(job, layout),
        gathered=gathered_bytes(job, layout),
        activations=activation_bytes(job, layout, tokens, recompute),
        working=working_bytes(job, layout, tokens, loss_chunk_tokens),
    )
