"""Our model against transformers' `Olmo2ForCausalLM` and `FlexOlmoForCausalLM`: logits, loss, every gradient."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForCausalLM,
    FlexOlmoConfig,
    FlexOlmoForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    PreTrainedModel,
)

from flexpert.checkpoint.huggingface import load_model, save_model, tensor_map
from flexpert.data.tokenizer import load_tokenizer
from flexpert.model.generate import generate
from flexpert.model.loss import chunked_nll
from flexpert.model.transformer import Transformer

SHAPE = {
    "vocab_size": 101,
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "eos_token_id": 0,
    "tie_word_embeddings": False,
}


def make(kind: str, directory: Path) -> PreTrainedModel:
    torch.manual_seed(7)
    if kind.startswith("dense"):
        heads = {"num_key_value_heads": 2} if kind == "dense, grouped queries" else {}
        model: PreTrainedModel = Olmo2ForCausalLM(Olmo2Config(**SHAPE, **heads))
    else:
        experts, active = {"3 of 5": (5, 3), "2 of 3": (3, 2), "1 of 3": (3, 1), "4 of 4": (4, 4), "1 of 1": (1, 1)}[
            kind
        ]
        model = FlexOlmoForCausalLM(FlexOlmoConfig(**SHAPE, num_experts=experts, num_experts_per_tok=active))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms start at 1, where a swapped pair would not be seen
                parameter.normal_(1, 0.2)
    model.save_pretrained(directory)
    return model.eval()


def our_gradients(model: Transformer) -> dict[str, torch.Tensor]:
    parameters = dict(model.named_parameters())
    gradients = {}
    for slot in tensor_map(model.config):
        gradient = parameters[slot.parameter].grad
        assert gradient is not None, slot.parameter
        gradients[slot.source] = gradient[slot.place] if slot.place else gradient
    return gradients


def their_gradients(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Their fused expert gradients, under the names and shapes of the files."""
    gradients = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if name.endswith("experts.gate_up_proj"):
            for expert, gradient in enumerate(parameter.grad):
                gate, up = gradient.chunk(2)
                prefix = name.removesuffix("gate_up_proj") + str(expert)
                gradients[f"{prefix}.gate_proj.weight"], gradients[f"{prefix}.up_proj.weight"] = gate, up
        elif name.endswith("experts.down_proj"):
            for expert, gradient in enumerate(parameter.grad):
                gradients[name.removesuffix("down_proj") + f"{expert}.down_proj.weight"] = gradient
        else:
            gradients[name] = parameter.grad
    return gradients


@pytest.mark.parametrize("kind", ["dense", "dense, grouped queries", "3 of 5", "2 of 3", "1 of 3", "4 of 4", "1 of 1"])
def test_logits_loss_and_every_gradient_agree(kind: str, tmp_path: Path) -> None:
    theirs = make(kind, tmp_path)
    ours = load_model(tmp_path)[0].requires_grad_(True)
    tokens = torch.randint(0, 101, (3, 33), generator=torch.Generator().manual_seed(1))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]

    expected = theirs(inputs).logits
    assert (ours.logits(inputs) - expected).abs().max() <= 1e-5

    expected_loss = F.cross_entropy(expected.flatten(0, 1), targets.flatten())
    expected_loss.backward()
    stream = ours(inputs).stream_BSD.flatten(0, 1)
    nll, _ = chunked_nll(stream, ours.head.weight, targets.flatten(), chunk_tokens=7)
    nll.mean().backward()
    assert nll.mean().item() == pytest.approx(expected_loss.item(), rel=1e-6)

    wanted, found = their_gradients(theirs), our_gradients(ours)
    assert wanted.keys() == found.keys()
    largest = max(gradient.norm() for gradient in wanted.values())
    for name, gradient in wanted.items():
        # With one active expert the router only scales the output, which the post-norm takes back: its gradient is 0
        # but for rounding, and is compared on the scale of the others.
        scale = largest if kind.startswith("1 of") and "mlp.gate." in name else gradient.norm()
        assert (found[name] - gradient).norm() <= 1e-5 * scale, name


@pytest.mark.parametrize("kind", ["dense", "3 of 5"])
def test_every_tensor_is_read_into_its_place(kind: str, tmp_path: Path) -> None:
    """Bit-equal with a distinct value in every tensor: nothing is swapped, transposed, left out or read twice."""
    make(kind, tmp_path)
    file = tmp_path / "model.safetensors"
    stored = safetensors.torch.load_file(file)
    marked = {
        name: torch.arange(t.numel()).reshape(t.shape) / 1024 + 64 * i for i, (name, t) in enumerate(stored.items())
    }
    safetensors.torch.save_file({name: t.contiguous() for name, t in marked.items()}, file, metadata={"format": "pt"})
    model = load_model(tmp_path)[0]
    parameters = dict(model.named_parameters())
    for slot in tensor_map(model.config):
        value = parameters[slot.parameter][slot.place] if slot.place else parameters[slot.parameter]
        assert torch.equal(value, marked.pop(slot.source)), slot
    assert not marked


@pytest.mark.parametrize("shard_bytes", [1 << 30, 5000])
@pytest.mark.parametrize("kind", ["dense", "dense, grouped queries", "3 of 5", "1 of 1"])
def test_a_round_trip_keeps_every_bit(kind: str, shard_bytes: int, road: Path, tmp_path: Path) -> None:
    """transformers → ours → transformers, from one file and from many to one and to many."""
    theirs = make(kind, tmp_path / "theirs")
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="6KB")
    assert (tmp_path / "sharded/model.safetensors.index.json").is_file()
    tokenizer = load_tokenizer(road / "data/public/tokenizer")
    for source in ("theirs", "sharded"):
        output = tmp_path / f"{source} again"
        output.mkdir()
        save_model(load_model(tmp_path / source)[0], output, tokenizer, torch.float32, shard_bytes)
        again, info = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
        assert type(again) is type(theirs)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
        wanted, found = theirs.state_dict(), again.state_dict()
        assert wanted.keys() == found.keys()
        assert all(torch.equal(value, found[name]) for name, value in wanted.items())


def test_generation_with_a_cache_equals_generation_without(tmp_path: Path) -> None:
    make("3 of 5", tmp_path)
    model = load_model(tmp_path)[0]
    prompt = torch.randint(1, 101, (2, 9), generator=torch.Generator().manual_seed(3))
    found = generate(model, prompt, max_new_tokens=20, eos_id=-1)
    tokens = prompt
    for _ in range(20):
        tokens = torch.cat([tokens, model.logits(tokens)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(found, tokens[:, 9:])
    drawn = [generate(model, prompt, 20, -1, temperature=1.0, top_k=5, top_p=0.9, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert torch.equal(generate(model, prompt, 20, -1, temperature=1.0, top_k=1), found)
    assert torch.equal(generate(model, prompt, 20, -1, temperature=1.0, top_p=1e-6), found)
