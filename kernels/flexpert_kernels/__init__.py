"""Expert FFN computation for mixtures of experts. Depends on torch only; importable without Flexpert."""

from flexpert_kernels.moe import dense_mixing, moe_ffn

__all__ = ["dense_mixing", "moe_ffn"]
