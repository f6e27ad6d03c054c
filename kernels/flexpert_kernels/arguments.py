"""Checks of arguments: what public functions and kernels say of those that do not fit, before anything is computed.

Each raises `ValueError`: NAME: EXPECTED expected, GIVEN given. None reads what a tensor holds: a GPU would have to be
waited for.
"""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
#: That kernels take.
KERNEL_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
INTEGERS = (torch.int32, torch.int64)


def expect(is_so: bool, name: str, expected: str, given: Any) -> None:
    if not is_so:
        raise ValueError(f"{name}: {expected} expected, {given} given")


def check_dtype(name: str, x: Tensor, allowed: Sequence[torch.dtype]) -> None:
    if x.dtype not in allowed:
        expect(False, name, f"type {' or '.join(map(str, allowed))}", x.dtype)


def check_same(what: str, values: Mapping[str, Any]) -> None:
    """Of arguments by name. Those are to blame that differ from most; all, where most do not agree."""
    if len(set(values.values())) == 1:
        return
    usual, count = Counter(values.values()).most_common(1)[0]
    is_usual = 2 * count > len(values)
    names = [name for name, value in values.items() if not is_usual or value != usual]
    expected = f"{what} = {usual}" if is_usual else f"the same {what}"
    expect(False, " and ".join(names), expected, " and ".join(str(values[name]) for name in names))


def check_tensors(floats: Mapping[str, Tensor], integers: Mapping[str, Tensor] | None = None) -> None:
    """Tensors on one device, of the shapes that their names end in, such as _E2FD.

    A digit is a size. A letter is one size wherever it stands; only T and N, tokens and rows, may be 0.
    """
    tensors, sizes = {**floats, **(integers or {})}, dict[str, dict[str, int]]()
    for name, x in tensors.items():
        expect(isinstance(x, Tensor), name, "a tensor", type(x).__name__)
        check_dtype(name, x, FLOATS if name in floats else INTEGERS)
        letters, shape = name.rpartition("_")[2], tuple(x.shape)
        fits = len(letters) == len(shape)
        for letter, size in zip(letters, shape, strict=False):
            if letter.isdigit():
                fits = fits and size == int(letter)
            else:
                sizes.setdefault(letter, {})[name] = size
        if not fits:
            expect(False, name, f"shape ({', '.join(letters)})", shape)
    check_same("device", {name: x.device for name, x in tensors.items()})
    for letter in sorted(sizes, key=lambda letter: -len(sizes[letter])):  # of what more have, most is easier told
        check_same(letter, sizes[letter])
        if letter not in "TN" and 0 in sizes[letter].values():
            expect(False, " and ".join(sizes[letter]), f"{letter} of at least 1", 0)


def check_count(name: str, count: int, most: int) -> None:
    is_count = isinstance(count, int) and not isinstance(count, bool)
    expect(is_count and 1 <= count <= most, name, f"an integer from 1 to {most}", count)


def check_kernel(**tensors: Tensor) -> None:
    """For Triton: one device, one type that it takes, dense and in order."""
    first, x = next(iter(tensors.items()))
    check_dtype(first, x, KERNEL_FLOATS)
    check_same("type", {name: other.dtype for name, other in tensors.items()})
    for name, other in tensors.items():
        check_layout(name, other, x.device)
    if x.device.type == "cpu":
        expect(os.environ.get("TRITON_INTERPRET") == "1", first, "a CUDA device, or TRITON_INTERPRET=1,", x.device)
        wrong = x.dtype == torch.bfloat16
        expect(not wrong, first, "fp16 or fp32 in Triton's interpreter, which multiplies bf16 wrongly,", x.dtype)


def check_layout(name: str, x: Tensor, device: torch.device) -> None:
    expect(x.device == device, name, f"device = {device}", x.device)
    if not x.is_contiguous():
        expect(False, name, f"contiguous memory for shape {tuple(x.shape)}", f"strides {x.stride()}")


def check_shape(name: str, x: Tensor, shape: Sequence[int | None]) -> None:
    """None: any size."""
    if x.dim() != len(shape) or any(size not in (None, has) for size, has in zip(shape, x.shape, strict=True)):
        expected = ", ".join("any" if size is None else str(size) for size in shape)
        expect(False, name, f"shape ({expected})", tuple(x.shape))


def check_index(name: str, x: Tensor, length: int | None, device: torch.device) -> None:
    check_dtype(name, x, (torch.int32,))
    check_shape(name, x, (length,))
    check_layout(name, x, device)


def check_tokens(name: str, x: Tensor, order_N: Tensor, top_k: int) -> None:
    """`order_N // top_k` must be rows of `x`."""
    fits = top_k >= 1 and len(order_N) == len(x) * top_k
    expect(fits, "order_N", f"{len(x)} rows of {name} times top_k = {top_k}", f"{len(order_N)} pairs")
