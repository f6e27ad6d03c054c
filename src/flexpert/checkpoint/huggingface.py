"""Hugging Face directories in and out: `Olmo2ForCausalLM` and `FlexOlmoForCausalLM`.

What `pretrain` and `assemble` write *is* this format; there is no export step. One table (`tensor_map`) says where each
tensor of a directory lives in our modules. Reading and writing both walk it, and every tensor of either side must be
used exactly once.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flexpert.assembly.base import assembled_config
from flexpert.assembly.record import select_experts
from flexpert.assembly.tensors import TensorSource, write_tensors
from flexpert.checkpoint.digest import dtype_name, tensor_bytes
from flexpert.config.groups import ModelConfig
from flexpert.data.tokenizer import Tokenizer
from flexpert.errors import UserError
from flexpert.fields import require
from flexpert.model.transformer import Transformer, build_on_meta
from flexpert.records import read_json, read_record, write_json

DENSE, MIXTURE, BIASED = "olmo2", "flex_olmo", "flex_olmo_biased"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 << 30
STORED_TYPES = {"BF16": torch.bfloat16, "F32": torch.float32}
#: What transformers takes where config.json does not say.
ROPE_THETA = {DENSE: 10_000.0, MIXTURE: 500_000.0, BIASED: 500_000.0}


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
            for name in ("gate_proj", "up_proj", "down_proj"):
                slots.append(Slot(f"{theirs}.mlp.{name}.weight", f"{ours}.feed_forward.{name}.weight"))
            continue
        experts = list(range(config.num_experts)) if kept is None else kept
        router, group = f"{ours}.feed_forward.router", f"{ours}.feed_forward.groups.0"
        slots.append(Slot(f"{theirs}.mlp.gate.weight", f"{router}.weight.0", rows=tuple(experts)))
        if config.router_bias:
            slots.append(Slot(f"{theirs}.mlp.gate.bias", f"{router}.bias.0", rows=tuple(experts)))
        for place, expert in enumerate(experts):
            prefix = f"{theirs}.mlp.experts.{expert}"
            slots.append(Slot(f"{prefix}.gate_proj.weight", f"{group}.gate_up", (place, 0)))
            slots.append(Slot(f"{prefix}.up_proj.weight", f"{group}.gate_up", (place, 1)))
            slots.append(Slot(f"{prefix}.down_proj.weight", f"{group}.down", (place,)))
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


@dataclass(frozen=True)
class ModelDirectory:
    """A checked Hugging Face directory.

    Attributes:
        config: the model's shape, all experts included.
        experts: expert ids in the directory's order; empty for a dense model.
        raw: config.json as it is.
        files: tensor name → file that holds it.
    """

    path: Path
    config: ModelConfig
    experts: tuple[str, ...]
    raw: dict[str, Any]
    files: dict[str, Path]

    @classmethod
    def open(cls, path: Path) -> "ModelDirectory":
        """Raises `UserError` for a missing directory, another architecture, or a feature that we do not compute."""
        if not (path / "config.json").is_file():
            raise UserError(f"{path} is not a model directory: it has no config.json")
        raw = read_json(path / "config.json")
        config = model_config(raw, path)
        experts: tuple[str, ...] = ()
        if config.num_experts:
            experts = ("public", *(f"expert-{index}" for index in range(1, config.num_experts)))
            if (path / "assembly.json").is_file():
                record = read_record(path / "assembly.json", "flexpert.assembly")
                experts = tuple(expert["id"] for expert in record["experts"])
            if len(experts) != config.num_experts:
                raise UserError(f"{path}: assembly.json names {len(experts)} experts, config.json {config.num_experts}")
        return cls(path, config, experts, raw, tensor_files(path))

    def require_one_dtype(self) -> torch.dtype:
        """The type of every stored tensor; digests and contributions need it to be one, bfloat16 or float32.

        Raises:
            UserError: the types differ, or are another one.
        """
        found: dict[str, str] = {}
        for path in sorted(set(self.files.values())):
            with open_shard(path) as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    found.setdefault(file.get_slice(name).get_dtype(), name)
        if len(found) > 1 or next(iter(found)) not in STORED_TYPES:
            types = ", ".join(f"{dtype} ({name})" for dtype, name in found.items())
            raise UserError(f"{self.path} is stored as {types}; convert it to all BF16 or all F32 first")
        return STORED_TYPES[next(iter(found))]


def tensor_files(path: Path) -> dict[str, Path]:
    """Tensor name → file, from the shard index or the single file."""
    if (path / INDEX).is_file():
        names = require(read_json(path / INDEX), "weight_map", dict, path / INDEX)
    elif (path / "model.safetensors").is_file():
        with open_shard(path / "model.safetensors") as file:
            names = dict.fromkeys(file.keys(), "model.safetensors")
    else:
        raise UserError(f"{path} holds neither model.safetensors nor {INDEX}")
    for name in set(names.values()):
        if Path(name).name != name or not (path / name).is_file():
            raise UserError(f"{path / INDEX} names the file {name}, which is not in the directory")
    return {tensor: path / name for tensor, name in names.items()}


def open_shard(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a whole safetensors file: {error}") from None


def model_config(raw: dict[str, Any], path: Path) -> ModelConfig:
    """config.json to our shape; refuses what the modules would compute differently."""
    kind = raw.get("model_type")
    if kind not in (DENSE, MIXTURE, BIASED):
        raise UserError(f"{path} holds a model of type '{kind}'; Flexpert reads {DENSE} and {MIXTURE}")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    unsupported = {
        "tie_word_embeddings": raw.get("tie_word_embeddings", False),
        "attention_bias": raw.get("attention_bias", False),
        "hidden_act": raw.get("hidden_act", "silu") != "silu",
        "rope_type": rope.get("rope_type", rope.get("type", "default")) != "default",
        "norm_topk_prob": raw.get("norm_topk_prob", False),
    }
    if wrong := [name for name, value in unsupported.items() if value]:
        raise UserError(f"{path}/config.json sets {wrong[0]} in a way that Flexpert does not compute")

    def number(key: str, kind: type = int, **default: Any) -> Any:
        if key in default and raw.get(key) is None:
            return default[key]
        return require(raw, key, kind, path / "config.json")

    num_experts = 0 if kind == DENSE else number("num_experts")
    config = ModelConfig(
        hidden_size=number("hidden_size"),
        num_layers=number("num_hidden_layers"),
        num_heads=number("num_attention_heads"),
        num_kv_heads=number("num_key_value_heads", num_key_value_heads=None),
        intermediate_size=number("intermediate_size"),
        vocab_size=number("vocab_size"),
        max_sequence_length=number("max_position_embeddings"),
        num_experts=num_experts,
        active_experts=number("num_experts_per_tok") if num_experts else 1,
        router_bias=kind == BIASED,
        rms_norm_eps=number("rms_norm_eps", float),
        rope_theta=float(rope.get("rope_theta", raw.get("rope_theta", ROPE_THETA[kind]))),
        initializer_range=number("initializer_range", float, initializer_range=0.02),
    )
    try:
        config.check()
    except UserError as error:
        raise UserError(f"{path}/config.json: {error}") from None
    return config


def fill(model: Transformer, slots: list[Slot], files: dict[str, Path], device: torch.device) -> None:
    """Copy every slot's tensor into the model; each file is opened once.

    Raises:
        UserError: a tensor is missing or has another shape.
    """
    parameters = dict(model.named_parameters())
    by_file: dict[Path, list[Slot]] = {}
    for slot in slots:
        if slot.source not in files:
            raise UserError(f"the model directory has no tensor {slot.source}")
        by_file.setdefault(files[slot.source], []).append(slot)
    for path, members in by_file.items():
        with open_shard(path) as file:
            for slot in members:
                value: Tensor = file.get_tensor(slot.source)
                if slot.rows is not None:
                    value = value[list(slot.rows)]
                target = parameters[slot.parameter].data
                target = target[slot.place] if slot.place else target
                if value.shape != target.shape:
                    expected, found = list(target.shape), list(value.shape)
                    raise UserError(f"{path}: tensor {slot.source} has shape {found}, config.json implies {expected}")
                target.copy_(value.to(device))


def check_use(slots: list[Slot], files: dict[str, Path], ignored: set[str], path: Path) -> None:
    """Every tensor of the directory is used exactly once or belongs to an excluded expert."""
    uses = Counter(slot.source for slot in slots)
    left = sorted(set(files) - set(uses) - ignored)
    if left:
        raise UserError(f"{path} holds {len(left)} tensors that the model has no place for, such as {left[0]}")
    assert all(count == 1 for count in uses.values())


def load_model(
    path: Path,
    *,
    exclude: list[str] | None = None,
    active_experts: int | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Transformer, ModelDirectory]:
    """Load a dense or assembled model, in evaluation mode and without gradients.

    An excluded expert is not loaded: neither its tensors nor its router rows exist in the model, so the result equals,
    bit for bit, that of loading a directory from which it was removed.

    Args:
        path: Hugging Face directory.
        exclude: expert ids to leave out.
        active_experts: k; None: the directory's, or all experts left where fewer remain.

    Raises:
        UserError: as `ModelDirectory.open`; an excluded id is not there; nothing is left; k is too large.
    """
    directory = ModelDirectory.open(path)
    config, kept = directory.config, None
    if exclude:
        if not directory.experts:
            raise UserError(f"exclude={','.join(exclude)}: {path} is a dense model, it has no experts")
        kept = select_experts({"experts": [{"id": name} for name in directory.experts]}, exclude)
        config = replace(config, num_experts=len(kept), active_experts=min(config.active_experts, len(kept)))
    if active_experts is not None and config.num_experts:
        if active_experts > config.num_experts:
            raise UserError(f"active_experts={active_experts} is more than the {config.num_experts} experts of {path}")
        config = replace(config, active_experts=active_experts)
    slots = tensor_map(config, kept)
    left_out = set(range(directory.config.num_experts)) - set(kept if kept is not None else range(config.num_experts))
    ignored = {name for name in directory.files for index in left_out if f".mlp.experts.{index}." in name}
    check_use(slots, directory.files, ignored, path)
    model = build_on_meta(config).to_empty(device=device or torch.device("cpu")).to(dtype)
    fill(model, slots, directory.files, device or torch.device("cpu"))
    return model.requires_grad_(False).eval(), directory


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


def tensor_source(name: str, parameter: Tensor, dtype: torch.dtype) -> TensorSource:
    """A parameter as the streaming writer takes it: cast and moved to the host when its turn comes."""

    def pieces() -> Iterator[memoryview]:
        yield tensor_bytes(parameter.detach().to(dtype))

    stored = dtype_name(torch.empty(0, dtype=dtype))
    return TensorSource(name, stored, tuple(parameter.shape), pieces, name)


@torch.no_grad()
def save_model(
    model: Transformer, directory: Path, tokenizer: Tokenizer, dtype: torch.dtype, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write a model as a Hugging Face directory, shard by shard; `directory` must exist.

    A mixture must hold its experts in one group. `flexpert assemble` writes mixtures from files alone, with one file
    per expert; this is for models that only memory holds.
    """
    config = model.config
    parameters = dict(model.named_parameters())
    values = {}
    for slot in tensor_map(config):
        values[slot.source] = parameters[slot.parameter][slot.place] if slot.place else parameters[slot.parameter]
    assert sum(value.numel() for value in values.values()) == sum(p.numel() for p in parameters.values())
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, value in values.items():
        nbytes = value.numel() * dtype.itemsize
        if shards[-1] and size + nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = value
        size += nbytes
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(directory / file, (tensor_source(name, value, dtype) for name, value in shard.items()))
        weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        total = sum(value.numel() for value in values.values()) * dtype.itemsize
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    content = olmo2_config(config, tokenizer, dtype)
    if config.num_experts:
        content = assembled_config(content, config.num_experts, config.active_experts, config.router_bias)
    write_json(directory / "config.json", content)
    write_json(
        directory / "generation_config.json",
        {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id, "do_sample": False},
    )
    tokenizer.copy_to(directory)
