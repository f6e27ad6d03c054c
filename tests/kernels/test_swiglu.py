"""SwiGLU and its gradients: the reference and the kernels, interpreted, against autograd in fp64. Where rows are
limited, those past the limit hold NaN.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from flexpert_kernels.swiglu import reference
from poison import poisoned
from torch import Tensor

Interpreted = Callable[..., Any]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3}
#: Rows, width, how many rows count (None: all, without saying so).
CASES = [(1, 16, None), (5, 2100, 3), (33, 48, 33), (70, 64, None), (12, 33, 7), (9, 8, 0), (3, 1, 2)]
Case = tuple[int, int, int | None]
EVERY_CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
WEIGHTED = pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "ones"])


class Rows(NamedTuple):
    h_N2F: Tensor
    da_NF: Tensor
    weights_N: Tensor | None
    num_rows: Tensor | None


def rows_of(case: Case, dtype: torch.dtype, weighted: bool) -> Rows:
    rows, width, limit = case
    generator = torch.Generator().manual_seed(rows * 100 + width)
    h_N2F = 3 * torch.randn(rows, 2 * width, generator=generator, dtype=torch.float64)
    da_NF = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    h_N2F[0, 0], h_N2F[0, width - 1] = 90, -90  # where a sigmoid is 1, and all but 0
    weights_N = torch.rand(rows, generator=generator, dtype=torch.float64) if weighted else None
    for x in (h_N2F, da_NF, *((weights_N,) if weights_N is not None else ())):
        x[limit if limit is not None else rows :] = float("nan")
    if weights_N is not None:
        weights_N = weights_N.to(torch.float64 if dtype == torch.float64 else torch.float32)
    offsets = torch.tensor([0, limit or 0], dtype=torch.int32)
    return Rows(h_N2F.to(dtype), da_NF.to(dtype), weights_N, None if limit is None else offsets[-1:])


def by_hand(rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """a, and by autograd in fp64 the gradients of <a, da> for h and the weights; zeros for rows that do not count."""
    weights_N = torch.ones(len(rows.h_N2F)) if rows.weights_N is None else rows.weights_N
    leaves = [x.double().nan_to_num(0).requires_grad_() for x in (rows.h_N2F, weights_N)]
    counts_N1 = torch.arange(len(weights_N))[:, None] < (len(weights_N) if rows.num_rows is None else rows.num_rows)
    gate_NF, up_NF = leaves[0].chunk(2, dim=-1)
    a_NF = leaves[1][:, None] * counts_N1 * up_NF * gate_NF / (1 + (-gate_NF).exp())
    return a_NF.detach(), *torch.autograd.grad(a_NF, leaves, rows.da_NF.double().nan_to_num(0))


def assert_near(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    scale = expected.abs().max().clamp(min=1).item()
    torch.testing.assert_close(found.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * scale)


def check(module: Any, case: Case, dtype: torch.dtype, weighted: bool) -> None:
    h_N2F, da_NF, weights_N, num_rows = rows = rows_of(case, dtype, weighted)
    a_NF, dh_N2F, dweights_N = by_hand(rows)
    found = [module.swiglu(h_N2F, weights_N, num_rows), *module.swiglu_backward(h_N2F, da_NF, weights_N, num_rows)]
    again = [module.swiglu(h_N2F, weights_N, num_rows), *module.swiglu_backward(h_N2F, da_NF, weights_N, num_rows)]
    expected = [a_NF, dh_N2F, a_NF, dweights_N]
    if not weighted:
        assert found.pop() is None and again.pop() is None
        expected.pop()
    for one, other, value in zip(found, again, expected, strict=True):
        assert_near(one, value, dtype)
        assert torch.equal(one, other)
        assert num_rows is None or one[num_rows.item() :].eq(0).all()
    assert [x.dtype for x in found[:3]] == [dtype] * 3
    assert not weighted or found[3].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@WEIGHTED
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=["fp64", "fp32", "fp16"])
@EVERY_CASE
def test_the_reference_gates_and_has_autograds_gradients(case: Case, dtype: torch.dtype, weighted: bool) -> None:
    check(reference, case, dtype, weighted)


@pytest.mark.parametrize("limit", [None, 2])
def test_the_reference_can_be_differentiated(limit: int | None) -> None:
    h_N2F, _, weights_N, num_rows = rows_of((4, 3, limit), torch.float64, weighted=True)
    assert weights_N is not None
    h_N2F, weights_N = h_N2F.clamp(-4, 4).nan_to_num(1).requires_grad_(), weights_N.nan_to_num(1).requires_grad_()
    assert torch.autograd.gradcheck(lambda h, w: reference.swiglu(h, w, num_rows), (h_N2F, weights_N))


def test_the_reference_is_traced_whole() -> None:
    def both(*rows: Tensor) -> tuple[Tensor | None, ...]:
        h_N2F, da_NF, weights_N, num_rows = rows
        return (
            reference.swiglu(h_N2F, weights_N, num_rows),
            *reference.swiglu_backward(h_N2F, da_NF, weights_N, num_rows),
        )

    traced = torch.compile(both, backend="aot_eager", fullgraph=True, dynamic=True)
    for size in (5, 12):
        rows = rows_of((size, 8, 3), torch.float32, weighted=True)
        for one, other in zip(traced(*rows), both(*rows), strict=True):
            torch.testing.assert_close(one, other)


def check_kernels(case: Case, dtype: torch.dtype, weighted: bool) -> None:
    from flexpert_kernels.swiglu import triton

    with poisoned():
        check(triton, case, dtype, weighted)


@WEIGHTED
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@EVERY_CASE
def test_the_kernels_gate_and_have_autograds_gradients(
    case: Case, dtype: torch.dtype, weighted: bool, interpreted: Interpreted
) -> None:
    interpreted(check_kernels, case, dtype, weighted)


def check_strides() -> None:
    from flexpert_kernels.swiglu import triton

    h_N2F, da_NF, _, _ = rows_of((12, 16, None), torch.float32, weighted=False)
    weights_N = torch.rand(12, 3).unbind(1)[1]  # a column, as of a router's probabilities
    expected = triton.swiglu_backward(h_N2F, da_NF, weights_N.clone())
    found = triton.swiglu_backward(h_N2F.T.contiguous().T, da_NF.T.contiguous().T, weights_N)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert torch.equal(triton.swiglu(h_N2F.T.contiguous().T, weights_N), expected[1])


def test_strides_do_not_matter(interpreted: Interpreted) -> None:
    interpreted(check_strides)


def refuse_mistakes() -> None:
    from flexpert_kernels.swiglu import triton

    h_N2F = torch.zeros(4, 6)
    with pytest.raises(ValueError, match=r"h_N2F: rows of a gate and an up half expected, \(4, 5\) given"):
        triton.swiglu(h_N2F[:, 1:])
    with pytest.raises(ValueError, match=r"weights_N: shape \(4\) expected, \(4, 1\) given"):
        triton.swiglu(h_N2F, torch.zeros(4, 1))
    with pytest.raises(ValueError, match=r"da_NF: shape \(4, 3\) expected, \(4, 6\) given"):
        triton.swiglu_backward(h_N2F, h_N2F)
    with pytest.raises(
        ValueError, match=r"h_N2F and da_NF: the same type expected, torch.float32 and torch.float16 given"
    ):
        triton.swiglu_backward(h_N2F, torch.zeros(4, 3, dtype=torch.float16))
    with pytest.raises(
        ValueError, match=r"h_N2F: fp16 or fp32 in Triton's interpreter, .* expected, torch.bfloat16 given"
    ):
        triton.swiglu(h_N2F.bfloat16())


def test_mistakes_are_named(interpreted: Interpreted) -> None:
    interpreted(refuse_mistakes)


def check_no_rows() -> None:
    from flexpert_kernels.swiglu import triton

    for module in (triton, reference):
        dh_N2F, a_NF, dweights_N = module.swiglu_backward(torch.empty(0, 8), torch.empty(0, 4), torch.empty(0))
        assert (dh_N2F.shape, a_NF.shape, dweights_N.shape) == ((0, 8), (0, 4), (0,))
        assert module.swiglu(torch.empty(0, 8)).shape == (0, 4)


def test_no_rows_are_no_rows(interpreted: Interpreted) -> None:
    interpreted(check_no_rows)
