"""How many ranks share what, and whether a model can be held so; without PyTorch, as `flexpert plan` asks, too."""

import itertools
import math
from dataclasses import dataclass

from flexpert.config.groups import ModelConfig
from flexpert.errors import UserError

#: Layouts that a message proposes.
NUM_PROPOSED = 3


@dataclass(frozen=True)
class Layout:
    """How many ranks share what.

    Attributes:
        num_ranks: processes.
        tensor: ranks that share attention heads, dense FFN width and vocabulary, on the same sequences.
        expert: ranks that share the experts.
        expert_tensor: ranks that share each expert's FFN width.
        sequence: ranks of a tensor group share the positions of the residual stream, too.
        replicas: copies of all parameters and optimiser state (hybrid sharding), each on as many consecutive ranks.
    """

    num_ranks: int
    tensor: int = 1
    expert: int = 1
    expert_tensor: int = 1
    sequence: bool = False
    replicas: int = 1

    @property
    def data(self) -> int:
        """Ranks with other sequences, which share the dense part's parameters and optimiser state, or hold copies."""
        return self.num_ranks // self.tensor

    @property
    def expert_data(self) -> int:
        """Ranks that share an expert's parameters and optimiser state, or hold copies."""
        return self.num_ranks // (self.expert * self.expert_tensor)

    def __str__(self) -> str:
        parts = {"tensor": self.tensor, "expert": self.expert, "expert_tensor": self.expert_tensor, "data": self.data}
        parts |= {"replicas": self.replicas} if self.replicas > 1 else {}
        words = [f"parallel.{name}={number}" for name, number in parts.items()]
        return " ".join([*words, f"parallel.sequence={str(self.sequence).lower()}"])


def problem(layout: Layout, model: ModelConfig, group_sizes: tuple[int, ...], sequence_length: int) -> str | None:
    """Why this model cannot be held so; None: it can."""
    tensor, etp, ep = layout.tensor, layout.expert_tensor, layout.expert
    if layout.num_ranks % tensor:
        return f"{layout.num_ranks} ranks do not divide by parallel.tensor={tensor}"
    if layout.num_ranks % (ep * etp):
        return f"{layout.num_ranks} ranks do not divide by parallel.expert={ep} x parallel.expert_tensor={etp}"
    for noun, number in (("data ranks", layout.data), ("data ranks of an expert", layout.expert_data)):
        if number % layout.replicas:
            return f"{number} {noun} do not divide by parallel.replicas={layout.replicas}"
    if tensor > 1 and not layout.sequence and model.num_experts and etp != tensor:
        return (
            "tensor ranks hold the same tokens without parallel.sequence=true: with it, or with "
            f"parallel.expert_tensor={tensor}, no expert gets a token twice"
        )
    if (ep > 1 or etp > 1) and not model.num_experts:
        return "a dense model has no experts to share"
    counts = {"attention heads": model.num_heads, "key/value heads": model.kv_heads, "rows of vocabulary": model.vocab}
    counts |= {"units of FFN width": model.intermediate_size} if not model.num_experts else {}
    for noun, count in counts.items():
        if count % tensor:
            return f"{count} {noun} do not divide by parallel.tensor={tensor}"
    if layout.sequence and sequence_length % tensor:
        return f"{sequence_length} positions do not divide by parallel.tensor={tensor}"
    if model.num_experts:
        ways = width_ways(layout, group_sizes)
        if model.intermediate_size % ways:
            return f"an expert's FFN width of {model.intermediate_size} does not divide by {ways} ranks"
        if ways == etp and any(size % ep for size in group_sizes):
            return f"{model.num_experts} experts do not divide by parallel.expert={ep}"
    return None


def for_inference(layout: Layout) -> Layout:
    """The layout for a forward pass alone, of windows of any length: the positions are whole, and the ranks of a tensor
    group share every expert's width."""
    ways = layout.expert * layout.expert_tensor
    expert = ways // layout.tensor if ways % layout.tensor == 0 else 1
    return Layout(layout.num_ranks, layout.tensor, expert, layout.tensor)


def width_ways(layout: Layout, group_sizes: tuple[int, ...]) -> int:
    """Ranks that share an expert's FFN width.

    An expert job holds its two experts apart, one frozen: sharing these out would leave ranks with frozen work only, so
    that the ranks of `expert` share the width of both instead.
    """
    return layout.expert_tensor * (layout.expert if len(group_sizes) > 1 else 1)


def check_layout(layout: Layout, model: ModelConfig, group_sizes: tuple[int, ...], sequence_length: int) -> None:
    """Raises `UserError` where the model cannot be held so; the message has the nearest layouts that would do."""
    fault = problem(layout, model, group_sizes, sequence_length)
    if fault is None:
        return
    sizes = [size for size in range(1, layout.num_ranks + 1) if layout.num_ranks % size == 0]
    shares = sizes if model.num_experts else [1]
    options = [
        Layout(layout.num_ranks, *numbers, sequence, layout.replicas if layout.num_ranks % layout.replicas == 0 else 1)
        for numbers in itertools.product(sizes, shares, shares)
        for sequence in ([False, True] if numbers[0] > 1 else [False])
    ]
    options = [option for option in options if problem(option, model, group_sizes, sequence_length) is None]
    options.sort(key=lambda option: distance(option, layout))
    advice = "; or ".join(map(str, options[:NUM_PROPOSED]))
    raise UserError(f"{fault}; what would do: {advice}")


def distance(a: Layout, b: Layout) -> float:
    """In doublings."""
    pairs = [(a.tensor, b.tensor), (a.expert, b.expert), (a.expert_tensor, b.expert_tensor)]
    return sum(abs(math.log2(x / y)) for x, y in pairs) + (a.sequence != b.sequence) / 2
