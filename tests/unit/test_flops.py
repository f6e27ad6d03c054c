"""FLOPs per token, compared with what PyTorch's dispatcher counts while the model runs."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flexpert.config.groups import ModelConfig
from flexpert.model.flops import Flops, flops_per_token
from flexpert.model.loss import chunked_nll, router_z_sum
from flexpert.model.transformer import Transformer, build_on_meta, initialise
from flexpert.train.expert import OWN
from flexpert.train.freeze import train_only

BATCH, LENGTH = 3, 13
DENSE = ModelConfig(
    hidden_size=30, num_layers=3, num_heads=3, num_kv_heads=1, intermediate_size=17, vocab_size=37,
    max_sequence_length=64,
)  # fmt: skip


def shape(experts: int, active: int, bias: bool = False) -> ModelConfig:
    return ModelConfig(**{**vars(DENSE), "num_experts": experts, "active_experts": active, "router_bias": bias})


def build(config: ModelConfig, trained: Callable[[str], bool], groups: tuple[int, ...] | None = None) -> Transformer:
    model = build_on_meta(config, groups).to_empty(device="cpu")
    initialise(model, seed=0)
    train_only(model, trained)
    return model


#: What operators compute, from the shapes of their arguments: our own, and one that PyTorch forgets.
OPERATORS = {
    torch.ops.aten.addmm_: lambda total, a, b, **_: 2 * a[0] * a[1] * b[1],
    torch.ops.flexpert.loop_rows: lambda x, weight, starts, **_: 2 * x[0] * weight[1] * weight[2],
    torch.ops.flexpert.loop_outer: lambda y, x, starts, **_: 2 * y[0] * y[1] * x[1],
}


def count(model: Transformer, chunked: bool = False) -> Flops:
    """What runs, in each pass. Attention's fused kernels recompute in their backward pass; the plain one does not."""
    tokens = torch.randint(37, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    forward, backward = (FlopCounterMode(display=False, custom_mapping=OPERATORS) for _ in range(2))
    with sdpa_kernel(SDPBackend.MATH):
        with forward:
            hidden = model(tokens[:, :-1])
            stream, targets = hidden.stream_BSD.flatten(0, 1), tokens[:, 1:].flatten()
            if chunked:
                loss = chunked_nll(stream, model.head.weight, targets, 7)[0].sum()
            else:
                loss = F.cross_entropy(model.head(stream), targets)
            if hidden.routings:
                loss = loss + router_z_sum(hidden.routings)
        with backward:
            loss.backward()
    counts = [counter.get_total_flops() for counter in (forward, backward)]
    assert all(operations % (BATCH * LENGTH) == 0 for operations in counts)
    return Flops(*(operations // (BATCH * LENGTH) for operations in counts))


def everything(name: str) -> bool:
    return True


def own_expert(name: str) -> bool:
    return any(part in name for part in OWN)


def rows(name: str) -> bool:
    return ".router.weight." in name


@pytest.mark.parametrize(
    ("config", "groups", "trained"),
    [
        pytest.param(DENSE, None, everything, id="pretrain"),
        pytest.param(shape(2, 2), (1, 1), own_expert, id="expert"),
        pytest.param(shape(2, 2, bias=True), (1, 1), own_expert, id="expert with a bias"),
        pytest.param(
            shape(2, 2), (1, 1), lambda name: name.endswith(".router.weight.1"), id="calibration of the own row"
        ),
        pytest.param(shape(5, 2), None, rows, id="tune_router, 2 of 5"),
        pytest.param(shape(5, 5), None, rows, id="tune_router, 5 of 5"),
        pytest.param(shape(5, 3), None, everything, id="whole mixture, 3 of 5"),
    ],
)
def test_flops_are_those_that_pytorch_counts(
    config: ModelConfig, groups: tuple[int, ...] | None, trained: Callable[[str], bool]
) -> None:
    model = build(config, trained, groups)
    assert flops_per_token(model, LENGTH) == count(model)


def test_a_forward_pass_runs_the_active_experts_alone() -> None:
    expert = 2 * 3 * 30 * 17 * DENSE.num_layers
    forward = [flops_per_token(build(shape(5, k), everything), LENGTH).forward for k in (1, 2, 5)]
    assert (forward[1] - forward[0], forward[2] - forward[0]) == (expert, 4 * expert)


def test_logits_that_the_loss_computes_again_do_not_count() -> None:
    model = build(DENSE, everything)
    counted = count(model, chunked=True)
    counted.backward -= 2 * 30 * 37
    assert flops_per_token(model, LENGTH) == counted


def test_shapes_alone_are_enough() -> None:
    """The published 7B shape, on the meta device: close to six operations for each parameter that is multiplied."""
    olmo2_7b = ModelConfig(
        hidden_size=4096, num_layers=32, num_heads=32, intermediate_size=11008, vocab_size=100352,
    )  # fmt: skip
    total = flops_per_token(build_on_meta(olmo2_7b), 4096).total
    multiplied = olmo2_7b.num_params() - 100352 * 4096
    assert total == pytest.approx(6 * multiplied + 12 * 32 * 4096 * 4096, rel=1e-3)
