"""`train.compile`: a model's blocks through PyTorch's compiler, in runs where that pays."""

import contextlib
from collections.abc import Iterator

import torch

from flexpert.config.groups import TrainConfig
from flexpert.errors import UserError
from flexpert.model.flops import flops_per_token
from flexpert.model.transformer import Transformer

#: Operations of a run from which on compiling pays, some ten minutes of two cores or of one large GPU: it takes about
#: half a minute, and a fifth or more off every step after that. Counted and not timed, so that a run that is stopped
#: and resumed decides as the first time.
PAYS = {"cpu": 1e14, "cuda": 1e17}


def compiles(config: TrainConfig, model: Transformer, device: torch.device) -> bool:
    """Whether a run of `config` compiles the model; says so, or why not, where `auto` would.

    Raises:
        UserError: it is to, whatever it costs, and there is no compiler.
    """
    if config.compile == "false" or model.config.is_accelerated:
        return False
    flops = flops_per_token(model, config.sequence_length).total * config.num_steps * config.batch_tokens
    if config.compile == "auto" and flops < PAYS.get(device.type, float("inf")):
        return False
    problem = compiler_problem(device)
    if problem is None:
        print("note: train.compile: the first step takes longer, for the model is compiled in it", flush=True)
        return True
    if config.compile == "true":
        raise UserError(f"train.compile=true, but {problem}; train.compile=auto runs without")
    print(f"note: train.compile: {problem}; the run goes on without", flush=True)
    return False


def compiler_problem(device: torch.device) -> str | None:
    """Why nothing can be compiled here; None: it can. Found by trying, for a compiler needs headers, too."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
    except RuntimeError as error:
        reason = str(getattr(error, "inner_exception", error)).splitlines()[0]
        tool = "Triton" if device.type == "cuda" else "a C++ compiler"
        return f"PyTorch needs {tool} for that ({reason})"
    return None


def compile_blocks(model: Transformer) -> None:
    """In place, in the first forward pass; parameters keep their names. Blocks of one kind share what is compiled."""
    for block in model.blocks:
        # Not the block itself: what `fully_shard` hooks to it, gathering and scattering, stays outside.
        block.forward = torch.compile(block.forward, dynamic=False)


@contextlib.contextmanager
def compiled(model: Transformer, wanted: bool) -> Iterator[None]:
    """The model with compiled blocks, if `wanted`; as it was, afterwards."""
    before = [block.__dict__.get("forward") for block in model.blocks]
    if wanted:
        compile_blocks(model)
    try:
        yield
    finally:
        for block, forward in zip(model.blocks, before, strict=True):
            block.__dict__.pop("forward", None)
            if forward is not None:
                block.forward = forward


def eagerly(is_compiled: bool) -> contextlib.AbstractContextManager[object]:
    """For a few passes of another kind, without gradients or of another size, which are not worth compiling."""
    return torch.compiler.set_stance("force_eager") if is_compiled else contextlib.nullcontext()
