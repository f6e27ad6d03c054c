"""Triton's interpreter, for machines without a GPU, in a process of its own: Triton reads its mode when imported."""

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest
from interpreter import interpret


@pytest.fixture(scope="session")
def interpreted() -> Iterator[Callable[..., Any]]:
    """`interpreted(function, *arguments)`: its result, or what it raised, from a process that interprets kernels.

    `function` is a test module's own; it imports the kernels itself, when it runs.
    """
    pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=interpret)
    with pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "interpreted" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)
