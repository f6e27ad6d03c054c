"""Routing and sorting: the references against other formulas; the kernels, interpreted, against the references."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from flexpert_kernels.route import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from poison import poisoned
from torch import Tensor

Interpreted = Callable[..., Any]
EXAMPLES = settings(derandomize=True, database=None, deadline=None, max_examples=30)
#: Tokens, experts, active experts.
ROUTES = [(1, 1, 1), (1, 5, 5), (7, 3, 2), (150, 8, 1), (40, 8, 8), (33, 6, 4), (9, 64, 8), (5, 256, 3)]


def logits_of(tokens: int, experts: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(tokens * 1000 + experts)
    return (3 * torch.randn(tokens, experts, generator=generator)).to(dtype)


def indices_of(tokens: int, experts: int, top_k: int, held: str) -> Tensor:
    """Distinct experts for each token, of which `held` says which are held here: -1 for the others."""
    indices_TK = logits_of(tokens, experts).topk(top_k).indices
    generator = torch.Generator().manual_seed(tokens)
    here = {
        "all": torch.ones(tokens, top_k, dtype=torch.bool),
        "half": torch.rand(tokens, top_k, generator=generator) < 0.5,
        "none": torch.zeros(tokens, top_k, dtype=torch.bool),
        "even": indices_TK % 2 == 0,  # odd experts are empty
        "first": indices_TK == 0,  # one expert has all
    }[held]
    return indices_TK.where(here, -1)


def sorted_by_hand(indices: list[int], experts: int) -> tuple[list[int], list[int], list[int]]:
    order = sorted(range(len(indices)), key=lambda i: indices[i] if 0 <= indices[i] < experts else experts)
    places = [order.index(i) for i in range(len(indices))]
    return order, places, [sum(0 <= index < e for index in indices) for e in range(experts + 1)]


@pytest.mark.parametrize("renormalise", [False, True], ids=["plain", "renormalised"])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), ROUTES)
def test_the_reference_routes_as_softmax_and_topk_do(tokens: int, experts: int, top_k: int, renormalise: bool) -> None:
    logits_TE, bias_E = logits_of(tokens, experts, torch.float64), logits_of(1, experts, torch.float64)[0]
    probs_TE, weights_TK, indices_TK, normaliser_T = reference.route(logits_TE, top_k, bias_E, renormalise)
    biased_TE = logits_TE + bias_E.minimum(torch.zeros(()))
    expected = biased_TE.softmax(-1)
    values, indices = expected.topk(top_k)
    torch.testing.assert_close(probs_TE, expected)
    torch.testing.assert_close(weights_TK, values / values.sum(-1, keepdim=True) if renormalise else values)
    assert torch.equal(indices_TK, indices)
    torch.testing.assert_close(normaliser_T, biased_TE.exp().sum(-1).log() - biased_TE.mean(-1))


def test_the_references_gradients_are_those_of_softmax() -> None:
    logits_TE, bias_E = logits_of(5, 6, torch.float64).requires_grad_(), torch.linspace(-1, -0.1, 6).double()
    for renormalise in (False, True):
        assert torch.autograd.gradcheck(
            lambda logits, bias, renormalise=renormalise: reference.route(logits, 3, bias, renormalise)[::3],
            (logits_TE, bias_E.clone().requires_grad_()),
        )


@pytest.mark.parametrize("held", ["all", "half", "none", "even", "first"])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), ROUTES)
def test_the_reference_sorts_stably_and_others_last(tokens: int, experts: int, top_k: int, held: str) -> None:
    indices_TK = indices_of(tokens, experts, top_k, held)
    order_N, places_TK, offsets = reference.sort_by_expert(indices_TK, experts)
    assert places_TK.shape == indices_TK.shape
    found = order_N.tolist(), places_TK.flatten().tolist(), offsets.tolist()
    assert found == sorted_by_hand(indices_TK.flatten().tolist(), experts)


def test_the_references_are_traced_whole() -> None:
    def both(logits_TE: Tensor) -> tuple[Tensor, ...]:
        probs_TE, weights_TK, indices_TK, normaliser_T = reference.route(logits_TE, 2, renormalise=True)
        return probs_TE, weights_TK, indices_TK, normaliser_T, *reference.sort_by_expert(indices_TK, logits_TE.shape[1])

    traced = torch.compile(both, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (5, 12):
        for one, other in zip(traced(logits_of(tokens, 4)), both(logits_of(tokens, 4)), strict=True):
            torch.testing.assert_close(one, other)


def check_route(tokens: int, experts: int, top_k: int, dtype: torch.dtype, bias: bool, renormalise: bool) -> None:
    from flexpert_kernels.route import triton

    logits_TE = logits_of(tokens, experts, dtype)
    logits_TE[::2, experts // 2 :] = logits_TE[::2, :1]  # equals, the first choice among them or not
    bias_E = logits_of(1, experts, dtype)[0] if bias else None
    if bias_E is not None:
        bias_E[experts // 2 :] = bias_E[0]
    with poisoned():
        found = triton.route(logits_TE, top_k, bias_E, renormalise)
    again = triton.route(logits_TE.T.contiguous().T, top_k, bias_E, renormalise)
    expected = reference.route(logits_TE.double(), top_k, None if bias_E is None else bias_E.double(), renormalise)
    assert torch.equal(found[2], expected[2])
    for one, other, value in zip(found, again, expected, strict=True):
        torch.testing.assert_close(one, value, rtol=1e-5, atol=1e-6, check_dtype=False)
        assert torch.equal(one, other)
    assert [x.dtype for x in found] == [torch.float32, torch.float32, torch.int64, torch.float32]


@pytest.mark.parametrize("options", [(False, False), (True, True)], ids=["plain", "bias-renormalised"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("case", ROUTES, ids=str)
def test_the_kernel_routes_as_the_reference(
    case: tuple[int, int, int], dtype: torch.dtype, options: tuple[bool, bool], interpreted: Interpreted
) -> None:
    interpreted(check_route, *case, dtype, *options)


def check_strange_logits() -> None:
    from flexpert_kernels.route import triton

    logits_TE = logits_of(6, 5)
    logits_TE[0], logits_TE[1] = float("nan"), -float("nan")
    logits_TE[2], logits_TE[3, 2], logits_TE[4, 1] = float("inf"), float("nan"), -float("inf")
    for top_k in (1, 3, 5):
        indices_TK = triton.route(logits_TE, top_k)[2]
        assert ((indices_TK >= 0) & (indices_TK < 5)).all()
        assert all(len(set(row)) == top_k for row in indices_TK.tolist())


def test_whatever_the_logits_are_a_tokens_experts_exist_and_differ(interpreted: Interpreted) -> None:
    interpreted(check_strange_logits)


def check_sort(tokens: int, experts: int, top_k: int, held: str, dtype: torch.dtype, max_tiles: int) -> None:
    from flexpert_kernels.route import triton

    triton.MAX_TILES, usual = max_tiles, triton.MAX_TILES
    try:
        indices_TK = indices_of(tokens, experts, top_k, held).to(dtype)
        with poisoned():
            found = triton.sort_by_expert(indices_TK, experts)
        again = triton.sort_by_expert(indices_TK.T.contiguous().T, experts)
    finally:
        triton.MAX_TILES = usual
    for one, other, expected in zip(found, again, reference.sort_by_expert(indices_TK, experts), strict=True):
        assert one.dtype == torch.int32 and one.shape == expected.shape
        assert torch.equal(one, expected.int()) and torch.equal(one, other)


@pytest.mark.parametrize(
    ("case", "held"),
    [((1, 1, 1), "all"), ((1, 1, 1), "none"), ((1, 5, 5), "half"), ((150, 8, 1), "half"), ((150, 8, 1), "first"),
     ((40, 8, 8), "all"), ((40, 8, 8), "even"), ((40, 8, 8), "none"), ((33, 6, 4), "half"), ((9, 64, 8), "half"),
     ((5, 256, 3), "all"), ((300, 8, 4), "all"), ((300, 8, 4), "half")],
    ids=str,
)  # fmt: skip
def test_the_kernels_sort_as_the_reference(case: tuple[int, int, int], held: str, interpreted: Interpreted) -> None:
    interpreted(check_sort, *case, held, torch.int64, 256)


@pytest.mark.parametrize("max_tiles", [1, 3], ids="at most {} tiles".format)
def test_a_tile_takes_several_rounds_when_there_are_many_pairs(max_tiles: int, interpreted: Interpreted) -> None:
    interpreted(check_sort, 250, 8, 8, "half", torch.int32, max_tiles)
    interpreted(check_sort, 20, 64, 10, "all", torch.int64, max_tiles)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Any integers for indices: experts may repeat, be negative or too large."""
    tokens, top_k, experts = draw(st.integers(0, 40)), draw(st.integers(1, 5)), draw(st.integers(1, 70))
    numbers = st.one_of(st.integers(-2, experts + 1), st.sampled_from([-(2**63), 2**32, 2**63 - 1]))
    indices = draw(st.lists(numbers, min_size=tokens * top_k, max_size=tokens * top_k))
    return torch.tensor(indices, dtype=torch.int64).view(tokens, top_k), experts


def check_sorted(sort: Callable[..., tuple[Tensor, Tensor, Tensor]], indices_TK: Tensor, experts: int) -> None:
    """What a stable sort is, whoever did it."""
    order_N, places_TK, offsets = (x.long() for x in sort(indices_TK, experts))
    num_pairs = indices_TK.numel()
    assert torch.equal(order_N.sort().values, torch.arange(num_pairs)), "each pair once"
    assert torch.equal(places_TK.flatten()[order_N], torch.arange(num_pairs)), "places are the inverse"
    experts_N = indices_TK.flatten()[order_N]
    assert offsets[0] == 0 and (offsets.diff() >= 0).all()
    for expert in range(experts):
        rows = slice(offsets[expert], offsets[expert + 1])
        assert (experts_N[rows] == expert).all() and (order_N[rows].diff() > 0).all()
    last_N = experts_N[offsets[-1] :]
    assert ((last_N < 0) | (last_N >= experts)).all() and (order_N[offsets[-1] :].diff() > 0).all()


@EXAMPLES
@given(pairs())
def test_any_indices_are_sorted_by_the_reference(case: tuple[Tensor, int]) -> None:
    check_sorted(reference.sort_by_expert, *case)


def sort_any_indices() -> None:
    from flexpert_kernels.route import triton

    EXAMPLES(given(pairs())(lambda case: check_sorted(triton.sort_by_expert, *case)))()


def test_any_indices_are_sorted_by_the_kernels(interpreted: Interpreted) -> None:
    interpreted(sort_any_indices)


@st.composite
def choices(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Logits of few different values, so that equals are common."""
    tokens, experts = draw(st.integers(0, 6)), draw(st.integers(1, 20))
    numbers = st.lists(st.integers(-3, 3), min_size=tokens * experts, max_size=tokens * experts)
    return torch.tensor(draw(numbers), dtype=torch.float32).view(tokens, experts), draw(st.integers(1, experts))


def check_routed(route: Callable[..., tuple[Tensor, ...]], logits_TE: Tensor, top_k: int) -> None:
    probs_TE, weights_TK, indices_TK, normaliser_T = route(logits_TE, top_k)
    assert weights_TK.shape == indices_TK.shape == (len(logits_TE), top_k)
    torch.testing.assert_close(probs_TE.sum(-1), torch.ones(len(probs_TE)))
    assert torch.equal(weights_TK, probs_TE.gather(1, indices_TK)), "weights are the probabilities chosen"
    for logits, probs, indices in zip(logits_TE.tolist(), probs_TE.tolist(), indices_TK.tolist(), strict=True):
        assert indices == sorted(range(len(logits)), key=lambda e: (-logits[e], e))[:top_k], "the first of equals first"
        assert len(set(probs)) == len(set(logits)), "equal logits, equal probabilities"
    moved = route(logits_TE + 8, top_k)  # exact in fp32
    torch.testing.assert_close(moved[3], normaliser_T)
    assert torch.equal(moved[2], indices_TK), "a number added to all logits changes nothing"


@EXAMPLES
@given(choices())
def test_any_logits_are_routed_by_the_reference(case: tuple[Tensor, int]) -> None:
    check_routed(reference.route, *case)


def route_any_logits() -> None:
    from flexpert_kernels.route import triton

    EXAMPLES(given(choices())(lambda case: check_routed(triton.route, *case)))()


def test_any_logits_are_routed_by_the_kernel(interpreted: Interpreted) -> None:
    interpreted(route_any_logits)


def refuse_mistakes() -> None:
    from flexpert_kernels.route import triton

    logits_TE = logits_of(4, 5)
    with pytest.raises(ValueError, match="top_k: an integer from 1 to 5 expected, 6 given"):
        triton.route(logits_TE, 6)
    with pytest.raises(ValueError, match="top_k: an integer from 1 to 5 expected, 0 given"):
        triton.route(logits_TE, 0)
    with pytest.raises(ValueError, match=r"bias_E: shape \(5\) expected, \(4,\) given"):
        triton.route(logits_TE, 2, torch.zeros(4))
    with pytest.raises(ValueError, match=r"logits_TE: shape \(any, any\) expected, \(5,\) given"):
        triton.route(logits_TE[0], 2)
    with pytest.raises(ValueError, match="num_experts: an integer from 1 to 256 expected, 257 given"):
        triton.sort_by_expert(torch.zeros(4, 2, dtype=torch.int64), 257)
    with pytest.raises(ValueError, match=r"indices_TK: type torch.int32 or torch.int64 expected, torch.float32 given"):
        triton.sort_by_expert(torch.zeros(4, 2), 8)


def test_mistakes_are_named(interpreted: Interpreted) -> None:
    interpreted(refuse_mistakes)
