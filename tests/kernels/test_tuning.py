"""The choice of tile sizes: defaults, what tuning finds, and what a cache that cannot be trusted does: nothing."""

import json
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from flexpert_kernels.tuning import Config, Tuned, candidates, chosen, tune
from triton.runtime.errors import OutOfResources

CPU = torch.device("cpu")
KERNELS = ("up", "rows", "rows_transposed", "outer_x", "outer_y")
CAPABILITIES = [None, (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]
DEFAULT, OTHER = candidates("up", torch.float32, None)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "flexpert" / "tiles.json"


def of_up(n: int = 48, k: int = 16, dtype: torch.dtype = torch.float32) -> Config:
    return chosen("up", n, k, dtype, CPU)


def tuned(milliseconds: Callable[[Config], float]) -> list[Tuned]:
    """A layer of width 16 and FFN width 24, by a timer that runs nothing."""

    def timer(run: Any) -> float:
        config = run.args[-1]
        assert isinstance(config, Config)
        return milliseconds(config)

    return tune(16, 24, 2, 10, CPU, torch.float32, timer)


def second_is_faster(config: Config) -> float:
    return 1.0 if config == OTHER else 2.0


@pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_candidates_are_few_and_different(kernel: str, capability: tuple[int, int] | None) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        known = candidates(kernel, dtype, capability)
        assert 0 < len(known) == len(set(known)) <= 8


def test_default_without_a_cache(cache: Path) -> None:
    assert of_up() == DEFAULT
    assert not cache.exists()


def test_fastest_candidate_is_kept_for_its_product_alone(cache: Path) -> None:
    assert of_up() == DEFAULT  # and that is not remembered once there is something better
    rows = tuned(second_is_faster)
    assert {row.config for row in rows} == {OTHER}
    assert of_up() == OTHER
    assert of_up(n=96) == DEFAULT
    assert of_up(dtype=torch.float16) == DEFAULT
    assert [path.name for path in cache.parent.iterdir()] == [cache.name]


def test_every_product_of_a_layer_is_tuned(cache: Path) -> None:
    rows = tuned(second_is_faster)
    assert [(row.kernel, row.n, row.k) for row in rows] == [
        ("up", 48, 16),
        ("rows", 16, 24),
        ("rows_transposed", 24, 16),
        ("rows_transposed", 16, 48),
        ("outer_y", 16, 24),
        ("outer_x", 48, 16),
    ]
    assert all(row.milliseconds == 1.0 and row.tflops == 2 * 10 * row.n * row.k * 1e-9 for row in rows)


def test_tuning_again_replaces_what_was_found_and_keeps_other_machines(cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_text(json.dumps({"another machine": {"up 48x16 float32": asdict(OTHER)}}))
    assert of_up() == DEFAULT
    tuned(second_is_faster)
    tuned(lambda config: -second_is_faster(config))
    assert of_up() == DEFAULT
    machines = json.loads(cache.read_text())
    assert len(machines) == 2
    assert machines["another machine"] == {"up 48x16 float32": asdict(OTHER)}


@pytest.mark.parametrize("broken", [DEFAULT, OTHER], ids=["default", "other"])
@pytest.mark.parametrize(
    "error", [OutOfResources(1, 2, "shared memory"), RuntimeError("PassManager")], ids=["resources", "llvm"]
)
def test_candidate_that_does_not_compile_is_passed_over_and_says_why(
    cache: Path, broken: Config, error: Exception
) -> None:
    def milliseconds(config: Config) -> float:
        if config == broken:
            raise error
        return 1.0

    (works,) = {DEFAULT, OTHER} - {broken}
    rows = tuned(milliseconds)
    assert len(rows) == 6
    assert all(row.config == works and row.failed == {broken: f"{type(error).__name__}: {error}"} for row in rows)
    assert of_up() == works


def test_nothing_is_kept_where_no_candidate_compiles(cache: Path) -> None:
    def milliseconds(config: Config) -> float:
        raise RuntimeError(f"{config.block_m} rows")

    with pytest.raises(ValueError, match=f"no tiles of up for 48 x 16 matrices .*RuntimeError: {DEFAULT.block_m} rows"):
        tuned(milliseconds)
    assert not cache.exists()


def test_too_many_rows_are_not_a_candidates_fault(cache: Path) -> None:
    def milliseconds(config: Config) -> float:
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        tuned(milliseconds)


@pytest.mark.parametrize("damage", [b"", b"\xff\xfe", b"[1, 2]", b'{"up": 3}', b'{"up": {', b"[" * 100_000])
def test_damaged_cache_is_ignored_with_one_warning_and_written_anew(cache: Path, damage: bytes) -> None:
    cache.parent.mkdir()
    cache.write_bytes(damage)
    with pytest.warns(UserWarning, match=r"tiles\.json is damaged and is ignored") as caught:
        assert of_up() == of_up(n=96) == DEFAULT
    assert len(caught) == 1
    with warnings.catch_warnings(action="error"):
        tuned(second_is_faster)
    assert of_up() == OTHER


@pytest.mark.parametrize("entry", [None, 7, {}, {"block_m": 1 << 30}, {**asdict(OTHER), "block_m": 48}])
def test_tiles_that_are_no_candidate_are_ignored(cache: Path, entry: object) -> None:
    tuned(second_is_faster)
    found = json.loads(cache.read_text())
    for products in found.values():
        products["up 80x16 float32"] = entry
    cache.write_text(json.dumps(found))
    assert of_up(n=80) == DEFAULT


def run_each() -> int:
    """Tunes with a timer that runs each product once, and says how many it ran."""
    count = 0

    def timer(run: Callable[[], object]) -> float:
        nonlocal count
        count += 1
        run()
        return 1.0

    assert not any(row.failed for row in tune(16, 24, 2, 10, CPU, torch.float32, timer))
    return count


def in_cache(directory: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", directory)
        return run_each()


def test_what_is_timed_runs(interpreted: Callable[..., Any], tmp_path: Path) -> None:
    assert interpreted(in_cache, str(tmp_path)) == 6 * 2
