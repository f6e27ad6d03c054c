"""What the kernels become for each kind of GPU at production shapes, found without one: compiled, not run.

resources.json holds registers, spills and shared memory of each kernel. `python tests/kernels/test_compiled.py` writes
it anew; look at the difference before committing it.
"""

import importlib.util
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton
from compiled import SHARED_LIMIT, Case, Compiled, compile_case
from flexpert_kernels.grouped_mm.outer import outer_kernel
from flexpert_kernels.grouped_mm.rows import rows_kernel
from flexpert_kernels.grouped_mm.up import up_kernel
from flexpert_kernels.tuning import Config, candidates

pytestmark = pytest.mark.slow

RESOURCES = Path(__file__).with_name("resources.json")
HIDDEN, FFN, EXPERTS, TOP_K = 4096, 11008, 8, 2
INDICES = {"order": "*i32", "offsets": "*i32"}
# The tensor cores' instruction, and how operands are fetched: LDGSTS by threads, UTMALDG by TMA.
PRODUCTS = {
    80: ("HMMA", "LDGSTS"),
    86: ("HMMA", "LDGSTS"),
    90: ("HGMMA", "UTMALDG"),
    100: ("UTCHMMA", "UTMALDG"),
    120: ("HMMA", "UTMALDG"),
}
# Bytes of a stack that no register is kept in: on sm_120 8 are set to 0 once, and never read.
STACK = {120: 8}


# On other chips than Hopper, left to their more demanding likes; on those with less shared memory, one of each kernel.
SIMILAR = ("rows (dx)", "outer (dW1, dW3)", "outer (dW2)")
ONE_EACH = ("up", "rows (da)", "outer (dW1, dW3 added in fp32)")


def tiles(config: Config) -> dict[str, int]:
    return {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "GROUP_M": config.group_m}


def block(*sizes: int) -> str:
    return f"tensordesc<bf16[{','.join(map(str, sizes))}]>"


def grouped(
    name: str, kernel: object, arch: int, config: Config, signature: dict[str, str], **constexprs: object
) -> Case:
    return Case(
        name,
        kernel,
        signature,
        {"TOP_K": TOP_K, "EXPERTS": EXPERTS, "TMA": arch >= 90, **tiles(config), **constexprs},
        {"num_warps": config.num_warps, "num_stages": config.num_stages},
        (arch,),
        PRODUCTS,
        fetches_ahead=True,
    )


def rows_case(name: str, arch: int, outputs: int, inputs: int, transposed: bool, gather: bool) -> Case:
    config = default("rows_transposed" if transposed else "rows", arch)
    tma = arch >= 90
    weight = (config.block_k, config.block_n) if transposed else (config.block_n, config.block_k)
    signature = {
        "x": block(config.block_m, config.block_k) if tma and not gather else "*bf16",
        "weight": block(1, *weight) if tma else "*bf16",
        **INDICES,
        "y": "*bf16",
    }
    return grouped(
        name, rows_kernel, arch, config, signature, OUTPUTS=outputs, INPUTS=inputs, TRANSPOSED=transposed, GATHER=gather
    )


def up_case(arch: int) -> Case:
    config = default("up", arch)
    gate_up = block(2, config.block_n // 2, config.block_k) if arch >= 90 else "*bf16"
    signature = {"x": "*bf16", "gate_up": gate_up, **INDICES, "h": "*bf16", "a": "*bf16"}
    return grouped("up", up_kernel, arch, config, signature, FFN=FFN, INPUTS=HIDDEN)


def outer_case(name: str, arch: int, outputs: int, inputs: int, gathered: str, out: str) -> Case:
    config = default(f"outer_{gathered}", arch)
    y, x = block(config.block_k, config.block_m), block(config.block_k, config.block_n)
    signature = {
        "y": y if arch >= 90 and gathered == "x" else "*bf16",
        "x": x if arch >= 90 and gathered == "y" else "*bf16",
        **INDICES,
        "out": f"*{out}",
    }
    case = grouped(
        name, outer_kernel, arch, config, signature, OUTPUTS=outputs, INPUTS=inputs,
        GATHER_Y=gathered == "y", GATHER_X=gathered == "x", ADD=out == "fp32",
    )  # fmt: skip
    return replace(case, options={"num_warps": config.num_warps, "num_stages": 2 * config.num_stages - 1})


def default(kernel: str, arch: int) -> Config:
    return candidates(kernel, torch.bfloat16, (arch // 10, arch % 10))[0]


CASES = [
    case
    for arch in PRODUCTS
    for case in (
        up_case(arch),
        rows_case("rows (y = W2 a)", arch, HIDDEN, FFN, transposed=False, gather=False),
        rows_case("rows (da)", arch, FFN, HIDDEN, transposed=True, gather=True),
        rows_case("rows (dx)", arch, HIDDEN, 2 * FFN, transposed=True, gather=False),
        outer_case("outer (dW1, dW3)", arch, 2 * FFN, HIDDEN, "x", "bf16"),
        outer_case("outer (dW1, dW3 added in fp32)", arch, 2 * FFN, HIDDEN, "x", "fp32"),
        outer_case("outer (dW2)", arch, HIDDEN, FFN, "y", "bf16"),
        outer_case("outer (dW2 added in fp32)", arch, HIDDEN, FFN, "y", "fp32"),
    )
    if arch == 90 or (case.name in ONE_EACH if arch in (86, 120) else case.name not in SIMILAR)
]
if importlib.util.find_spec("compiled_small"):  # the kernels of route, combine and swiglu
    from compiled_small import SMALL

    CASES += SMALL
ROWS = [(case, arch) for case in CASES for arch in case.archs]


def key(case: Case, arch: int) -> str:
    return f"{case.name} sm_{arch}"


def figures(compiled: Compiled) -> dict[str, int]:
    return {"registers": compiled.registers, "spills": compiled.spills, "shared": compiled.shared}


@pytest.mark.parametrize(("case", "arch"), ROWS, ids=[key(case, arch).replace(" ", "-") for case, arch in ROWS])
def test_compiles_within_the_chips_means(case: Case, arch: int) -> None:
    compiled = compile_case(case, arch)
    assert compiled.spills == STACK.get(arch, 0)
    assert compiled.shared <= SHARED_LIMIT[arch]
    instructions = case.instructions.get(arch, ())
    sass = compiled.sass() if instructions else ""
    for instruction in instructions:
        assert re.search(rf"\b{instruction}", sass), f"no {instruction}"
    if case.fetches_ahead:
        before_loop, _, loop = compiled.ttgir.rpartition("scf.for")
        assert re.search(r"async_(tma_)?copy_global_to_local", before_loop), "the loop waits for each block"
        assert arch != 90 or "pendings = 1" in loop, "each product is waited for before the next block is fetched"
    table = json.loads(RESOURCES.read_text(encoding="utf-8"))
    if table["triton"] == triton.__version__:
        assert figures(compiled) == table["kernels"][key(case, arch)], "the top of this file says how to write it anew"


def write_resources() -> None:
    kernels = {key(case, arch): figures(compile_case(case, arch)) for case, arch in ROWS}
    rows = ",\n".join(f"    {json.dumps(name)}: {json.dumps(kernels[name])}" for name in kernels)
    RESOURCES.write_text(
        f'{{\n  "triton": {json.dumps(triton.__version__)},\n  "kernels": {{\n{rows}\n  }}\n}}\n', encoding="utf-8"
    )


if __name__ == "__main__":
    write_resources()
