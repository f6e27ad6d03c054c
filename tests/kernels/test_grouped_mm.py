"""The grouped products, interpreted, against einsums in fp64 that know each row's expert and token.

Shapes: T tokens, K active experts, N = T·K rows, E experts, D and F widths. Rows that belong to no expert here hold NaN
in every input, and new memory holds NaN.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from flexpert_kernels.grouped_mm import reference
from flexpert_kernels.tuning import Config
from hypothesis import given, settings
from hypothesis import strategies as st
from poison import poisoned
from torch import Tensor

Interpreted = Callable[..., Any]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}  # of the largest number that is expected
TILES = Config(16, 64, 32, num_warps=4, num_stages=3, group_m=2)
ROWS = ("h", "a", "y", "da", "dx")  # results that have a row for each pair
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
VARIANTS = {"fp32-tma": (torch.float32, True), "fp16-pointers": (torch.float16, False)}
EVERY_VARIANT = pytest.mark.parametrize(("dtype", "tma"), VARIANTS.values(), ids=VARIANTS.keys())


class Case(NamedTuple):
    """`choices`: "any" expert, "elsewhere" now and then, or only the experts listed."""

    tokens: int
    experts: int
    top_k: int
    hidden: int
    ffn: int
    choices: str | tuple[int, ...] = "any"


CASES = {
    "several-tiles": Case(25, 3, 2, 40, 48),
    "empty-experts": Case(21, 5, 1, 24, 40, (1, 3)),
    "one-expert-has-all": Case(40, 4, 1, 32, 16, (2,)),
    "one-token": Case(1, 3, 1, 24, 32),
    "one-expert-in-all": Case(17, 1, 1, 48, 24),
    "every-expert-active": Case(9, 4, 4, 16, 24),
    "elsewhere": Case(17, 3, 2, 40, 24, "elsewhere"),
    "nothing-here": Case(5, 2, 2, 16, 24, (-1,)),
    "no-tokens": Case(0, 2, 2, 16, 24),
    "whole-tiles": Case(16, 2, 1, 64, 32, (1,)),
    "odd-widths": Case(11, 3, 2, 23, 13, "elsewhere"),
}
# Each case once, and those with the most paths in both variants: the interpreter takes seconds for one.
RUNS = [
    pytest.param(case, *VARIANTS[variant], id=f"{name}-{variant}")
    for i, (name, case) in enumerate(CASES.items())
    for j, variant in enumerate(VARIANTS)
    if i % 2 == j or name in ("several-tiles", "empty-experts", "elsewhere")
]
EVERY_CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


class Inputs(NamedTuple):
    """Of a layer's products; dz is the gradient of its output, dh that of h."""

    x_TD: Tensor
    dz_TD: Tensor
    a_NF: Tensor
    dh_N2F: Tensor
    gate_up_E2FD: Tensor
    down_EDF: Tensor
    sum_EDF: Tensor
    order_N: Tensor
    offsets: Tensor
    top_k: int


def inputs(case: Case, dtype: torch.dtype, seed: int = 0) -> Inputs:
    random = torch.Generator().manual_seed(seed)
    tokens, experts, top_k, hidden, ffn, choices = case
    if isinstance(choices, str):
        scores_TE = torch.rand(tokens, experts, generator=random)
        experts_TK = scores_TE.topk(top_k).indices
        if choices == "elsewhere":
            experts_TK = experts_TK.masked_fill(torch.rand(tokens, top_k, generator=random) < 0.4, -1)
    else:
        experts_TK = torch.tensor(choices)[torch.randint(len(choices), (tokens, top_k), generator=random)]
    sorted_N, order_N = experts_TK.where(experts_TK >= 0, experts).flatten().sort(stable=True)
    offsets = torch.searchsorted(sorted_N, torch.arange(experts + 1))

    def numbers(*shape: int) -> Tensor:
        return (torch.rand(shape, generator=random) - 0.5).to(dtype)

    pairs = tokens * top_k
    a_NF, dh_N2F = numbers(pairs, ffn), numbers(pairs, 2 * ffn)
    a_NF[offsets[-1] :] = dh_N2F[offsets[-1] :] = torch.nan
    return Inputs(
        numbers(tokens, hidden), numbers(tokens, hidden), a_NF, dh_N2F, numbers(experts, 2, ffn, hidden),
        numbers(experts, hidden, ffn), numbers(experts, hidden, ffn).float(), order_N.int(), offsets.int(), top_k,
    )  # fmt: skip


def expected(of: Inputs) -> dict[str, Tensor]:
    """In fp64; of rows only those that belong to an expert."""
    count = int(of.offsets[-1])
    experts_n = torch.bucketize(torch.arange(count), of.offsets[1:], right=True)
    one_hot_nE = F.one_hot(experts_n, len(of.down_EDF)).double()
    tokens_n = of.order_N[:count].long() // of.top_k
    x_nD, dz_nD = of.x_TD.double()[tokens_n], of.dz_TD.double()[tokens_n]
    a_nF, dh_n2F = of.a_NF[:count].double(), of.dh_N2F[:count].double()
    gate_up_nHD, down_nDF = of.gate_up_E2FD.flatten(1, 2).double()[experts_n], of.down_EDF.double()[experts_n]
    h_n2F = torch.einsum("nhd,nd->nh", gate_up_nHD, x_nD)
    gate_nF, up_nF = h_n2F.chunk(2, dim=1)
    return {
        "h": h_n2F,
        "a": gate_nF * torch.sigmoid(gate_nF) * up_nF,
        "y": torch.einsum("ndf,nf->nd", down_nDF, a_nF),
        "da": torch.einsum("ndf,nd->nf", down_nDF, dz_nD),
        "dx": torch.einsum("nhd,nh->nd", gate_up_nHD, dh_n2F),
        "dgate_up": torch.einsum("ne,nh,nd->ehd", one_hot_nE, dh_n2F, x_nD),
        "ddown": torch.einsum("ne,nd,nf->edf", one_hot_nE, dz_nD, a_nF),
    }


def by_kernels(of: Inputs, programs: int, tma: bool, tiles: Config = TILES) -> dict[str, Tensor]:
    from flexpert_kernels.grouped_mm.launch import Plan
    from flexpert_kernels.grouped_mm.outer import run_outer

    how = Plan(tiles, programs, tma)
    order_N, offsets, top_k = of.order_N, of.offsets, of.top_k
    with poisoned():
        outer = {
            "dgate_up": run_outer(of.dh_N2F, of.x_TD, offsets, order_N, top_k, "x", None, 0, how),
            "ddown": run_outer(of.dz_TD, of.a_NF, offsets, order_N, top_k, "y", None, 0, how),
        }
    return {**by_row_kernels(of, programs, tma, tiles), **outer}


def by_row_kernels(of: Inputs, programs: int, tma: bool, tiles: Config = TILES) -> dict[str, Tensor]:
    from flexpert_kernels.grouped_mm.launch import Plan
    from flexpert_kernels.grouped_mm.rows import run_rows
    from flexpert_kernels.grouped_mm.up import run_up

    how = Plan(tiles, programs, tma)
    order_N, offsets, top_k = of.order_N, of.offsets, of.top_k
    with poisoned():
        h_N2F, a_NF = run_up(of.x_TD, order_N, top_k, of.gate_up_E2FD, offsets, how)
        return {
            "h": h_N2F,
            "a": a_NF,
            "y": run_rows(of.a_NF, of.down_EDF, offsets, False, None, 1, how),
            "da": run_rows(of.dz_TD, of.down_EDF, offsets, True, order_N, top_k, how),
            "dx": run_rows(of.dh_N2F, of.gate_up_E2FD.flatten(1, 2), offsets, True, None, 1, how),
        }


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], dtype: torch.dtype) -> None:
    for name, values in want.items():
        mine = got[name].double()
        if name in ROWS:
            assert mine[len(values) :].isnan().all(), f"{name}: rows that belong to no expert were written"
            mine = mine[: len(values)]
        scale = values.abs().max().item() if values.numel() else 0
        difference = (mine - values).abs().max().item() if values.numel() else 0
        assert difference <= TOLERANCE[dtype] * scale, f"{name}: off by {difference} of {scale}"


@pytest.mark.parametrize(("case", "dtype", "tma"), RUNS)
def test_products_are_those_of_each_rows_expert(
    interpreted: Interpreted, case: Case, dtype: torch.dtype, tma: bool
) -> None:
    of = inputs(case, dtype)
    assert_close(interpreted(by_kernels, of, 3, tma), expected(of), dtype)


@settings(max_examples=8, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_products_of_any_shape(interpreted: Interpreted, data: st.DataObject) -> None:
    experts = data.draw(st.integers(1, 5))
    case = Case(
        tokens=data.draw(st.integers(0, 12)),
        experts=experts,
        top_k=data.draw(st.integers(1, experts)),
        hidden=data.draw(st.integers(1, 40)),
        ffn=data.draw(st.integers(1, 40)),
        choices=data.draw(st.sampled_from(["any", "elsewhere"])),
    )
    blocks = (data.draw(st.sampled_from(sizes)) for sizes in ([16, 32], [32, 64], [16, 32]))
    tiles = Config(*blocks, num_warps=4, num_stages=3, group_m=data.draw(st.integers(1, 4)))
    dtype = data.draw(st.sampled_from(list(TOLERANCE)))
    of = inputs(case, dtype, seed=data.draw(st.integers(0, 99)))
    got = interpreted(by_kernels, of, data.draw(st.integers(1, 5)), data.draw(st.booleans()), tiles)
    assert_close(got, expected(of), dtype)


@EVERY_VARIANT
def test_same_bits_each_time_and_for_any_number_of_programs(
    interpreted: Interpreted, dtype: torch.dtype, tma: bool
) -> None:
    of = inputs(CASES["every-expert-active"], dtype)
    first, again, alone = (interpreted(by_kernels, of, programs, tma) for programs in (5, 5, 1))
    for name, values in first.items():
        assert values.numpy().tobytes() == again[name].numpy().tobytes() == alone[name].numpy().tobytes()


def by_outer(of: Inputs, tma: bool, beta: int) -> Tensor:
    """ddown from rows that lie in order, in the caller's buffer."""
    from flexpert_kernels.grouped_mm.launch import Plan
    from flexpert_kernels.grouped_mm.outer import run_outer

    dz_ND = of.dz_TD[of.order_N // of.top_k]
    dz_ND[of.offsets[-1] :] = torch.inf
    out = of.sum_EDF.clone() if beta else torch.full_like(of.sum_EDF, torch.nan)
    assert run_outer(dz_ND, of.a_NF, of.offsets, None, 1, None, out, beta, Plan(TILES, 3, tma)) is out
    return out


@EVERY_VARIANT
@pytest.mark.parametrize("beta", [0, 1])
@pytest.mark.parametrize("name", ["empty-experts", "elsewhere", "no-tokens"])
def test_outer_overwrites_or_adds_to_the_callers_buffer(
    interpreted: Interpreted, name: str, beta: int, dtype: torch.dtype, tma: bool
) -> None:
    of = inputs(CASES[name], dtype)
    want = expected(of)["ddown"] + beta * of.sum_EDF.double()
    got = interpreted(by_outer, of, tma, beta)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5)
    for e in (of.offsets.diff() == 0).nonzero():
        assert torch.equal(got[e], of.sum_EDF[e] * beta)


@EVERY_VARIANT
def test_an_expert_whose_numbers_overflowed_leaves_the_other_rows_alone(
    interpreted: Interpreted, dtype: torch.dtype, tma: bool
) -> None:
    of = inputs(CASES["several-tiles"], dtype)
    middle = slice(int(of.offsets[1]), int(of.offsets[2]))
    of.gate_up_E2FD[1] = of.down_EDF[1] = torch.nan
    of.a_NF[middle] = of.dh_N2F[middle] = torch.inf
    got, want = interpreted(by_row_kernels, of, 3, tma), expected(of)
    others = torch.cat([torch.arange(middle.start), torch.arange(middle.stop, len(of.order_N))])
    for name in ROWS:
        assert got[name][middle].isnan().all()
        difference = (got[name][others].double() - want[name][others]).abs().max()
        assert difference <= TOLERANCE[dtype] * want[name][others].abs().max()


def by_wrappers(of: Inputs) -> dict[str, Tensor]:
    from flexpert_kernels.grouped_mm import triton

    return by(triton, of)


def by(module: Any, of: Inputs) -> dict[str, Tensor]:
    h_N2F, a_NF = module.up(of.x_TD, of.order_N, of.top_k, of.gate_up_E2FD, of.offsets)
    return {
        "h": h_N2F,
        "a": a_NF,
        "y": module.rows(of.a_NF, of.down_EDF, of.offsets),
        "da": module.rows(of.dz_TD, of.down_EDF, of.offsets, True, of.order_N, of.top_k),
        "dx": module.rows(of.dh_N2F, of.gate_up_E2FD.flatten(1, 2), of.offsets, transposed=True),
        "gathered": module.rows(of.x_TD, of.down_EDF.mT.contiguous(), of.offsets, False, of.order_N, of.top_k),
        "dgate_up": module.outer(of.dh_N2F, of.x_TD, of.offsets, of.order_N, of.top_k, "x"),
        "ddown": module.outer(of.dz_TD, of.a_NF, of.offsets, of.order_N, of.top_k, "y"),
        "sum": module.outer(of.dz_TD, of.a_NF, of.offsets, of.order_N, of.top_k, "y", of.sum_EDF.clone(), 1),
    }


@DTYPES
def test_wrappers_do_what_the_reference_does(interpreted: Interpreted, dtype: torch.dtype) -> None:
    of = inputs(CASES["elsewhere"], dtype)
    got, want, count = interpreted(by_wrappers, of), by(reference, of), int(of.offsets[-1])
    for name, values in want.items():
        assert got[name].dtype == values.dtype
        assert got[name].shape == values.shape
        mine, values = (x[:count] if name in (*ROWS, "gathered") else x for x in (got[name], values))
        torch.testing.assert_close(mine, values, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@EVERY_CASE
def test_reference_is_right(case: Case) -> None:
    of = inputs(case, torch.float32)
    got, want = by(reference, of), expected(of)
    want["sum"] = want["ddown"] + of.sum_EDF
    for name, values in want.items():
        mine = got[name][: len(values)].double()
        torch.testing.assert_close(mine, values, rtol=1e-5, atol=1e-5)
        assert not got[name][len(values) :].any(), f"{name}: rows that belong to no expert are not 0"


def far_rows() -> tuple[Tensor, Tensor]:
    """Products of tokens that begin more than 2^31 numbers after the first. Memory that nobody touches is not there."""
    from flexpert_kernels.grouped_mm.launch import Plan
    from flexpert_kernels.grouped_mm.rows import run_rows

    width = 8192
    tokens = 2**31 // width + 16
    x_TI = torch.empty(tokens, width, dtype=torch.float16)
    x_TI[-16:] = (torch.arange(16 * width).view(16, width) % 7 - 3) / 64
    weight_EOI = (torch.arange(16 * width).view(1, 16, width) % 5 - 2).half() / 64
    order_N = torch.arange(tokens - 1, -1, -1, dtype=torch.int32)
    offsets = torch.tensor([0, 16], dtype=torch.int32)
    how = Plan(Config(16, 16, 2048, num_warps=4, num_stages=3), 1, False)
    y_NO = run_rows(x_TI, weight_EOI, offsets, False, order_N, 1, how)
    return y_NO[:16], x_TI[-16:].flip(0).float() @ weight_EOI[0].float().T


def test_rows_past_two_to_the_31st_number_are_found(interpreted: Interpreted) -> None:
    got, want = interpreted(far_rows)
    torch.testing.assert_close(got.float(), want, rtol=2e-3, atol=1e-4)


MISTAKES: dict[str, tuple[str, Callable[[Inputs], dict[str, Any]], str]] = {
    "dtype": ("rows", lambda of: {"weight": of.down_EDF.half()}, "x and weight: the same type expected"),
    "unsupported": ("rows", lambda of: {"x": of.a_NF.double()}, "x: type .* expected, torch.float64 given"),
    "bf16": ("rows", lambda of: {"x": of.a_NF.bfloat16(), "weight": of.down_EDF.bfloat16()}, "interpreter"),
    "width": ("rows", lambda of: {"x": of.x_TD}, "x: shape"),
    "strides": ("rows", lambda of: {"x": of.a_NF.mT.contiguous().mT}, "x: contiguous memory .* expected, strides"),
    "dimensions": ("rows", lambda of: {"weight": of.down_EDF[0]}, "weight: shape"),
    "experts": ("rows", lambda of: {"offsets": of.offsets[1:]}, "offsets: shape"),
    "offsets": (
        "rows",
        lambda of: {"offsets": of.offsets.long()},
        "offsets: type torch.int32 expected, torch.int64 given",
    ),
    "order": ("up", lambda of: {"order_N": of.order_N.long()}, "order_N: type torch.int32 expected"),
    "top-k": ("up", lambda of: {"top_k": 3}, "order_N: 17 rows of x_TD times top_k = 3 expected, 34 pairs given"),
    "gate-up": ("up", lambda of: {"gate_up_E2FD": of.gate_up_E2FD.flatten(1, 2)}, "gate_up_E2FD: shape"),
    "weight-strides": (
        "up",
        lambda of: {"gate_up_E2FD": of.gate_up_E2FD[:, :, ::2]},
        "gate_up_E2FD: contiguous memory",
    ),
    "gathered": ("outer", lambda of: {"gathered": "z"}, "gathered: None, 'y' or 'x' expected, 'z' given"),
    "no-order": ("outer", lambda of: {"order_N": None}, "order_N: the order of rows expected"),
    "rows": ("outer", lambda of: {"gathered": None}, "y: shape"),
    "beta": ("outer", lambda of: {"beta": 1}, "beta: 0, or 1 with an `out` to add to expected, 1 given"),
    "out": ("outer", lambda of: {"out": of.sum_EDF.half()}, "out: type torch.float32 expected"),
    "out-shape": ("outer", lambda of: {"out": of.sum_EDF[1:]}, "out: shape"),
}


def mistaken(name: str) -> None:
    from flexpert_kernels.grouped_mm import triton

    of = inputs(CASES["elsewhere"], torch.float32)
    kernel, wrong, _ = MISTAKES[name]
    right: dict[str, dict[str, Any]] = {
        "rows": {"x": of.a_NF, "weight": of.down_EDF, "offsets": of.offsets},
        "up": {"x_TD": of.x_TD, "order_N": of.order_N, "top_k": of.top_k, "gate_up_E2FD": of.gate_up_E2FD,
               "offsets": of.offsets},
        "outer": {"y": of.dz_TD, "x": of.a_NF, "offsets": of.offsets, "order_N": of.order_N, "top_k": of.top_k,
                  "gathered": "y"},
    }  # fmt: skip
    getattr(triton, kernel)(**{**right[kernel], **wrong(of)})


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(interpreted: Interpreted, name: str) -> None:
    with pytest.raises(ValueError, match=MISTAKES[name][2]):
        interpreted(mistaken, name)


def test_cpu_tensors_need_the_interpreter() -> None:
    with pytest.raises(ValueError, match="x_TD: a CUDA device, or TRITON_INTERPRET=1, expected, cpu given"):
        by_wrappers(inputs(CASES["one-token"], torch.float32))
