"""Activation checkpointing (arXiv 1604.06174): blocks keep less for the backward pass, and compute it again there.

`full` keeps a block's input alone. `selective` (arXiv 2205.05198, section 5, here by operation) keeps what is dear to
compute for its size, the results of matrix products, of attention and of collectives, and computes the rest again:
norms, rotations, SwiGLU.
"""

import functools
from collections.abc import Callable
from typing import Any

from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from flexpert.model.transformer import Transformer

#: Namespaces and names of operations whose results `selective` keeps.
KEPT = {
    "aten": {
        "mm",
        "addmm",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    },
    "_c10d_functional": {"all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single"},
    "flexpert": {"loop_rows", "grouped_rows", "up", "rows"},
}


def policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    namespace, _, name = operation.name().partition("::")
    is_kept = name.partition(".")[0] in KEPT.get(namespace, ())
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE


def unseen(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook of `fully_shard` whose operations `selective` does not count: the second time, less is left to gather."""

    @functools.wraps(hook)
    def run(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return hook(*args, **kwargs)

    return run


def recompute_blocks(model: Transformer, what: str) -> None:
    """In place; `what` is none, selective or full. Parameters keep their names."""
    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    for block in model.blocks:
        block.__dict__.pop("forward", None)
        if what != "none":
            again = functools.partial(checkpoint, block.forward, use_reentrant=False)
            block.forward = functools.partial(again, context_fn=contexts) if what == "selective" else again
            inner = [module for module in block.modules() if isinstance(module, FSDPModule) and module is not block]
            for hooks in (hooks for module in inner for hooks in (module._forward_pre_hooks, module._forward_hooks)):
                hooks.update({key: unseen(hook) for key, hook in hooks.items()})
