"""Rows of `test_compiled.py` for the kernels of route, combine and swiglu: hidden 4096, FFN 11008, bf16 rows."""

from dataclasses import replace
from typing import Any

from compiled import Case
from flexpert_kernels.combine import triton as combine
from flexpert_kernels.route import triton as route
from flexpert_kernels.swiglu import triton as swiglu
from triton import next_power_of_2

HIDDEN, FFN = 4096, 11008
# Loads and stores of 16 bytes.
WIDE = dict.fromkeys((80, 90, 100), (r"LDG\.E\.128", r"STG\.E\.128"))


def routing(num_experts: int, top_k: int, bias: bool) -> Case:
    block_e = next_power_of_2(num_experts)
    return Case(
        name=f"route E={num_experts} K={top_k}",
        kernel=route.route_kernel,
        signature={"logits": "*fp32", "probs": "*fp32", "weights": "*fp32", "indices": "*i64", "normalisers": "*fp32",
                   "num_tokens": "i32", **({"bias": "*fp32"} if bias else {})},
        constexprs={"E": num_experts, "K": top_k, "RENORMALISE": bias, "BLOCK_E": block_e,
                    "BLOCK_T": max(1, route.ELEMENTS // 4 // block_e), "BLOCK_K": next_power_of_2(top_k),
                    **({} if bias else {"bias": None})},
    )  # fmt: skip


def sorting(num_experts: int) -> list[Case]:
    block_n, block_e, _, _ = route.tiles(1 << 16, num_experts)
    sizes = {"E": num_experts, "BLOCK_N": block_n, "BLOCK_E": block_e}
    pairs = {"indices": "*i64", "counts": "*i32", "num_pairs": "i32", "rounds": "i32"}
    results = {"order": "*i32", "places": "*i32", "offsets": "*i32", "num_tiles": "i32"}
    return [
        Case(f"count E={num_experts}", route.count_kernel, pairs, sizes),
        Case(
            f"place E={num_experts}", route.place_kernel, {**pairs, **results}, sizes, {"num_warps": route.PLACE_WARPS}
        ),
    ]


def combining(top_k: int, weighted: bool) -> list[Case]:
    block = combine.ELEMENTS
    sizes: dict[str, Any] = {"K": top_k, "BLOCK_T": 1, "BLOCK_D": block, "EVEN": HIDDEN % block == 0}
    tokens = {"num_tokens": "i32", "width": "i32:16", "places": "*i32", "end": "*i32", "y": "*bf16"}
    if weighted:
        tokens["weights"] = "*fp32"
    else:
        sizes["weights"] = None
    words = f"K={top_k}" + ("" if weighted else " unweighted")
    cases = [Case(f"combine {words}", combine.combine_kernel, {**tokens, "z": "*bf16"}, sizes, instructions=WIDE)]
    if weighted:
        signature = {**tokens, "dz": "*bf16", "dy": "*bf16", "dweights": "*fp32"}
        cases.append(
            Case(f"combine_backward {words}", combine.combine_backward_kernel, signature, sizes, instructions=WIDE)
        )
    return cases


def gating(weighted: bool, masked: bool) -> list[Case]:
    block = swiglu.ELEMENTS
    sizes: dict[str, Any] = {"BLOCK_N": 1, "BLOCK_F": block, "EVEN": FFN % block == 0}
    rows = {"h": "*bf16", "a": "*bf16", "allocated": "i32", "width": "i32:16"}
    given = {"da": "*bf16", "dh": "*bf16"}
    for name, kind, present in (("weights", "*fp32", weighted), ("num_rows", "*i32", masked)):
        if present:
            rows[name] = kind
        else:
            sizes[name] = None
    words = ", ".join(word for word, present in (("weighted", weighted), ("num_rows", masked)) if present) or "plain"
    backward_sizes = sizes if weighted else {**sizes, "dweights": None}
    backward = {**rows, **given, **({"dweights": "*fp32"} if weighted else {})}
    return [
        Case(f"swiglu {words}", swiglu.swiglu_kernel, rows, sizes, instructions=WIDE),
        Case(f"swiglu_backward {words}", swiglu.swiglu_backward_kernel, backward, backward_sizes, instructions=WIDE),
    ]


SMALL: list[Case] = [
    routing(8, 2, bias=False),
    routing(64, 8, bias=True),
    *sorting(8),
    *sorting(64),
    *(
        replace(case, archs=(80,))  # the limits, where registers are scarcest
        for case in [routing(256, 8, bias=True), *sorting(1), *sorting(256), *combining(1, weighted=True)]
    ),
    *combining(2, weighted=True),
    *combining(8, weighted=True),
    *combining(8, weighted=False),
    *gating(weighted=False, masked=False),
    *gating(weighted=True, masked=True),
]
