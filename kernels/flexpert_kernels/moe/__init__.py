from flexpert_kernels.moe.loop import dense_mixing, moe_ffn

__all__ = ["dense_mixing", "moe_ffn"]
