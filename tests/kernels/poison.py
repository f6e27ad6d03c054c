"""New memory filled with NaN, so that what a kernel does not write is seen."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def poisoned() -> Iterator[None]:
    """`torch.empty` gives NaN, and the largest integer (`torch.utils.deterministic.fill_uninitialized_memory`)."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
