"""What was saved on any layout of the table is loaded on any other, bit for bit."""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core import parallel_state
from ranks import run_ranks
from test_layouts import DENSE, KINDS, MIXED, Kind, build, losses
from torch import Tensor

from flexpert.checkpoint.distributed import Saver, generators, load, trained_state
from flexpert.checkpoint.sharding import gather_to_first, local_part
from flexpert.config.groups import CheckpointConfig, OptimConfig
from flexpert.model.transformer import Transformer
from flexpert.parallel.environment import is_first, rank
from flexpert.parallel.layout import Layout
from flexpert.parallel.mesh import build_meshes, process_groups
from flexpert.parallel.ranks import Ranks
from flexpert.train.optimizer import build_optimizer

pytestmark = pytest.mark.slow

ALONE = Layout(1)
#: Model → the layouts that it is saved on and loaded on; an expert job, of which a part is frozen, on some of them.
TABLE = {"dense": [ALONE, *DENSE], "2 of 4": [ALONE, *MIXED], "expert job": [ALONE, *MIXED[1::3]]}
KEY = bytes(range(32))


def kind_of(name: str) -> Kind:
    """Of one layer: a second one has nothing else."""
    kind = KINDS[name]
    return replace(kind, config=replace(kind.config, num_layers=1))


def on(layout: Layout, kind: str) -> tuple[Transformer, torch.optim.Optimizer, Ranks]:
    process_groups.cache_clear()  # one layout after the other
    parallel_state.destroy_model_parallel()
    meshes = None if layout == ALONE else build_meshes(layout, torch.device("cpu"))
    model = build(kind_of(kind), meshes)
    return model, build_optimizer(model, OptimConfig()), Ranks(meshes)


def tensors(model: Transformer, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    state = trained_state(model, optimizer)
    for name, parameter in state["model"].items():
        yield name, parameter
        for key, value in sorted(state["optimizer"][name].items()):
            yield f"{key} of {name}", value


@torch.no_grad()
def whole(model: Transformer, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """On the first rank."""
    return {name: gather_to_first(value) for name, value in tensors(model, optimizer)}


def next_numbers() -> str:
    """Digest of this rank's random generators."""
    digest = hashlib.sha256()
    for name, value in generators().items():
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


def seed(number: int) -> None:
    """Of every generator, in the middle of what it draws."""
    torch.manual_seed(number), random.seed(number), np.random.seed(number)
    torch.randn(5), random.gauss(0, 1), np.random.randn(3)


def save_on(layouts: dict[int, Layout], kind: str, folder: Path) -> dict[int, str]:
    """On each of some layouts a step of training, saved, and what it is, whole; digests of the generators."""
    found = {}
    for number, layout in layouts.items():
        model, optimizer, ranks = on(layout, kind)
        index, count = ranks.share
        sequences = torch.randint(0, 32, (4, 9), generator=torch.Generator().manual_seed(number))
        total, _ = losses(model, sequences[index::count], ranks)
        total.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        values = whole(model, optimizer)
        if is_first():
            torch.save(values, folder / f"{number}.pt")
        seed(100 * number + rank())
        found[number] = next_numbers()
        saver = Saver(folder / str(number), KEY, CheckpointConfig(keep=1))
        saver.save(1, model, optimizer, {})
        assert saver.wait() is None
        saver.close()
    return found


@torch.no_grad()
def load_on(layouts: dict[int, Layout], kind: str, folder: Path, count: int) -> dict[int, str]:
    """On each of some layouts all that were saved; digests of the generators after loading its own."""
    found, wanted = {}, [torch.load(folder / f"{number}.pt") for number in range(count)]
    for own, layout in layouts.items():
        model, optimizer, _ = on(layout, kind)
        frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
        for number in range(count):
            for _, value in tensors(model, optimizer):
                local_part(value)[0].fill_(torch.nan)
            seed(12345)
            assert load(folder / str(number), KEY, model, optimizer) is not None
            check(model, optimizer, wanted[number])
            if number == own:
                found[own] = next_numbers()
                values = whole(model, optimizer)
                assert not is_first() or all(same(values[name], value) for name, value in wanted[own].items())
        now = dict(model.named_parameters())
        assert all(same(local_part(now[name])[0], local_part(value)[0]) for name, value in frozen.items())
    return found


def check(model: Transformer, optimizer: torch.optim.Optimizer, wanted: dict[str, Tensor]) -> None:
    """That this rank's part of everything is that of the whole, copies included."""
    names = set()
    for name, value in tensors(model, optimizer):
        part, place = local_part(value)
        assert same(part, wanted[name][place]), name
        names.add(name)
    assert names == wanted.keys()


def same(one: Tensor, other: Tensor) -> bool:
    """Bit for bit, where neither is NaN."""
    return torch.equal(one, other) and torch.equal(one.signbit(), other.signbit())


@pytest.mark.parametrize("kind", TABLE)
def test_any_layout_loads_what_any_other_saved(kind: str, tmp_path: Path) -> None:
    """Of those that differ in `sequence` alone, which is about activations, one."""
    layouts = dict(enumerate({replace(layout, sequence=False): layout for layout in TABLE[kind]}.values()))
    sizes = sorted({layout.num_ranks for layout in layouts.values()})
    of = {size: {n: layout for n, layout in layouts.items() if layout.num_ranks == size} for size in sizes}
    saved = {size: run_ranks(save_on, size, of[size], kind, tmp_path) for size in sizes}
    for size in sizes:
        assert run_ranks(load_on, size, of[size], kind, tmp_path, len(layouts)) == saved[size]
