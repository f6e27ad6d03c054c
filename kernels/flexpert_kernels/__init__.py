"""The expert layer of mixtures of experts, and its kernels. Depends on torch, and on Triton where there is a GPU."""

from flexpert_kernels.moe.dispatch import lacking
from flexpert_kernels.moe.layer import combine, dense_mixing, moe_ffn, sort_by_expert, spread
from flexpert_kernels.moe.routing import route

__all__ = ["combine", "dense_mixing", "lacking", "moe_ffn", "route", "sort_by_expert", "spread"]
