"""Hugging Face directories in and out: `Olmo2ForCausalLM` and `FlexOlmoForCausalLM`.

What `pretrain` and `assemble` write *is* this format; there is no export step. One table (`tensor_map`) says where each
tensor of a directory lives in our modules. Reading and writing both walk it, and every tensor of either side must be
used exactly once.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from flexpert.assembly.files import part_names, split
from flexpert.assembly.record import select_experts
from flexpert.assembly.tensors import INDEX_FILE, TensorSource, write_tensors
from flexpert.checkpoint.digest import dtype_name, tensor_bytes
from flexpert.checkpoint.directory import ModelDirectory
from flexpert.checkpoint.layout import DENSE, PROJECTIONS, assembled_config, expert_name, ffn_name, router_name
from flexpert.checkpoint.sharding import gather_to_first, local_part
from flexpert.config.groups import ModelConfig
from flexpert.config.stages import MAX_FILE_BYTES
from flexpert.data.tokenizer import Tokenizer
from flexpert.errors import UserError
from flexpert.model.transformer import Transformer, build_on_meta
from flexpert.parallel.environment import is_first
from flexpert.records import write_json


class Slot(NamedTuple):
    """Where one tensor of a directory lives: `parameter[place]`; `rows` picks rows of the tensor on the way in."""

    source: str
    parameter: str
    place: tuple[int, ...] = ()
    rows: tuple[int, ...] | None = None


def tensor_map(config: ModelConfig, kept: list[int] | None = None) -> list[Slot]:
    """Every tensor of the directory of a model of this shape, and its place in `Transformer(config)`.

    Args:
        config: the model in memory.
        kept: indices, in the directory, of the experts that the model holds; None: all.
    """
    slots = [Slot("model.embed_tokens.weight", "embedding.weight")]
    for layer in range(config.num_layers):
        theirs, ours = f"model.layers.{layer}", f"blocks.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"):
            slots.append(Slot(f"{theirs}.self_attn.{name}.weight", f"{ours}.attention.{name}.weight"))
        slots.append(Slot(f"{theirs}.post_attention_layernorm.weight", f"{ours}.attention_norm.weight"))
        slots.append(Slot(f"{theirs}.post_feedforward_layernorm.weight", f"{ours}.feed_forward_norm.weight"))
        if config.num_experts == 0:
            for name in PROJECTIONS:
                slots.append(Slot(ffn_name(layer, name), f"{ours}.feed_forward.{name}.weight"))
            continue
        experts = list(range(config.num_experts)) if kept is None else kept
        router, group = f"{ours}.feed_forward.router", f"{ours}.feed_forward.groups.0"
        slots.append(Slot(router_name(layer, "weight"), f"{router}.weight.0", rows=tuple(experts)))
        if config.router_bias:
            slots.append(Slot(router_name(layer, "bias"), f"{router}.bias.0", rows=tuple(experts)))
        for place, expert in enumerate(experts):
            slots.append(Slot(expert_name(layer, expert, "gate_proj"), f"{group}.gate_up", (place, 0)))
            slots.append(Slot(expert_name(layer, expert, "up_proj"), f"{group}.gate_up", (place, 1)))
            slots.append(Slot(expert_name(layer, expert, "down_proj"), f"{group}.down", (place,)))
    slots += [Slot("model.norm.weight", "norm.weight"), Slot("lm_head.weight", "head.weight")]
    return slots


def job_tensor_map(config: ModelConfig, expert: bool) -> list[Slot]:
    """Where a dense directory's tensors live in an expert job's model, held as groups (1, 1).

    Args:
        config: the two-expert model.
        expert: map the FFN tensors to the trained expert (group 1) alone; otherwise everything to the frozen part.
    """
    slots = []
    for slot in tensor_map(replace(config, num_experts=0)):
        ours, _, projection = slot.parameter.partition(".feed_forward.")
        if projection:
            group = f"{ours}.feed_forward.groups.{int(expert)}"
            places = {"gate_proj.weight": ("gate_up", (0, 0)), "up_proj.weight": ("gate_up", (0, 1))}
            name, index = places.get(projection, ("down", (0,)))
            slots.append(Slot(slot.source, f"{group}.{name}", index))
        elif not expert:
            slots.append(slot)
    return slots


@torch.no_grad()
def fill(model: Transformer, slots: list[Slot], files: Mapping[str, Path]) -> None:
    """Copy every slot's tensor into the model; each file is opened once. `files` are a `ModelDirectory`'s.

    Of a parameter that several processes share, each reads its own part alone.
    """
    parameters = dict(model.named_parameters())
    by_file: dict[Path, list[Slot]] = {}
    for slot in slots:
        by_file.setdefault(files[slot.source], []).append(slot)
    for path, members in by_file.items():
        with safe_open(path, framework="pt") as file:
            for slot in members:
                target, place = local_part(parameters[slot.parameter])
                if not all(held.start <= at < held.stop for at, held in zip(slot.place, place, strict=False)):
                    continue  # other processes have it
                for at, held in zip(slot.place, place, strict=False):
                    target = target[at - held.start]
                place = place[len(slot.place) :]
                if slot.rows is not None:
                    value: Tensor = file.get_tensor(slot.source)[list(slot.rows)][place]
                else:
                    value = file.get_slice(slot.source)[place]
                assert value.shape == target.shape, slot.source
                target.copy_(value)


def load_model(
    path: Path,
    *,
    exclude: list[str] | None = None,
    active_experts: int | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype | None = torch.float32,
    give_memory: Callable[[Transformer], None] | None = None,
) -> tuple[Transformer, ModelDirectory]:
    """Load a dense or assembled model, in evaluation mode and without gradients.

    An excluded expert is not loaded: neither its tensors nor its router rows exist in the model, so the result equals,
    bit for bit, that of loading a directory from which it was removed.

    Args:
        path: Hugging Face directory.
        exclude: expert ids to leave out.
        active_experts: k; None: the directory's, or all experts left where fewer remain.
        device: None: the CPU.
        dtype: to hold the parameters in; None: `inference_dtype`.
        give_memory: does so to the model on the meta device, for this process's part of it; None: for all, on `device`.

    Raises:
        UserError: as `ModelDirectory.open`; an excluded id is not there; nothing is left; k is too large.
    """
    directory, device = ModelDirectory.open(path), device or torch.device("cpu")
    config, kept = directory.config, None
    if exclude:
        if not directory.experts:
            raise UserError(f"exclude={','.join(exclude)}: {path} is a dense model, it has no experts")
        kept = select_experts(directory.experts, exclude)
        config = replace(config, num_experts=len(kept), active_experts=min(config.active_experts, len(kept)))
    if active_experts is not None and config.num_experts:
        if active_experts > config.num_experts:
            raise UserError(f"active_experts={active_experts} is more than the {config.num_experts} experts of {path}")
        config = replace(config, active_experts=active_experts)
    slots = tensor_map(config, kept)
    sources = [slot.source for slot in slots]
    left_out = set(range(directory.config.num_experts)) - set(kept or range(config.num_experts))
    ignored = {name for name in directory.files for index in left_out if f".mlp.experts.{index}." in name}
    assert sorted(sources) == sorted(directory.files.keys() - ignored), "every tensor is used exactly once"
    model = build_on_meta(config).to(dtype or inference_dtype(directory, device)).requires_grad_(False)
    if give_memory is None:
        model.to_empty(device=device)
    else:
        give_memory(model)
    fill(model, slots, directory.files)
    return model.eval(), directory


def inference_dtype(directory: ModelDirectory, device: torch.device) -> torch.dtype:
    """The type to hold a model in that is not trained: on CUDA bf16 where its files are, and otherwise fp32.

    Where all parameters are bf16, the modules compute as they do under training's autocast: products in bf16, norms and
    router in fp32.
    """
    is_bf16 = set(directory.dtypes.values()) == {"BF16"}
    return torch.bfloat16 if is_bf16 and device.type == "cuda" else torch.float32


def experts_of(directory: ModelDirectory, exclude: list[str]) -> list[str]:
    """Ids of the experts that a model loaded with `exclude` holds, in order."""
    return [name for name in directory.experts if name not in exclude]


def olmo2_config(config: ModelConfig, tokenizer: Tokenizer, dtype: torch.dtype) -> dict[str, Any]:
    """config.json of a dense model."""
    return {
        "architectures": ["Olmo2ForCausalLM"],
        "model_type": DENSE,
        "vocab_size": config.vocab,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_sequence_length,
        "initializer_range": config.initializer_range,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "rope_theta": config.rope_theta,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
        "dtype": str(dtype).removeprefix("torch."),
    }


def tensor_source(slot: Slot, parameter: Tensor, dtype: torch.dtype) -> TensorSource:
    """A parameter as the streaming writer takes it: gathered, cast and moved to the host when its turn comes."""

    def pieces() -> Iterator[memoryview]:
        yield tensor_bytes(gather_to_first(parameter.detach(), slot.place).to(dtype))

    stored = dtype_name(torch.empty(0, dtype=dtype))
    return TensorSource(slot.source, stored, tuple(parameter.shape[len(slot.place) :]), pieces, slot.source)


@torch.no_grad()
def save_model(
    model: Transformer, directory: Path, tokenizer: Tokenizer, dtype: torch.dtype, max_file_bytes: int = MAX_FILE_BYTES
) -> None:
    """Write a model as a Hugging Face directory, file by file; `directory` must exist.

    Of several processes that share the model, all must call this; rank 0 writes, and holds one tensor whole at a time.
    A mixture must hold its experts in one group. `flexpert assemble` writes mixtures from files alone, with one file
    per expert; this is for models that only memory holds.
    """
    config = model.config
    parameters = dict(model.named_parameters())
    sources = [tensor_source(slot, parameters[slot.parameter], dtype) for slot in tensor_map(config)]
    assert sum(s.num_bytes for s in sources) == sum(p.numel() for p in parameters.values()) * dtype.itemsize
    parts = split(sources, max_file_bytes)
    if not is_first():
        for source in (source for part in parts for source in part):
            for _ in source.pieces():  # this process's share of the gathering
                pass
        return
    weight_map: dict[str, str] = {}
    for file, part in zip(part_names("model", len(parts)), parts, strict=True):
        write_tensors(directory / file, part)
        weight_map |= dict.fromkeys((source.name for source in part), file)
    if len(parts) > 1:
        total = sum(source.num_bytes for source in sources)
        write_json(directory / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
    content = olmo2_config(config, tokenizer, dtype)
    if config.num_experts:
        content = assembled_config(content, config)
    write_json(directory / "config.json", content)
    write_json(
        directory / "generation_config.json",
        {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id, "do_sample": False},
    )
    tokenizer.copy_to(directory)
