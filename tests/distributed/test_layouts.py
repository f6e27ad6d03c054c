"""One table of layouts against one process: the same loss and the same gradient of every parameter."""

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor
from torch.distributed.tensor import DTensor

from flexpert.checkpoint.sharding import local_part
from flexpert.config.groups import ModelConfig
from flexpert.errors import UserError
from flexpert.model.loss import chunked_nll, router_z_sum
from flexpert.model.transformer import Transformer, build_on_meta
from flexpert.parallel.apply import apply_parallel
from flexpert.parallel.layout import Layout, check_layout, problem
from flexpert.parallel.mesh import Meshes, build_meshes
from flexpert.parallel.ranks import Ranks, clip_gradients
from flexpert.parallel.tensor import local

SHAPE = {
    "hidden_size": 16, "num_layers": 2, "num_heads": 4, "intermediate_size": 24, "vocab_size": 32,
    "max_sequence_length": 16,
}  # fmt: skip
MAX_NORM = 0.5
OWN = (".groups.1.", ".router.weight.1", ".router.bias.1")


@dataclass(frozen=True)
class Kind:
    """A model, how its experts are held, and which parameters are trained."""

    config: ModelConfig
    group_sizes: tuple[int, ...] | None = None
    own: tuple[str, ...] = ("",)


KINDS = {
    "dense": Kind(ModelConfig(**SHAPE)),
    "all of 4": Kind(ModelConfig(**SHAPE, num_experts=4, active_experts=4)),
    "2 of 4": Kind(ModelConfig(**SHAPE, num_experts=4, active_experts=2, router_bias=True)),
    "expert job": Kind(ModelConfig(**SHAPE, num_experts=2, active_experts=2, router_bias=True), (1, 1), OWN),
}
DENSE = [Layout(2), Layout(2, 2), Layout(2, 2, sequence=True), Layout(4, 2, sequence=True), Layout(4, 4)]
MIXED = [
    Layout(2), Layout(2, expert=2), Layout(2, expert_tensor=2), Layout(2, 2, expert_tensor=2),
    Layout(2, 2, expert_tensor=2, sequence=True), Layout(2, 2, expert=2, sequence=True), Layout(2, 2, sequence=True),
    Layout(4, expert=2), Layout(4, 2, expert=2, sequence=True), Layout(4, expert=2, expert_tensor=2),
    Layout(4, 2, expert=2, expert_tensor=2, sequence=True), Layout(4, 2, expert_tensor=2), Layout(4, expert=4),
]  # fmt: skip
CASES = [("dense", layout) for layout in DENSE] + [(kind, layout) for kind in [*KINDS][1:] for layout in MIXED]


def fill(model: Transformer) -> None:
    """Values that depend on the parameter's name alone, this rank's part of them."""
    for index, (name, parameter) in enumerate(model.named_parameters()):
        value = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)) * 0.3
        value = value + 1 if "norm" in name else -value.abs() if ".router.bias" in name else value
        part, place = local_part(parameter)
        with torch.no_grad():
            part.copy_(value[place])


def build(kind: Kind, meshes: Meshes | None = None, compute: torch.dtype = torch.float32) -> Transformer:
    model = build_on_meta(kind.config, kind.group_sizes)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in kind.own))
    if meshes is not None:
        apply_parallel(model, meshes, compute)
    model.to_empty(device="cpu")
    fill(model)
    return model


def losses(model: Transformer, sequences: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """The sum over this rank's sequences to differentiate, and all ranks' two parts of it, [2]."""
    hidden, weight_VD = model(sequences[:, :-1]), local(model.head.weight)
    targets_T = sequences[:, 1:].flatten()
    vocabulary = ranks.vocabulary(len(weight_VD))
    nll_T, lse_T = chunked_nll(hidden.stream_BSD.flatten(0, 1), weight_VD, targets_T, 7, vocabulary)
    text = nll_T.sum() + 1e-2 * lse_T.square().sum()
    counted_T = ranks.own_positions(sequences[:, 1:] % 3 > 0).flatten()  # as where some targets do not count
    router = 1e-2 * router_z_sum(hidden.routings, counted_T) if hidden.routings else text.new_zeros(())
    parts = ranks.sum(text.detach()), ranks.sum(router.detach(), of_positions=True)
    return text + router, torch.stack(parts)


def gradients(kind: Kind, layout: Layout, sequences: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The losses; the norm of all gradients; each, clipped, put together from all ranks."""
    meshes = build_meshes(layout, torch.device("cpu"))
    model, ranks = build(kind, meshes), Ranks(meshes)
    index, number = ranks.share
    total, parts = losses(model, sequences[index::number], ranks)
    total.backward()  # type: ignore[no-untyped-call]
    norm = clip_gradients([p for p in model.parameters() if p.requires_grad], MAX_NORM)
    found = {}
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        assert (parameter.grad is not None) == parameter.requires_grad
        if parameter.grad is not None:
            # Put together by hand, from what `local_part` says of each rank.
            part, place = parameter.grad.to_local(), local_part(parameter)[1]
            held: list[tuple[Tensor, tuple[slice, ...]]] = [None] * layout.num_ranks  # type: ignore[list-item]
            dist.all_gather_object(held, (part, place))
            whole = torch.full(parameter.shape, torch.nan)
            for value, where in held:
                whole[where] = value
            found[name] = whole
    return parts, norm, found


BAD = [
    (KINDS["dense"], Layout(6, 4), "6 ranks do not divide into groups of 4 and of 1 x 1"),
    (KINDS["dense"], Layout(8, 8), "4 attention heads do not divide by parallel.tensor=8"),
    (KINDS["dense"], Layout(2, expert=2), "a dense model has no experts to share"),
    (KINDS["2 of 4"], Layout(4, 2, expert=2), "parallel.sequence=true"),
    (KINDS["2 of 4"], Layout(8, expert=8), "4 experts do not divide by parallel.expert=8"),
    (KINDS["2 of 4"], Layout(16, expert_tensor=16), "width of 24 does not divide by 16 ranks"),
    (KINDS["2 of 4"], Layout(4, 4, expert_tensor=4, sequence=True), "9 positions do not divide by parallel.tensor=4"),
]


@pytest.mark.parametrize(("kind", "layout", "message"), BAD, ids=[message for _, _, message in BAD])
def test_a_layout_that_does_not_fit_is_answered_with_some_that_do(kind: Kind, layout: Layout, message: str) -> None:
    groups = kind.group_sizes or (kind.config.num_experts,)
    with pytest.raises(UserError) as raised:
        check_layout(layout, kind.config, groups, 9)
    fault, _, advice = str(raised.value).partition("; what would do: ")
    assert message in fault
    proposed = [Layout(*numbers) for numbers in map(layout_numbers, advice.split("; or "))]
    assert proposed and all(problem(option, kind.config, groups, 9) is None for option in proposed)
    assert all(option.num_ranks == layout.num_ranks for option in proposed)


def layout_numbers(text: str) -> tuple[int, int, int, int, bool]:
    """The arguments of `Layout` from how one is written."""
    words = dict(word.removeprefix("parallel.").split("=") for word in text.split())
    tensor, data = int(words["tensor"]), int(words["data"])
    return tensor * data, tensor, int(words["expert"]), int(words["expert_tensor"]), words["sequence"] == "true"


@pytest.mark.parametrize(("kind", "layout"), CASES, ids=[f"{kind}: {layout}" for kind, layout in CASES])
def test_every_layout_has_the_gradients_of_one_process(kind: str, layout: Layout) -> None:
    sequences = torch.randint(0, 32, (4, 9), generator=torch.Generator().manual_seed(0))
    alone = build(KINDS[kind])
    total, parts = losses(alone, sequences, Ranks())
    total.backward()  # type: ignore[no-untyped-call]
    norm = torch.nn.utils.clip_grad_norm_(alone.parameters(), MAX_NORM)
    assert norm > 2 * MAX_NORM, "it is clipped"
    wanted = {name: p.grad for name, p in alone.named_parameters() if p.grad is not None}
    for found_parts, found_norm, found in run_ranks(gradients, layout.num_ranks, KINDS[kind], layout, sequences):
        torch.testing.assert_close(found_parts, parts, rtol=1e-5, atol=0)
        torch.testing.assert_close(found_norm, norm, rtol=1e-5, atol=0)
        assert found.keys() == wanted.keys()
        for name, gradient in wanted.items():
            assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
