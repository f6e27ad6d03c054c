"""Freezing by construction, and the proof that nothing frozen moved."""

from collections.abc import Callable

import torch

from flexpert.assembly.tensors import TensorDigest
from flexpert.checkpoint.digest import digest_of, digest_tensor
from flexpert.checkpoint.huggingface import Slot
from flexpert.checkpoint.sharding import gather_to_first
from flexpert.model.transformer import Transformer
from flexpert.parallel.environment import is_first


def train_only(model: Transformer, trained: Callable[[str], bool]) -> None:
    """Give gradients to the parameters whose name `trained` accepts, and to no other."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained(name))


def cast_frozen(model: Transformer, dtype: torch.dtype) -> None:
    """Hold frozen parameters in the type that their files have, which loses nothing; autocast does the rest.

    A bf16 base is then held in bf16 alone, with no fp32 copy.
    """
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def frozen_digest(model: Transformer, slots: list[Slot], dtype: torch.dtype, tokenizer: str) -> str:
    """The base digest, computed from the frozen parameters in memory; rank 0's is the one.

    Args:
        slots: where each tensor of the base directory lives in the model.
        dtype: type of the base's tensors; the frozen copies were cast from it without loss.
        tokenizer: the base's tokenizer digest.
    """
    parameters = dict(model.named_parameters())
    digests: dict[str, TensorDigest] = {}
    for slot in slots:
        value = gather_to_first(parameters[slot.parameter].detach(), slot.place)
        if is_first():
            digests[slot.source] = digest_tensor(value.to("cpu", dtype).contiguous())
    return digest_of(digests, tokenizer)
