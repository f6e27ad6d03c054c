"""Tile sizes of the grouped matrix products: a default for each chip, or what `tune` found to be fastest on this one.

Nothing here depends on the number of tokens, which differs from batch to batch: a product is known by its kernel, the
two widths of its matrices (n outputs, k inputs) and its dtype. What `tune` finds is kept in
$XDG_CACHE_HOME/flexpert/tiles.json (~/.cache if that is not set), apart for each device, Triton and PyTorch.
"""

import functools
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:  # importing it imports Triton
    from flexpert_kernels.grouped_mm.launch import Plan


@dataclass(frozen=True)
class Config:
    """How a product is cut up: a program computes block_m × block_n results, block_k of the summed dimension at a time.

    Attributes:
        num_warps, num_stages: warps of a program, and how many blocks of its operands are held at once.
        group_m: so many tiles one below the other come before the next columns' turn, so that both operands of all
            tiles at work at one time fit the L2 cache.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8


@dataclass(frozen=True)
class Tuned:
    """A product's fastest tiles: n × k matrices, milliseconds, TFLOP/s, and why other candidates do not run here."""

    kernel: str
    n: int
    k: int
    config: Config
    milliseconds: float
    tflops: float
    failed: Mapping[Config, str]


def candidates(kernel: str, dtype: torch.dtype, capability: tuple[int, int] | None) -> list[Config]:
    """Tiles that are worth trying, the default first. `capability` None: Triton's interpreter.

    Kernels are "up", "rows", "rows_transposed", "outer_y" and "outer_x"; the last two say which operand is gathered
    (`outer_x` if none is). A tile's narrow side is the gathered one, whose rows take threads' time; TMA reads the
    other.
    Tests compile the defaults for sm_80, sm_86, sm_90, sm_100 and sm_120 and let nothing spill.
    """
    outer = kernel.startswith("outer")
    if dtype == torch.float32 or capability is None:
        return [Config(64, 64, 32, 8, 3), Config(32, 64, 32, 4, 3)]
    if capability == (8, 0):
        if outer:
            return [Config(128, 256, 32, 8, 3), Config(128, 128, 64, 8, 3), Config(128, 128, 32, 4, 4)]
        first = Config(128, 256, 64, 8, 3)
        return [first, replace(first, group_m=16), Config(128, 256, 32, 8, 4), Config(128, 128, 64, 8, 4)]
    if capability[0] not in (9, 10):  # 99 KiB of shared memory
        return [Config(128, 128, 32, 8, 3), Config(64, 128, 32, 4, 3)]
    if outer:
        tall, broad = Config(256, 128, 64, 8, 3), Config(128, 256, 64, 8, 3)
        first, second = (tall, broad) if kernel == "outer_x" and capability[0] == 9 else (broad, tall)
        return [first, replace(first, group_m=4), replace(first, group_m=16), second, Config(128, 128, 64, 8, 3)]
    variants = [Config(128, 256, 64, 8, stages, group) for stages in (4, 3) for group in (8, 4, 16)]
    return [*variants, Config(128, 128, 64, 8, 4), Config(64, 256, 64, 4, 4)]


def chosen(kernel: str, n: int, k: int, dtype: torch.dtype, device: torch.device) -> Config:
    """The tiles of a product: what `tune` found on this device, else the default."""
    return chosen_once(kernel, n, k, dtype, device, cache_file())


@functools.cache
def chosen_once(kernel: str, n: int, k: int, dtype: torch.dtype, device: torch.device, file: Path) -> Config:
    known = candidates(kernel, dtype, capability(device))
    entry = read(file).get(machine(device), {}).get(product(kernel, n, k, dtype))
    return next((config for config in known if entry is not None and asdict(config) == entry), known[0])


def capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


@functools.cache
def machine(device: torch.device) -> str:
    """What a choice is valid for."""
    import triton

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{name}, triton {triton.__version__}, torch {torch.__version__}"


def product(kernel: str, n: int, k: int, dtype: torch.dtype) -> str:
    return f"{kernel} {n}x{k} {str(dtype).removeprefix('torch.')}"


def cache_file() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flexpert" / "tiles.json"


def load(file: Path) -> dict[str, dict[str, Any]] | None:
    """What was tuned, by machine and product; None if this is not what `write` wrote, or cannot be read."""
    try:
        tuned = json.loads(file.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError):
        return None
    return tuned if isinstance(tuned, dict) and all(isinstance(found, dict) for found in tuned.values()) else None


@functools.cache
def read(file: Path) -> dict[str, dict[str, Any]]:
    tuned = load(file)
    if tuned is None:
        warnings.warn(f"{file} is damaged and is ignored; `flexpert tune_kernels` writes it anew", stacklevel=2)
    return tuned or {}


def write(file: Path, device: torch.device, found: Mapping[str, Config]) -> None:
    """Adds to the file; a reader sees the old one or the new one."""
    tuned = load(file) or {}
    tuned.setdefault(machine(device), {}).update({name: asdict(config) for name, config in found.items()})
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".tmp", delete=False, encoding="utf-8") as temporary:
        json.dump(tuned, temporary, indent=1)
        temporary.flush()
        os.fsync(temporary.fileno())
    os.replace(temporary.name, file)
    read.cache_clear()
    chosen_once.cache_clear()


def tune(
    hidden: int,
    ffn: int,
    num_experts: int,
    rows: int,
    device: torch.device,
    dtype: torch.dtype,
    timer: Callable[[Callable[[], object]], float] | None = None,
) -> list[Tuned]:
    """Times the candidates of each product of a layer and keeps the fastest for this device.

    Args:
        hidden, ffn, num_experts: the layer; the experts are those that this device holds.
        rows: tokens times active experts of a microbatch, spread evenly over the experts.
        timer: milliseconds of a function; Triton's `do_bench` if left out.

    Returns: what was chosen, for one product of the layer after another. Needs memory for the weights of a layer, their
        gradients, and the rows.

    Raises:
        ValueError: no candidate of a product runs on this device. Nothing is kept.
    """
    from triton.errors import TritonError

    if timer is None:
        from triton.testing import do_bench

        timer = do_bench
    results = []
    with torch.cuda.device(device if device.type == "cuda" else -1):  # -1: as it is
        for kernel, n, k, run in products(hidden, ffn, num_experts, rows, device, dtype):
            known = candidates(kernel, dtype, capability(device))
            times, failed = dict[Config, float](), dict[Config, str]()
            for config in known:
                try:
                    times[config] = timer(functools.partial(run, config))
                except torch.OutOfMemoryError:  # the caller's rows are too many for any candidate
                    raise
                except (TritonError, RuntimeError) as error:  # the latter from LLVM; other chips take other tiles
                    failed[config] = f"{type(error).__name__}: {error}"
            if not times:
                raise ValueError(f"no tiles of {kernel} for {n} x {k} matrices run here; {failed[known[0]]}")
            config = min(times, key=times.__getitem__)
            tflops = 2 * rows * n * k / times[config] * 1e-9
            results.append(Tuned(kernel, n, k, config, times[config], tflops, failed))
    write(cache_file(), device, {product(row.kernel, row.n, row.k, dtype): row.config for row in results})
    return results


def products(
    hidden: int, ffn: int, num_experts: int, rows: int, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, int, int, Callable[[Config], object]]]:
    """The products of a layer's forward and backward pass: kernel, n, k, and a function that computes it."""
    from flexpert_kernels.grouped_mm.outer import run_outer
    from flexpert_kernels.grouped_mm.rows import run_rows
    from flexpert_kernels.grouped_mm.up import run_up

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    x_TD, h_N2F, a_NF = random(rows, hidden), random(rows, 2 * ffn), random(rows, ffn)
    gate_up_E2FD, down_EDF = random(num_experts, 2, ffn, hidden), random(num_experts, hidden, ffn)
    order_N = torch.randperm(rows, device=device).int()
    offsets = torch.linspace(0, rows, num_experts + 1, device=device).int()
    of_layer: list[tuple[str, int, int, Callable[[Plan], object]]] = [
        ("up", 2 * ffn, hidden, lambda how: run_up(x_TD, order_N, 1, gate_up_E2FD, offsets, how)),
        ("rows", hidden, ffn, lambda how: run_rows(a_NF, down_EDF, offsets, False, None, 1, how)),
        ("rows_transposed", ffn, hidden, lambda how: run_rows(x_TD, down_EDF, offsets, True, order_N, 1, how)),
        ("rows_transposed", hidden, 2 * ffn,
         lambda how: run_rows(h_N2F, gate_up_E2FD.flatten(1, 2), offsets, True, None, 1, how)),
        ("outer_y", hidden, ffn, lambda how: run_outer(x_TD, a_NF, offsets, order_N, 1, "y", None, 0, how)),
        ("outer_x", 2 * ffn, hidden, lambda how: run_outer(h_N2F, x_TD, offsets, order_N, 1, "x", None, 0, how)),
    ]  # fmt: skip
    for kernel, n, k, run in of_layer:
        yield kernel, n, k, functools.partial(planned, run, device)


def planned(run: Callable[["Plan"], object], device: torch.device, config: Config) -> object:
    from flexpert_kernels.grouped_mm.launch import Plan, resources

    return run(Plan(config, *resources(device)))
