"""What a model directory looks like: its config.json, and the names and shapes of its tensors.

A public model is a Hugging Face directory with an `Olmo2ForCausalLM`, an assembled one is a `FlexOlmoForCausalLM`. They
have the same tensors but for the FFNs: `mlp.gate_proj.weight` of a layer becomes `mlp.experts.0.gate_proj.weight`, and
`mlp.gate.weight` is the router. Everything that is neither FFN nor router is called the trunk.

Shape letters: V vocabulary, D hidden size, K key-value heads x head size, F FFN width, E experts.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flexpert.config.groups import ModelConfig
from flexpert.errors import UserError
from flexpert.fields import require

DENSE, MIXTURE, BIASED = "olmo2", "flex_olmo", "flex_olmo_biased"

#: Types of tensors that experts may have, and so the bases that they are trained against.
STORED_DTYPES = ("F32", "BF16")

#: The matrices of one FFN: W1, W3 and W2 of `E(x) = W2 (silu(W1 x) ⊙ W3 x)`.
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

#: What a field means to transformers' Olmo2Config when config.json leaves it out, where FlexOlmoConfig takes another
#: value. The assembled config spells these out: left out, they would silently change the model.
OLMO2_DEFAULTS: Mapping[str, Any] = {
    "eos_token_id": 50279,
    "max_position_embeddings": 2048,
    "pad_token_id": 1,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "vocab_size": 50304,
}
#: Likewise to transformers' FlexOlmoConfig; a mixture must state everything else.
FLEX_OLMO_DEFAULTS: Mapping[str, Any] = {"rope_theta": 500_000.0}

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


@dataclass(frozen=True)
class Architecture:
    """The fields of config.json that say what a model computes with its tensors, all others being what every model here
    has. Two models can have equal tensors and compute different functions, so whoever compares bases compares these."""

    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    rms_norm_eps: float
    rope_theta: float

    @staticmethod
    def of(config: ModelConfig) -> "Architecture":
        return Architecture(
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_layers,
            intermediate_size=config.intermediate_size,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.kv_heads,
            rms_norm_eps=config.rms_norm_eps,
            rope_theta=config.rope_theta,
        )

    @staticmethod
    def from_json(value: Mapping[str, Any], where: Path) -> "Architecture":
        """Read what `to_json` wrote.

        Raises:
            UserError: a field is missing or of another type.
        """
        return Architecture(
            hidden_size=require(value, "hidden_size", int, where),
            num_hidden_layers=require(value, "num_hidden_layers", int, where),
            intermediate_size=require(value, "intermediate_size", int, where),
            num_attention_heads=require(value, "num_attention_heads", int, where),
            num_key_value_heads=require(value, "num_key_value_heads", int, where),
            rms_norm_eps=require(value, "rms_norm_eps", float, where),
            rope_theta=require(value, "rope_theta", float, where),
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def check_equal(self, other: "Architecture", ours: str, theirs: str, remedy: str) -> None:
        """Compare with another model's; `ours` and `theirs` name the two in the error.

        Raises:
            UserError: a field differs.
        """
        there = other.to_json()
        for name, value in self.to_json().items():
            if value != there[name]:
                raise UserError(f"{ours} has {name} {value}, {theirs} has {there[name]}; {remedy}")


def model_config(raw: Mapping[str, Any], where: Path) -> ModelConfig:
    """The content of a config.json as our shape.

    Args:
        raw: the content.
        where: the file, for errors.

    Raises:
        UserError: another architecture, a missing or impossible field, or what the modules would compute differently.
    """
    kind = raw.get("model_type")
    if kind not in (DENSE, MIXTURE, BIASED):
        raise UserError(f"{where} describes a model of type {kind!r}; Flexpert reads {DENSE} and {MIXTURE}")
    given = {name: value for name, value in raw.items() if value is not None}
    fields = {**(OLMO2_DEFAULTS if kind == DENSE else FLEX_OLMO_DEFAULTS), **given}
    # transformers reads the older name first, and the theta in either before the one beside them.
    rope = given.get("rope_scaling") or given.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{where}: rope_scaling or rope_parameters is not an object")

    def number(name: str) -> int:
        return require(fields, name, int, where)

    def real(name: str, place: Mapping[str, Any] = fields) -> float:
        value = place.get(name)
        if type(value) is int and abs(value) < 1 << 53:
            return float(value)
        return require(place, name, float, where)

    num_experts = 0 if kind == DENSE else number("num_experts")
    active_experts = number("num_experts_per_tok") if num_experts else 1
    if not 1 <= active_experts <= max(num_experts, 1):
        raise UserError(f"{where}: num_experts_per_tok={active_experts} is not between 1 and num_experts={num_experts}")
    config = ModelConfig(
        hidden_size=number("hidden_size"),
        num_layers=number("num_hidden_layers"),
        num_heads=number("num_attention_heads"),
        num_kv_heads=number("num_key_value_heads") if "num_key_value_heads" in given else None,
        intermediate_size=number("intermediate_size"),
        vocab_size=number("vocab_size"),
        max_sequence_length=number("max_position_embeddings"),
        num_experts=num_experts,
        active_experts=active_experts,
        router_bias=kind == BIASED,
        rms_norm_eps=real("rms_norm_eps"),
        rope_theta=real("rope_theta", rope if "rope_theta" in rope else fields),
        initializer_range=real("initializer_range") if "initializer_range" in given else 0.02,
    )
    try:
        config.check()
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    unsupported = {
        "tie_word_embeddings": given.get("tie_word_embeddings", False),
        "attention_bias": given.get("attention_bias", False),
        "hidden_act": given.get("hidden_act", "silu") != "silu",
        "head_dim": given.get("head_dim", config.head_dim) != config.head_dim,
        "rope_type": rope.get("rope_type", rope.get("type", "default")) != "default",
        "norm_topk_prob": given.get("norm_topk_prob", False),
    }
    if wrong := [name for name, value in unsupported.items() if value]:
        raise UserError(f"{where} sets {wrong[0]} in a way that Flexpert does not compute")
    return config


def assembled_config(base: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """The config.json of a mixture of this shape: all fields of its base's config.json, and the experts'."""
    return {
        **OLMO2_DEFAULTS,
        **base,
        # Versions of transformers before 5 read it here alone, later ones also in rope_parameters.
        "rope_theta": config.rope_theta,
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.active_experts,
        "norm_topk_prob": False,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.0,
        **model_class(config.router_bias),
    }


def model_class(biased: bool) -> dict[str, Any]:
    """How config.json names the model class.

    transformers' FlexOlmo has no router bias. A model that has one gets a type of its own, which a plain loader refuses
    rather than loads without the bias.
    """
    if biased:
        return {"architectures": ["FlexOlmoBiasedForCausalLM"], "model_type": BIASED}
    return {"architectures": ["FlexOlmoForCausalLM"], "model_type": MIXTURE}


def model_shapes(config: ModelConfig) -> Shapes:
    """Name → shape of every tensor of a model, in the order of the model."""
    D, F, V, E = config.hidden_size, config.intermediate_size, config.vocab, config.num_experts
    K = config.kv_heads * config.head_dim
    ffn = dict(zip(PROJECTIONS, [(F, D), (F, D), (D, F)], strict=True))
    shapes: Shapes = {"model.embed_tokens.weight": (V, D)}
    for layer in range(config.num_layers):
        attention = f"model.layers.{layer}.self_attn"
        for projection, shape in {"q": (D, D), "k": (K, D), "v": (K, D), "o": (D, D)}.items():
            shapes[f"{attention}.{projection}_proj.weight"] = shape
        shapes[f"{attention}.q_norm.weight"] = (D,)
        shapes[f"{attention}.k_norm.weight"] = (K,)
        shapes[f"model.layers.{layer}.post_attention_layernorm.weight"] = (D,)
        shapes[f"model.layers.{layer}.post_feedforward_layernorm.weight"] = (D,)
        if not E:
            shapes |= {ffn_name(layer, projection): shape for projection, shape in ffn.items()}
            continue
        shapes[router_name(layer, "weight")] = (E, D)
        if config.router_bias:
            shapes[router_name(layer, "bias")] = (E,)
        for expert in range(E):
            shapes |= {expert_name(layer, expert, projection): shape for projection, shape in ffn.items()}
    shapes["model.norm.weight"] = (D,)
    shapes["lm_head.weight"] = (V, D)
    return shapes


def check_shapes(found: Mapping[str, tuple[int, ...]], config: ModelConfig, where: Path) -> None:
    """Compare the tensors of a model with those that its config.json calls for.

    Raises:
        UserError: one is missing, left over, or has another shape.
    """
    if config.num_layers * max(config.num_experts, 1) > len(found):  # before all their names are spelled out
        raise UserError(f"{where}: config.json calls for more layers or experts than there are tensors; save it anew")
    expected = model_shapes(config)
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
