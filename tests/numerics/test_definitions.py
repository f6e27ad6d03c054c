"""Our parts against their definitions in fp64: the biased router in a mixture and a model, the chunked loss."""

import pytest
import torch
from flexpert_kernels.moe.reference import reference_moe

from flexpert.config.groups import ModelConfig
from flexpert.model.loss import IGNORE, chunked_nll, router_z_sum
from flexpert.model.moe import MixtureOfExperts
from flexpert.model.router import Router
from flexpert.model.transformer import Transformer, initialise


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(*shape, generator=generator, dtype=torch.double) * scale).requires_grad_(True)


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("active", [2, 4])
def test_a_biased_mixture_equals_its_fp64_definition(active: int) -> None:
    """softmax over all experts of W x + min(b, 0), then top-k, no renormalisation; public bias 0."""
    config = ModelConfig(
        hidden_size=16, num_layers=1, num_heads=2, intermediate_size=24, vocab_size=32, num_experts=4,
        active_experts=active, router_bias=True,
    )  # fmt: skip
    torch.manual_seed(0)
    layer = MixtureOfExperts(config, (4,))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    layer.router.bias[0].data = torch.tensor([-0.2, -0.7, 0.4, -1.3])  # the third acts as 0
    x = torch.randn(9, 16, requires_grad=True)
    found, routing = layer(x)
    found.square().sum().backward()

    double = {name: p.detach().double().requires_grad_(True) for name, p in layer.named_parameters()}
    x_double = x.detach().double().requires_grad_(True)
    bias = torch.minimum(double["router.bias.0"], torch.zeros(4, dtype=torch.double))
    logits = x_double @ double["router.weight.0"].T + bias
    weights, indices = logits.softmax(-1).topk(active, dim=-1)
    wanted = reference_moe(x_double, weights, indices, double["groups.0.gate_up"], double["groups.0.down"])
    wanted.square().sum().backward()

    assert torch.equal(routing.indices_TK, indices)
    assert (found - wanted).abs().max() <= 1e-5
    assert x.grad is not None and x_double.grad is not None
    assert relative_error(x.grad, x_double.grad) <= 1e-5
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and double[name].grad is not None, name
        assert relative_error(parameter.grad, double[name].grad) <= 1e-5, name
    assert layer.router.bias[0].grad[2] == 0  # type: ignore[index]


def fp64_model(p: dict[str, torch.Tensor], config: ModelConfig, tokens_BS: torch.Tensor) -> torch.Tensor:
    """Logits of a biased mixture, written out from the paper, with nothing of the model's own code."""

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return weight * x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()

    batch, length = tokens_BS.shape
    half = config.head_dim // 2
    frequency = config.rope_theta ** (-torch.arange(half, dtype=torch.double) / half)
    turn = torch.polar(torch.ones(length, half, dtype=torch.double), torch.arange(length)[:, None] * frequency)

    def heads(x: torch.Tensor, rotate: bool) -> torch.Tensor:
        x = x.view(batch, length, -1, config.head_dim).transpose(1, 2)
        if not rotate:
            return x
        turned = torch.complex(x[..., :half], x[..., half:]) * turn
        return torch.cat((turned.real, turned.imag), -1)

    x = p["embedding.weight"][tokens_BS]
    for layer in range(config.num_layers):
        a, m = f"blocks.{layer}.attention", f"blocks.{layer}.feed_forward"
        q = heads(norm(x @ p[f"{a}.q_proj.weight"].T, p[f"{a}.q_norm.weight"]), True)
        k = heads(norm(x @ p[f"{a}.k_proj.weight"].T, p[f"{a}.k_norm.weight"]), True)
        v = heads(x @ p[f"{a}.v_proj.weight"].T, False)
        scores = q @ k.transpose(2, 3) / config.head_dim**0.5
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, -1)
        x = x + norm(mixed @ p[f"{a}.o_proj.weight"].T, p[f"blocks.{layer}.attention_norm.weight"])
        flat = x.flatten(0, 1)
        logits = flat @ p[f"{m}.router.weight.0"].T + p[f"{m}.router.bias.0"].clamp(max=0)
        weights, indices = logits.softmax(-1).topk(config.active_experts, dim=-1)
        out = reference_moe(flat, weights, indices, p[f"{m}.groups.0.gate_up"], p[f"{m}.groups.0.down"])
        x = x + norm(out.view_as(x), p[f"blocks.{layer}.feed_forward_norm.weight"])
    return norm(x, p["norm.weight"]) @ p["head.weight"].T


@pytest.mark.parametrize("active", [2, 3])
def test_a_biased_model_equals_its_fp64_definition(active: int) -> None:
    config = ModelConfig(
        hidden_size=24, num_layers=2, num_heads=3, intermediate_size=20, vocab_size=37, num_experts=3,
        active_experts=active, router_bias=True, initializer_range=0.2,
    )  # fmt: skip
    model = Transformer(config)
    initialise(model, seed=5)
    with torch.no_grad():
        for block in model.blocks:
            block.feed_forward.router.bias[0].copy_(torch.tensor([-0.1, -0.8, 0.3]))  # type: ignore[union-attr, index]
    tokens = torch.randint(0, 37, (2, 11), generator=torch.Generator().manual_seed(0))
    found = model.logits(tokens)
    found.logsumexp(-1).sum().backward()
    double = {name: p.detach().double().requires_grad_(True) for name, p in model.named_parameters()}
    wanted = fp64_model(double, config, tokens)
    wanted.logsumexp(-1).sum().backward()
    assert (found - wanted).abs().max() <= 1e-5
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and double[name].grad is not None, name
        assert relative_error(parameter.grad, double[name].grad) <= 1e-5, name


def test_groups_held_apart_compute_what_one_group_computes() -> None:
    """An expert job holds (1, 1); the same two experts in one group give the same output."""
    config = ModelConfig(
        hidden_size=16, num_layers=1, num_heads=2, intermediate_size=24, vocab_size=32, num_experts=2, active_experts=2
    )
    together, apart = MixtureOfExperts(config, (2,)), MixtureOfExperts(config, (1, 1))
    for parameter in together.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    for index in range(2):
        apart.router.weight[index].data = together.router.weight[0].data[index : index + 1]
        apart.groups[index].gate_up.data = together.groups[0].gate_up.data[index : index + 1]
        apart.groups[index].down.data = together.groups[0].down.data[index : index + 1]
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(together(x)[0], apart(x)[0])


@pytest.mark.parametrize("chunk", [1, 5, 100])
def test_the_chunked_loss_equals_cross_entropy_and_its_z_loss(chunk: int) -> None:
    hidden, weight = random(13, 8), random(29, 8)
    targets = torch.randint(0, 29, (13,), generator=torch.Generator().manual_seed(0))
    targets[4] = IGNORE
    nll, lse = chunked_nll(hidden, weight, targets, chunk)
    found = nll.double().sum() + 0.1 * lse.double().square().sum()
    logits = hidden @ weight.T
    wanted_lse = logits.logsumexp(-1)
    wanted_nll = torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
    wanted = wanted_nll + 0.1 * wanted_lse.square().sum()
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)
    for gradient, expected in zip(
        torch.autograd.grad(found, [hidden, weight]), torch.autograd.grad(wanted, [hidden, weight]), strict=True
    ):
        assert relative_error(gradient, expected) <= 1e-6  # the loss itself is in fp32


def test_router_z_sums_over_layers_and_tokens() -> None:
    config = ModelConfig(
        hidden_size=8, num_layers=1, num_heads=2, intermediate_size=12, vocab_size=32, num_experts=3, active_experts=1
    )
    layer = MixtureOfExperts(config, (3,))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    routing = layer(x)[1]
    logits = (x @ layer.router.weight[0].T).double()
    single = (logits - logits.mean(-1, keepdim=True)).logsumexp(-1).square().sum()
    assert router_z_sum([routing, routing]).item() == pytest.approx(2 * single.item(), rel=1e-5)


def test_the_router_z_loss_does_not_see_one_vector_added_to_every_row() -> None:
    """Rows are relative to the public one: which row is the zero vector must not matter to the loss."""
    rows, x = torch.randn(3, 8), torch.randn(4, 8)
    losses, gradients = [], []
    for shift in (torch.zeros(8), torch.randn(8)):
        router = Router(8, (3,), 2, bias=False)
        with torch.no_grad():
            router.weight[0].copy_(rows + shift)
        loss = router_z_sum([router(x)])
        loss.backward()
        losses.append(loss.item())
        gradients.append(router.weight[0].grad)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)
    assert gradients[0].sum(0).abs().max() < 1e-5  # and pulls no way in which all rows move together
