"""One cluster for all tests of a worker, and what pipelines on it begin with."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, missing, running
from pipelines import Stock, make_stock


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Four nodes of 16 CPUs and 4 pretended GPUs; with all of its jobs it is gone when the tests end."""
    if reason := missing():
        pytest.skip(reason)
    with running(num_nodes=4, cpus=16, gpus=4) as found:
        yield found


@pytest.fixture(scope="session")
def stock(road: Path, tmp_path_factory: pytest.TempPathFactory) -> Stock:
    """A public model and three data sets."""
    return make_stock(road, tmp_path_factory.mktemp("stock"))
