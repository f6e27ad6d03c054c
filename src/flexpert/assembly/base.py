"""The public model, and the layout of what is assembled from it.

A public model is a Hugging Face directory with an `Olmo2ForCausalLM`, an assembled one is a `FlexOlmoForCausalLM`. They
have the same tensors but for the FFNs: `mlp.gate_proj.weight` of a layer becomes `mlp.experts.0.gate_proj.weight`, and
`mlp.gate.weight` is the router. Everything that is neither FFN nor router is called the trunk.

Shape letters: V vocabulary, D hidden size, Q heads x head size, K key-value heads x head size, F FFN width, E experts.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexpert.assembly.tensors import EXPONENT_BITS, TensorSet, open_model
from flexpert.contribution.record import PROJECTIONS, Architecture
from flexpert.errors import UserError
from flexpert.fields import require
from flexpert.records import read_json

#: What a field means to transformers' Olmo2Config when config.json leaves it out, where FlexOlmoConfig takes another
#: value. The assembled config spells these out: left out, they would silently change the model.
OLMO2_DEFAULTS: Mapping[str, Any] = {
    "eos_token_id": 50279,
    "max_position_embeddings": 2048,
    "pad_token_id": 1,
    "rms_norm_eps": 1e-5,
    "vocab_size": 50304,
}
#: Likewise, but it may be given in two places.
OLMO2_ROPE_THETA = 10_000.0

Shapes = dict[str, tuple[int, ...]]


def ffn_name(layer: int, projection: str) -> str:
    """A matrix of the FFN in a public model."""
    return f"model.layers.{layer}.mlp.{projection}.weight"


def expert_name(layer: int, expert: int, projection: str) -> str:
    """A matrix of one expert in an assembled model."""
    return f"model.layers.{layer}.mlp.experts.{expert}.{projection}.weight"


def router_name(layer: int, part: str) -> str:
    """The router of a layer in an assembled model; `part` is "weight" [E, D] or "bias" [E]."""
    return f"model.layers.{layer}.mlp.gate.{part}"


def read_architecture(config: Mapping[str, Any], where: Path) -> Architecture:
    """The shape of a public or an assembled model from its config.json, which is named in errors as `where`."""
    return Architecture(
        hidden_size=require(config, "hidden_size", int, where),
        num_hidden_layers=require(config, "num_hidden_layers", int, where),
        intermediate_size=require(config, "intermediate_size", int, where),
    )


def trunk_shapes(config: Mapping[str, Any], where: Path) -> Shapes:
    """Name → shape of every tensor of the trunk, in the order of the model."""
    architecture = read_architecture(config, where)
    D = architecture.hidden_size
    V = config.get("vocab_size", OLMO2_DEFAULTS["vocab_size"])
    num_heads = require(config, "num_attention_heads", int, where)
    num_key_value_heads = config.get("num_key_value_heads") or num_heads
    head_size = config.get("head_dim") or D // num_heads
    Q, K = num_heads * head_size, num_key_value_heads * head_size

    shapes: Shapes = {"model.embed_tokens.weight": (V, D)}
    for layer in range(architecture.num_hidden_layers):
        attention = f"model.layers.{layer}.self_attn"
        for projection, shape in {"q": (Q, D), "k": (K, D), "v": (K, D), "o": (D, Q)}.items():
            shapes[f"{attention}.{projection}_proj.weight"] = shape
            if config.get("attention_bias", False):
                shapes[f"{attention}.{projection}_proj.bias"] = shape[:1]
        shapes[f"{attention}.q_norm.weight"] = (Q,)
        shapes[f"{attention}.k_norm.weight"] = (K,)
        shapes[f"model.layers.{layer}.post_attention_layernorm.weight"] = (D,)
        shapes[f"model.layers.{layer}.post_feedforward_layernorm.weight"] = (D,)
    shapes["model.norm.weight"] = (D,)
    if not config.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = (V, D)
    return shapes


def projection_shapes(architecture: Architecture) -> Shapes:
    """Projection → shape of that matrix of one FFN."""
    D, F = architecture.hidden_size, architecture.intermediate_size
    return dict(zip(PROJECTIONS, [(F, D), (F, D), (D, F)], strict=True))


@dataclass(frozen=True)
class BaseModel:
    """An open public model.

    Attributes:
        directory: where it lies.
        config: the content of its config.json.
        architecture: its shape.
        dtype: of its FFNs, and so of every expert that is added to it.
        tensors: exactly those that the config calls for.
    """

    directory: Path
    config: Mapping[str, Any]
    architecture: Architecture
    dtype: str
    tensors: TensorSet


@contextmanager
def open_base(directory: Path) -> Iterator[BaseModel]:
    """Open a public model and compare its tensors' names, shapes and dtypes with its config.

    Raises:
        UserError: it is not an Olmo2ForCausalLM, or its weights are missing, malformed or not what the config says.
    """
    where = directory / "config.json"
    with open_model(directory) as tensors:
        config = read_json(where)
        if config.get("architectures") != ["Olmo2ForCausalLM"] or config.get("model_type") != "olmo2":
            raise UserError(
                f"{where} describes {config.get('architectures')} and not Olmo2ForCausalLM; give a public OLMo 2 model"
            )
        architecture = read_architecture(config, where)
        ffn = projection_shapes(architecture).items()
        shapes = trunk_shapes(config, where)
        for layer in range(architecture.num_hidden_layers):
            shapes |= {ffn_name(layer, projection): shape for projection, shape in ffn}
        check_shapes({name: info.shape for name, info in tensors.tensors.items()}, shapes, directory)
        dtype = tensors.tensors[ffn_name(0, PROJECTIONS[0])].dtype
        for name, info in tensors.tensors.items():
            if info.dtype not in EXPONENT_BITS:
                raise UserError(f"{directory}: the tensor {name} is {info.dtype}; save the model as floating point")
            if ".mlp." in name and info.dtype != dtype:
                raise UserError(f"{directory}: the tensor {name} is {info.dtype}, other FFNs are {dtype}; save it anew")
        yield BaseModel(directory, config, architecture, dtype, tensors)


def check_shapes(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], where: Path) -> None:
    """Compare the tensors of a model with those that its config.json calls for.

    Raises:
        UserError: one is missing, left over, or has another shape.
    """
    for name, shape in expected.items():
        if name not in found:
            raise UserError(
                f"{where}: the tensor {name!r}, which config.json calls for, is missing; save the model anew"
            )
        if found[name] != shape:
            raise UserError(
                f"{where}: the tensor {name!r} has the shape {list(found[name])}, config.json calls for {list(shape)}; "
                "save the model anew"
            )
    for name in found:
        if name not in expected:
            raise UserError(f"{where}: config.json does not call for the tensor {name!r}; save the model without it")


def assembled_config(base: Mapping[str, Any], num_experts: int, active_experts: int, biased: bool) -> dict[str, Any]:
    """The config.json of a model assembled from a base with this config.json: all of its fields, and the experts'."""
    config = {**base, **{key: value for key, value in OLMO2_DEFAULTS.items() if key not in base}}
    # Versions of transformers before 5 keep rope_theta beside the other fields, later ones in rope_parameters.
    places = [base, base.get("rope_parameters") or {}, base.get("rope_scaling") or {}]
    if not any("rope_theta" in place for place in places):
        config["rope_theta"] = OLMO2_ROPE_THETA
    config |= {
        "num_experts": num_experts,
        "num_experts_per_tok": active_experts,
        "norm_topk_prob": False,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.0,
    }
    return config | model_class(biased)


def model_class(biased: bool) -> dict[str, Any]:
    """How config.json names the model class.

    transformers' FlexOlmo has no router bias. A model that has one gets a type of its own, which a plain loader refuses
    rather than loads without the bias.
    """
    if biased:
        return {"architectures": ["FlexOlmoBiasedForCausalLM"], "model_type": "flex_olmo_biased"}
    return {"architectures": ["FlexOlmoForCausalLM"], "model_type": "flex_olmo"}


def assembled_shapes(config: Mapping[str, Any], where: Path) -> Shapes:
    """Name → shape of every tensor of an assembled model with this config.json."""
    architecture = read_architecture(config, where)
    E = require(config, "num_experts", int, where)
    shapes = trunk_shapes(config, where)
    for layer in range(architecture.num_hidden_layers):
        shapes[router_name(layer, "weight")] = (E, architecture.hidden_size)
        if config.get("model_type") == model_class(biased=True)["model_type"]:
            shapes[router_name(layer, "bias")] = (E,)
        for expert in range(E):
            for projection, shape in projection_shapes(architecture).items():
                shapes[expert_name(layer, expert, projection)] = shape
    return shapes
