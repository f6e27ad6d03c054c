"""What a kernel becomes for a chip that is not here: compiled by Triton, taken apart by `cuobjdump`, nothing is run.

Only in a process without TRITON_INTERPRET.
"""

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
# Bytes of shared memory that one block may use, by compute capability (CUDA C++ Programming Guide, "Compute
# Capabilities", less what the driver keeps).
SHARED_LIMIT = {80: 166_912, 86: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}


@dataclass(frozen=True)
class Case:
    """A kernel as production starts it. One row of the table of `test_compiled.py`, or of `compiled_small.py`.

    Attributes:
        name: what resources.json calls it (an architecture each is added).
        kernel: the `@triton.jit` function.
        signature: type of each argument that is not a constexpr, in Triton's words: "*bf16", "i32", "fp32",
            "tensordesc<bf16[128,64]>". Pointers are compiled as aligned to 16 bytes, as PyTorch's allocations are; an
            integer that 16 divides (a width) is "i32:16".
        constexprs: value of each other argument.
        options: num_warps, num_stages.
        archs: compute capabilities to compile for.
        instructions: for an architecture, SASS instructions that must occur (a prefix of the mnemonic is enough).
        fetches_ahead: whether the main loop must fetch blocks for later rounds while it multiplies.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, int] = field(default_factory=lambda: {"num_warps": 4})
    archs: tuple[int, ...] = (80, 90, 100)
    instructions: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    fetches_ahead: bool = False


@dataclass(frozen=True)
class Compiled:
    """A kernel on one architecture.

    Attributes:
        registers: of a thread.
        spills: bytes of a thread's registers and arrays that lie in memory instead.
        shared: bytes of shared memory.
        ttgir: the last form of the kernel that is still Triton's own; it shows what overlaps with what.
    """

    registers: int
    spills: int
    shared: int
    ttgir: str
    cubin: bytes

    def sass(self) -> str:
        """The machine code."""
        return cuobjdump("-sass", self.cubin)


def compile_case(case: Case, arch: int) -> Compiled:
    names = case.kernel.arg_names
    assert set(names) == {*case.signature, *case.constexprs}, f"{case.name}: arguments are {names}"
    types = {name: case.signature.get(name, "constexpr") for name in names}
    aligned = [i for i, name in enumerate(names) if types[name].startswith("*") or types[name].endswith(":16")]
    source = ASTSource(
        fn=case.kernel,
        signature={name: kind.removesuffix(":16") for name, kind in types.items()},
        constexprs=dict(case.constexprs),
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(case.options))
    cubin = compiled.asm["cubin"]
    usage = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", cuobjdump("--dump-resource-usage", cubin))
    assert usage
    registers, stack, local = map(int, usage.groups())
    return Compiled(registers, stack + local, compiled.metadata.shared, str(compiled.asm["ttgir"]), cubin)


def cuobjdump(option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([CUOBJDUMP, option, file.name], capture_output=True, text=True, check=True).stdout
