"""The grouped matrix products in Triton; `reference.py` has the same names in plain PyTorch."""

from flexpert_kernels.grouped_mm.outer import outer
from flexpert_kernels.grouped_mm.rows import rows
from flexpert_kernels.grouped_mm.up import up

__all__ = ["outer", "rows", "up"]
