"""One cluster for all tests of a worker."""

from collections.abc import Iterator

import pytest
from cluster import Cluster, missing, running


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Four nodes of 16 CPUs and 4 pretended GPUs; with all of its jobs it is gone when the tests end."""
    if reason := missing():
        pytest.skip(reason)
    with running(num_nodes=4, cpus=16, gpus=4) as found:
        yield found
