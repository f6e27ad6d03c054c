"""Adding to an assembled model: the model that would have been assembled from all contributions at once."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest

from flexpert.assembly.add import add
from flexpert.assembly.assemble import assemble
from flexpert.assembly.record import read_assembly, write_assembly
from flexpert.assembly.remove import remove
from flexpert.cli import run_stage

Refused = Callable[..., AbstractContextManager[None]]
Maker = Callable[..., Path]
IDS = ("news", "herald", "math", "code")


@pytest.fixture
def model(shared_base: Path, contributions: dict[str, Path], tmp_path: Path) -> Path:
    """A model of news and herald."""
    assemble(shared_base, [contributions["news"], contributions["herald"]], tmp_path / "model")
    return tmp_path / "model"


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("max_file_bytes", [5 << 30, 20_000])
@pytest.mark.parametrize("kind", ["contributions", "biased"])
def test_adding_equals_assembling_all_byte_for_byte(
    kind: str, max_file_bytes: int, shared_base: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    paths = list(request.getfixturevalue(kind).values())
    for active in (None, 2):
        folder = tmp_path / str(active)
        assemble(shared_base, paths, folder / "all", active_experts=active, max_file_bytes=max_file_bytes)
        for first in (1, 2, 3):
            some, more = folder / f"some-{first}", folder / f"more-{first}"
            assemble(shared_base, paths[:first], some, active_experts=active, max_file_bytes=max_file_bytes)
            record = add(some, paths[first:], more, active_experts=active, max_file_bytes=max_file_bytes)
            assert record == read_assembly(more)
            assert content(more) == content(folder / "all")


@pytest.mark.parametrize("kind", ["contributions", "biased"])
def test_a_replaced_expert_keeps_its_place(
    kind: str,
    shared_base: Path,
    make_contribution: Maker,
    tmp_path: Path,
    refused: Refused,
    request: pytest.FixtureRequest,
) -> None:
    paths: dict[str, Path] = request.getfixturevalue(kind)
    assemble(shared_base, [paths["news"], paths["herald"]], tmp_path / "model")
    newer = make_contribution(tmp_path / "newer" / "news", shared_base, seed=77, bias=kind == "biased")
    with refused(tmp_path / "model", "'news'", newer, "replace=true"):
        add(tmp_path / "model", [newer, paths["math"]], tmp_path / "added")
    assert not (tmp_path / "added").exists()
    add(tmp_path / "model", [newer, paths["math"]], tmp_path / "added", replace_known=True)
    assemble(shared_base, [newer, paths["herald"], paths["math"]], tmp_path / "all")
    assert content(tmp_path / "added") == content(tmp_path / "all")
    old = json.loads((paths["news"] / "contribution.json").read_text())["digest"].removeprefix("sha256:")
    assert all(old.encode() not in data for data in content(tmp_path / "added").values())


def test_taking_out_and_putting_back_gives_the_same_model(
    model: Path, contributions: dict[str, Path], tmp_path: Path
) -> None:
    remove(model, ["herald"], tmp_path / "without")
    add(tmp_path / "without", [contributions["herald"]], tmp_path / "again")
    assert content(tmp_path / "again") == content(model)


@pytest.mark.parametrize("kind", ["contributions", "biased"])
def test_a_model_of_the_public_expert_alone_takes_either_kind_of_router(
    kind: str, shared_base: Path, contributions: dict[str, Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    paths = list(request.getfixturevalue(kind).values())
    assemble(shared_base, [contributions["news"]], tmp_path / "model")
    remove(tmp_path / "model", ["news"], tmp_path / "public")
    add(tmp_path / "public", paths, tmp_path / "added")
    assemble(shared_base, paths, tmp_path / "all")
    assert content(tmp_path / "added") == content(tmp_path / "all")


def test_a_model_without_the_public_expert_can_be_added_to(
    shared_base: Path, model: Path, contributions: dict[str, Path], tmp_path: Path
) -> None:
    remove(model, ["public"], tmp_path / "private")
    add(tmp_path / "private", [contributions["math"]], tmp_path / "added")
    add(model, [contributions["math"]], tmp_path / "all")
    remove(tmp_path / "all", ["public"], tmp_path / "expected")
    assert content(tmp_path / "added") == content(tmp_path / "expected")


def test_k_is_that_of_the_model_unless_it_uses_all_or_another_is_given(
    shared_base: Path, contributions: dict[str, Path], tmp_path: Path, refused: Refused
) -> None:
    paths = list(contributions.values())
    assemble(shared_base, paths[:2], tmp_path / "two", active_experts=2)
    assert add(tmp_path / "two", paths[2:], tmp_path / "two of five").active_experts == 2
    assert add(tmp_path / "two", paths[2:], tmp_path / "four", active_experts=4).active_experts == 4
    for active in (0, 6):
        with refused(f"active_experts={active}", "5"):
            add(tmp_path / "two", paths[2:], tmp_path / "none", active_experts=active)


def test_what_does_not_fit_the_model_is_refused_and_nothing_is_left(
    model: Path,
    contributions: dict[str, Path],
    biased: dict[str, Path],
    make_base: Maker,
    make_contribution: Maker,
    tmp_path: Path,
    refused: Refused,
) -> None:
    base = make_base(tmp_path / "other")
    data = bytearray((base / "model.safetensors").read_bytes())
    data[-4] ^= 1
    (base / "model.safetensors").write_bytes(data)
    foreign = make_contribution(tmp_path / "foreign", base)
    before = set(tmp_path.iterdir())
    with refused(foreign, model, "another base"):
        add(model, [foreign], tmp_path / "added")
    with refused(model, biased["math"], "router.bias"):
        add(model, [biased["math"]], tmp_path / "added")
    with refused("'math'", contributions["math"], "give one of them"):
        add(model, [contributions["math"], contributions["math"]], tmp_path / "added")
    with refused(base, "assembly.json"):
        add(base, [contributions["math"]], tmp_path / "added")
    for name in ("trunk.safetensors", "expert-herald.safetensors", "router.safetensors"):
        whole = (model / name).read_bytes()
        (model / name).write_bytes(whole[:-4] + bytes([whole[-4] ^ 1]) + whole[-3:])
        with refused(model / name, "altered"):
            add(model, [contributions["math"]], tmp_path / "added")
        (model / name).write_bytes(whole)
    assert set(tmp_path.iterdir()) == before


def test_a_model_whose_router_was_tuned_is_refused(
    model: Path, contributions: dict[str, Path], tmp_path: Path, refused: Refused
) -> None:
    write_assembly(model, replace(read_assembly(model), tuned=True))
    with refused(model, "tuned together", "before tune_router"):
        add(model, [contributions["math"]], tmp_path / "added")


def test_the_command_adds_and_names_what_is_missing(
    shared_base: Path, model: Path, contributions: dict[str, Path], tmp_path: Path, refused: Refused
) -> None:
    math, output = f"contributions={contributions['math']}", f"output_dir={tmp_path / 'added'}"
    for overrides, part in (
        ([math, output], "either base=DIR"),
        ([math, output, f"base={shared_base}", f"model={model}"], "either base=DIR"),
        ([math, output, f"base={shared_base}", "replace=true"], "replace=true needs model=DIR"),
        ([math, output, f"model={model}", "max_file_bytes=0"], "max_file_bytes=0 must be positive"),
    ):
        with refused(part):
            run_stage("assemble", overrides)
    run_stage("assemble", [math, output, f"model={model}"])
    assert [expert.id for expert in read_assembly(tmp_path / "added").experts] == ["public", "news", "herald", "math"]
