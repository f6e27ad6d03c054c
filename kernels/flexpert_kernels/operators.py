"""Functions as operators of PyTorch, `torch.ops.flexpert.NAME`: its compiler learns their shapes and looks no deeper.

By hand, because what `torch.library.custom_op` makes takes longer to call than a small product.
"""

from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("flexpert", "FRAGMENT")  # type: ignore[no-untyped-call]


def register(function: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """The operator. `fake` takes the same arguments and returns tensors of the results' shapes and types, without data.

    The function reads its arguments and returns new tensors; its annotations are the operator's schema. Gradients are
    the caller's business.
    """
    name = function.__name__
    schema = torch.library.infer_schema(function, mutates_args=(), op_name=name)
    _library.define(schema)  # type: ignore[no-untyped-call]
    _library.impl(name, function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"flexpert::{name}", fake, lib=_library)
    return getattr(torch.ops.flexpert, name)  # type: ignore[no-any-return]
