"""The weighted sum of a token's rows and its gradients: the reference and the kernels, interpreted, against autograd in
fp64. Rows that belong to no expert hold NaN in every case.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from flexpert_kernels.combine import reference
from flexpert_kernels.route.reference import sort_by_expert
from poison import poisoned
from torch import Tensor

Interpreted = Callable[..., Any]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
#: Tokens, experts, active experts, width, which pairs belong to an expert here.
CASES = [
    (1, 1, 1, 8, "all"),
    (1, 6, 6, 2100, "half"),  # more columns than a block
    (13, 4, 2, 64, "all"),
    (13, 4, 2, 33, "half"),  # odd
    (7, 8, 8, 40, "half"),
    (70, 3, 3, 48, "all"),
    (9, 5, 2, 16, "none"),
    (20, 8, 1, 24, "first"),
    (11, 8, 5, 1, "half"),
]
Case = tuple[int, int, int, int, str]
EVERY_CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))


class Rows(NamedTuple):
    y_ND: Tensor
    weights_TK: Tensor
    dz_TD: Tensor
    places_TK: Tensor
    offsets: Tensor

    @property
    def num_rows(self) -> int:
        return int(self.offsets[-1])


def rows_of(case: Case, dtype: torch.dtype) -> Rows:
    tokens, experts, top_k, width, held = case
    generator = torch.Generator().manual_seed(sum(case[:4]))
    indices_TK = torch.rand(tokens, experts, generator=generator).topk(top_k).indices
    shares = {"all": 1.0, "half": 0.5, "none": 0.0}
    here = (
        indices_TK == 0 if held == "first" else torch.rand(tokens, top_k, generator=generator) < shares.get(held, 1.0)
    )
    _, places_TK, offsets = sort_by_expert(indices_TK.where(here, -1), experts)
    y_ND = torch.randn(tokens * top_k, width, generator=generator, dtype=torch.float64).to(dtype)
    y_ND[offsets[-1] :] = float("nan")
    weights_TK = torch.rand(tokens, top_k, generator=generator, dtype=torch.float64)
    dz_TD = torch.randn(tokens, width, generator=generator, dtype=torch.float64).to(dtype)
    weights_TK = weights_TK if dtype == torch.float64 else weights_TK.float()
    return Rows(y_ND, weights_TK, dz_TD, places_TK, offsets)


def by_hand(rows: Rows, weighted: bool) -> tuple[Tensor, Tensor, Tensor]:
    """z, and by autograd in fp64 the gradients of <z, dz> for y and the weights."""
    y_ND = rows.y_ND.double().nan_to_num(0).requires_grad_()
    weights_TK = (rows.weights_TK.double() if weighted else torch.ones_like(rows.weights_TK).double()).requires_grad_()
    is_here_TK = rows.places_TK < rows.num_rows
    z_TD = torch.einsum("tkd,tk->td", y_ND[rows.places_TK], weights_TK * is_here_TK)
    return z_TD.detach(), *torch.autograd.grad(z_TD, (y_ND, weights_TK), rows.dz_TD.double())


def assert_near(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    tolerance = TOLERANCE[dtype]
    scale = expected.abs().max().clamp(min=1).item() if expected.numel() else 1
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance * scale)


def check(module: Any, case: Case, dtype: torch.dtype, weighted: bool, integer: torch.dtype) -> None:
    rows = rows_of(case, dtype)
    weights_TK = rows.weights_TK if weighted else None
    places_TK, offsets = (x.to(integer) for x in rows[3:])
    z_TD, dy_ND, dweights_TK = by_hand(rows, weighted)
    found = module.combine(rows.y_ND, places_TK, weights_TK, offsets)
    found_dy, found_dweights = module.combine_backward(rows.dz_TD, rows.y_ND, weights_TK, places_TK, offsets)
    assert found.dtype == found_dy.dtype == dtype
    assert_near(found, z_TD, dtype)
    assert_near(found_dy, dy_ND, dtype)
    assert found_dy[rows.num_rows :].eq(0).all()
    if weighted:
        assert found_dweights.dtype == rows.weights_TK.dtype
        assert_near(found_dweights, dweights_TK, dtype)
    else:
        assert found_dweights is None
    again = module.combine(rows.y_ND, places_TK, weights_TK, offsets)
    again_dy, again_dweights = module.combine_backward(rows.dz_TD, rows.y_ND, weights_TK, places_TK, offsets)
    assert torch.equal(found, again) and torch.equal(found_dy, again_dy)
    assert not weighted or torch.equal(found_dweights, again_dweights)


@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "ones"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=["fp64", "fp32", "fp16"])
@EVERY_CASE
def test_the_reference_sums_rows_and_has_autograds_gradients(case: Case, dtype: torch.dtype, weighted: bool) -> None:
    check(reference, case, dtype, weighted, torch.int64)


def test_the_reference_can_be_differentiated() -> None:
    rows = rows_of((6, 4, 2, 5, "half"), torch.float64)
    leaves = rows.y_ND.nan_to_num(1).requires_grad_(), rows.weights_TK.requires_grad_()
    assert torch.autograd.gradcheck(lambda y, w: reference.combine(y, rows.places_TK, w, rows.offsets), leaves)


def test_the_reference_takes_the_kernels_integers() -> None:
    check(reference, (13, 4, 2, 33, "half"), torch.float32, True, torch.int32)


@pytest.mark.slow
def test_the_reference_is_traced_whole() -> None:
    def both(*rows: Tensor) -> tuple[Tensor | None, ...]:
        y_ND, weights_TK, dz_TD, places_TK, offsets = rows
        z_TD = reference.combine(y_ND, places_TK, weights_TK, offsets)
        return z_TD, *reference.combine_backward(dz_TD, y_ND, weights_TK, places_TK, offsets)

    traced = torch.compile(both, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (5, 12):
        rows = rows_of((tokens, 4, 2, 8, "half"), torch.float32)
        for one, other in zip(traced(*rows), both(*rows), strict=True):
            torch.testing.assert_close(one, other)


def check_kernels(case: Case, dtype: torch.dtype) -> None:
    from flexpert_kernels.combine import triton

    with poisoned():
        for weighted in (True, False):
            check(triton, case, dtype, weighted, torch.int32)


@DTYPES
@EVERY_CASE
def test_the_kernels_sum_rows_and_have_autograds_gradients(
    case: Case, dtype: torch.dtype, interpreted: Interpreted
) -> None:
    interpreted(check_kernels, case, dtype)


def check_strides() -> None:
    from flexpert_kernels.combine import triton

    rows = rows_of((13, 4, 2, 32, "half"), torch.float32)
    places_TK, offsets = (x.int() for x in rows[3:])
    y_ND, weights_TK = rows.y_ND.T.contiguous().T, rows.weights_TK.T.contiguous().T
    dz_TD = torch.ones(()).expand(13, 32)  # what summing an output makes
    found = triton.combine(y_ND, places_TK.T.contiguous().T, weights_TK, offsets)
    assert torch.equal(found, triton.combine(rows.y_ND, places_TK, rows.weights_TK, offsets))
    found_dy, found_dweights = triton.combine_backward(dz_TD, y_ND, weights_TK, places_TK.T.contiguous().T, offsets)
    dy_ND, dweights_TK = triton.combine_backward(dz_TD.clone(), rows.y_ND, rows.weights_TK, places_TK, offsets)
    assert torch.equal(found_dy, dy_ND) and torch.equal(found_dweights, dweights_TK)


def test_strides_do_not_matter(interpreted: Interpreted) -> None:
    interpreted(check_strides)


def refuse_mistakes() -> None:
    from flexpert_kernels.combine import triton

    rows = rows_of((6, 4, 2, 8, "all"), torch.float32)
    places_TK, offsets = (x.int() for x in rows[3:])
    with pytest.raises(ValueError, match=r"y_ND: shape \(12, any\) expected, \(11, 8\) given"):
        triton.combine(rows.y_ND[1:], places_TK, rows.weights_TK, offsets)
    with pytest.raises(ValueError, match=r"weights_TK: shape \(6, 2\) expected, \(6, 1\) given"):
        triton.combine(rows.y_ND, places_TK, rows.weights_TK[:, :1], offsets)
    with pytest.raises(ValueError, match=r"y_ND: type .* expected, torch.float64 given"):
        triton.combine(rows.y_ND.double(), places_TK, rows.weights_TK, offsets)
    with pytest.raises(ValueError, match=r"y_ND: shape \(12, 7\) expected, \(12, 8\) given"):
        triton.combine_backward(rows.dz_TD[:, 1:], rows.y_ND, rows.weights_TK, places_TK, offsets)
    with pytest.raises(ValueError, match=r"places_TK: shape \(5, any\) expected, \(6, 2\) given"):
        triton.combine_backward(rows.dz_TD[1:], rows.y_ND, None, places_TK, offsets)


def test_mistakes_are_named(interpreted: Interpreted) -> None:
    interpreted(refuse_mistakes)


def check_no_tokens() -> None:
    from flexpert_kernels.combine import triton

    for module in (triton, reference):
        y_ND, weights_TK, offsets = torch.empty(0, 8), torch.empty(0, 2), torch.zeros(5, dtype=torch.int32)
        places_TK = torch.empty(0, 2, dtype=torch.int32)
        assert module.combine(y_ND, places_TK, weights_TK, offsets).shape == (0, 8)
        dy_ND, dweights_TK = module.combine_backward(y_ND, y_ND, weights_TK, places_TK, offsets)
        assert dy_ND.shape == (0, 8) and dweights_TK.shape == (0, 2)


def test_no_tokens_have_no_sums(interpreted: Interpreted) -> None:
    interpreted(check_no_tokens)
