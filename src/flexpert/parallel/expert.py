"""Expert parallelism: ranks share the experts (`ep`), and the FFN width of each (`etp`).

Where all experts are active there is nothing to route. Tokens are gathered, each rank computes what its experts, or its
part of their width, add to every one of them, and sums are scattered back. Where k < E, each token's rows go to the
ranks that have its experts, by all-to-all, and come back; none is dropped.

Shapes: T tokens, D residual width, E experts, K active experts, N = T·K pairs of a token and an expert of its.
"""

from typing import Any, NamedTuple

import torch
from flexpert_kernels import combine, sort_by_expert, spread
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

from flexpert.model.moe import ExpertGroup, MixtureOfExperts, held
from flexpert.model.router import Routing
from flexpert.model.transformer import Transformer
from flexpert.parallel.collectives import (
    Way,
    copy_to,
    finish_exchange,
    gather_to,
    reduce_from,
    scatter_from,
    start_exchange,
)
from flexpert.parallel.tensor import distribute, local


class ExpertAxes(NamedTuple):
    """The ranks that share experts, and those that share an expert's width.

    Attributes:
        mesh: with the axes ep and etp.
        same_tokens: those of the two whose ranks have the same tokens: etp with tensor parallelism and no sequence
            parallelism; both where all ranks continue one prompt.
    """

    mesh: DeviceMesh
    same_tokens: tuple[str, ...] = ()

    @property
    def experts(self) -> ProcessGroup:
        return self.mesh.get_group("ep")

    def enter(self, x: Tensor, axis: str) -> Tensor:
        """Rows of all ranks of an axis."""
        group = self.mesh.get_group(axis)
        return copy_to(x, group) if axis in self.same_tokens else gather_to(x, 0, group)

    def leave(self, y: Tensor, axis: str) -> Tensor:
        """This rank's rows, from what each rank of an axis has to add to all."""
        group = self.mesh.get_group(axis)
        return reduce_from(y, group) if axis in self.same_tokens else scatter_from(y, 0, group)


class ParallelExpertGroup(ExpertGroup):
    """This rank's part: `num_experts` of the group's experts, from `first` on, or a part of the width of all."""

    first: int
    num_experts: int

    def matrices(self) -> tuple[Tensor, Tensor]:
        return local(self.gate_up), local(self.down)

    def forward(self, x: Tensor | list[Tensor], *arguments: Any) -> Any:
        """As an `ExpertGroup`; or `answer`, in the same call: `fully_shard` gathers the weights for each."""
        return super().forward(x, *arguments) if isinstance(x, Tensor) else self.answer(x, *arguments)

    def answer(self, away: list[Tensor], out: list[Way], home: list[Way], choices: list[Tensor]) -> list[Tensor]:
        """What the experts here make of rows that are under way here; the results are under way back.

        Args:
            away: of each part of the tokens, the rows, [N, D].
            out, home: ways that they are on, and that the results take.
            choices: of each part, each row's expert, [N, 1].
        """
        back = []
        for rows, way, way_back, choice in zip(away, out, home, choices, strict=True):
            x_ND = finish_exchange(rows, way)
            y_ND = super().forward(x_ND, torch.ones_like(choice, dtype=x_ND.dtype), choice)
            back.append(start_exchange(y_ND, way_back))
        return back


class ParallelMixture(MixtureOfExperts):
    """`MixtureOfExperts` over the ranks of `axes`."""

    axes: ExpertAxes

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        x_TD = x.reshape(-1, x.shape[-1])
        routing = self.router(x_TD)
        if self.all_active:
            y_TD = self.mix(x_TD, routing.probs_TE.to(x.dtype))
        else:
            y_TD = self.route(x_TD, routing.weights_TK.to(x.dtype), routing.indices_TK)
        return y_TD.view_as(x), routing

    def mix(self, x_TD: Tensor, probs_TE: Tensor) -> Tensor:
        """All experts on all tokens of the ranks that share them."""
        axes = self.axes
        x_TD, probs_TE = (axes.enter(axes.enter(part, "etp"), "ep") for part in (x_TD, probs_TE))
        y_TD, first = None, 0
        for size, group in zip(self.group_sizes, self.groups, strict=True):
            assert isinstance(group, ParallelExpertGroup)
            begin = first + group.first
            part = group(x_TD, probs_TE[:, begin : begin + group.num_experts])
            y_TD = part if y_TD is None else y_TD + part
            first += size
        assert y_TD is not None
        return axes.leave(axes.leave(y_TD, "ep"), "etp")

    def route(self, x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor) -> Tensor:
        """Each token through its own experts, wherever they are; where every rank has a part of all, it goes to all."""
        axes, (group,) = self.axes, self.groups
        assert isinstance(group, ParallelExpertGroup)
        together = axes.experts.size() == 1 or "ep" in axes.same_tokens or group.num_experts == self.group_sizes[0]
        for axis in ("etp", "ep") if together else ("etp",):
            x_TD, weights_TK = axes.enter(x_TD, axis), axes.enter(weights_TK, axis)
            if axis not in axes.same_tokens:
                indices_TK = gather_to(indices_TK, 0, axes.mesh.get_group(axis))
        if together:
            here_TK = held(indices_TK, group.first, group.num_experts)
            is_part = group.num_experts < self.group_sizes[0]
            return axes.leave(axes.leave(group(x_TD, weights_TK, here_TK, is_part), "ep"), "etp")
        return axes.leave(self.exchange(group, x_TD, weights_TK, indices_TK), "etp")

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def exchange(self, group: ExpertGroup, x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor) -> Tensor:
        """Rows to the ranks of their experts by all-to-all, and back.

        The tokens are two halves: while one is computed, the other is under way, in the backward pass, too. It is not
        compiled: the numbers of rows differ each time, and the compiler would make each a constant.
        """
        ranks, experts = self.axes.experts, self.group_sizes[0]
        halves = [
            (x, weights, sort_by_expert(indices, experts))
            for x, weights, indices in zip(*(t.tensor_split(2) for t in (x_TD, weights_TK, indices_TK)), strict=True)
        ]
        sent = torch.stack([order.offsets.diff().view(ranks.size(), -1) for _, _, order in halves], 1)
        received = torch.empty_like(sent)  # [rank, half, expert of its or of ours]
        torch.distributed.all_to_all_single(received, sent, group=ranks)
        # Read once, because that waits for the device: of each half, rows that go to each rank, and that come from it.
        counts = torch.stack([sent, received]).sum(-1).permute(2, 0, 1).tolist()
        out = [Way(leaving, arriving, ranks) for leaving, arriving in counts]
        home = [way.back() for way in out]
        expert_of = torch.arange(sent.shape[2], device=x_TD.device).repeat(ranks.size())
        choices = [
            expert_of.repeat_interleave(received[:, half].flatten(), output_size=sum(way.received))[:, None]
            for half, way in enumerate(out)
        ]
        away = [start_exchange(spread(x, order), way) for (x, _, order), way in zip(halves, out, strict=True)]
        back = group(away, out, home, choices)
        done = [
            combine(finish_exchange(y_ND, way), weights, order)
            for y_ND, way, (_, weights, order) in zip(back, home, halves, strict=True)
        ]
        return torch.cat(done)


def apply_expert_parallel(model: Transformer, axes: ExpertAxes) -> None:
    """Share out the experts of a model on the meta device.

    A group is split by expert over `ep` and by width over `etp`. An expert job's groups of one, and a group whose
    experts `ep` does not divide, are split by width over both.
    """
    for module in model.modules():
        if isinstance(module, MixtureOfExperts):
            by_expert = len(module.group_sizes) == 1 and module.group_sizes[0] % axes.experts.size() == 0
            for size, group in zip(module.group_sizes, module.groups, strict=True):
                distribute(group, "gate_up", axes.mesh, [Shard(0) if by_expert else Shard(2), Shard(2)])
                distribute(group, "down", axes.mesh, [Shard(0) if by_expert else Shard(2), Shard(2)])
                group.__class__ = ParallelExpertGroup
                assert isinstance(group, ParallelExpertGroup)
                group.num_experts = size // axes.experts.size() if by_expert else size
                group.first = axes.experts.rank() * group.num_experts if by_expert else 0
            module.__class__ = ParallelMixture
            module.axes = axes  # type: ignore[assignment]
