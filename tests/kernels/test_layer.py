"""The expert layer, whole: every backend against the definition, what it keeps, what it chooses."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from flexpert_kernels import combine, dense_mixing, moe_ffn, route, sort_by_expert, spread
from flexpert_kernels.moe import dispatch, loop
from flexpert_kernels.moe.reference import reference_moe
from flexpert_kernels.swiglu.reference import swiglu_backward
from poison import poisoned
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

CPU_BACKENDS = ("auto", "loop", "grouped_mm", "dense")
#: Experts, active experts, tokens, width, FFN width.
SHAPES = [(1, 1, 6, 8, 12), (2, 2, 5, 12, 20), (5, 3, 17, 12, 20), (4, 1, 9, 8, 4), (5, 5, 1, 4, 8), (8, 2, 33, 16, 8)]
Case = tuple[int, int, int, int, int]


def inputs(case: Case, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    """Leaves in the order of `moe_ffn`'s differentiable arguments, and indices."""
    experts, active, tokens, width, ffn = case
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    indices = random(tokens, experts).topk(active, dim=-1).indices
    leaves = [random(tokens, width), random(tokens, active).softmax(-1), random(experts, 2, ffn, width) * width**-0.5,
              random(experts, width, ffn) * ffn**-0.5]  # fmt: skip
    return [leaf.to(dtype).requires_grad_(True) for leaf in leaves], indices


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return ((found.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-30)).item()


def with_gradients(layer: Callable[..., Tensor], leaves: list[Tensor], indices: Tensor, **keys: Any) -> list[Tensor]:
    """The output, and the gradients of a fixed function of it."""
    y_TD = layer(leaves[0], leaves[1], indices, *leaves[2:], **keys)
    seed = torch.linspace(-1, 1, y_TD.numel(), dtype=y_TD.dtype).view_as(y_TD)
    return [y_TD, *torch.autograd.grad(y_TD, leaves, seed)]


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_the_layer_and_its_gradients_equal_the_definition(case: Case, backend: str) -> None:
    leaves, indices = inputs(case)
    if backend == "grouped_mm":  # is for fp32 and below
        leaves = [leaf.detach().float().requires_grad_(True) for leaf in leaves]
    wanted = with_gradients(reference_moe, leaves, indices)
    found = with_gradients(moe_ffn, leaves, indices, backend=backend)
    again = with_gradients(moe_ffn, leaves, indices, backend=backend)
    for name, one, other, expected in zip(["y", "x", "weights", "gate_up", "down"], found, again, wanted, strict=True):
        assert relative_error(one, expected) <= (1e-5 if backend == "grouped_mm" else 1e-12), name
        assert torch.equal(one, other), f"{name}: another result the second time"


@pytest.mark.parametrize("case", [(2, 2, 3, 4, 6), (4, 2, 5, 4, 4), (3, 1, 4, 2, 4)], ids=str)
@pytest.mark.parametrize("backend", ["loop", "dense"])
def test_gradients_pass_gradcheck(case: Case, backend: str) -> None:
    leaves, indices = inputs(case)
    assert torch.autograd.gradcheck(
        lambda x, weights, gate_up, down: moe_ffn(x, weights, indices, gate_up, down, backend=backend), leaves
    )


def test_dense_mixing_is_the_layer_with_all_experts_active() -> None:
    (x, weights, gate_up, down), indices = inputs((3, 3, 7, 8, 12))
    probs = torch.zeros(7, 3, dtype=torch.float64).scatter(1, indices, weights.detach()).requires_grad_(True)
    wanted = with_gradients(reference_moe, [x, weights, gate_up, down], indices)
    y = dense_mixing(x, probs, gate_up, down)
    seed = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    found = [y, *torch.autograd.grad(y, [x, probs, gate_up, down], seed)]
    found[2] = found[2].gather(1, indices)
    for one, expected in zip(found, wanted, strict=True):
        assert relative_error(one, expected) <= 1e-12


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_experts_without_tokens_and_those_held_elsewhere_add_nothing(backend: str) -> None:
    leaves, _ = inputs((3, 2, 6, 8, 12), torch.float32)
    indices = torch.tensor([[1, -1]]).repeat(6, 1)
    found = with_gradients(moe_ffn, leaves, indices, backend=backend)
    only = [leaf[:, :1] if leaf is leaves[1] else leaf for leaf in leaves]
    wanted = with_gradients(reference_moe, only, indices[:, :1])
    assert relative_error(found[0], wanted[0]) <= 1e-6 and relative_error(found[1], wanted[1]) <= 1e-6
    assert found[2][:, 1].abs().sum() == 0 and relative_error(found[2][:, :1], wanted[2]) <= 1e-6
    for gradient, expected in zip(found[3:], wanted[3:], strict=True):
        assert gradient[[0, 2]].abs().sum() == 0 and relative_error(gradient, expected) <= 1e-6
    nowhere = with_gradients(moe_ffn, leaves, torch.full((6, 2), -1), backend=backend)
    assert all(part.abs().sum() == 0 for part in nowhere)


@pytest.mark.parametrize("backend", ["loop", "grouped_mm", "dense"])
def test_frozen_experts_get_no_gradient_and_the_rest_the_same(backend: str) -> None:
    leaves, indices = inputs((4, 2, 9, 8, 12), torch.float32)
    wanted = with_gradients(moe_ffn, leaves, indices, backend=backend)
    x, weights, *frozen = leaves
    y = moe_ffn(x, weights, indices, *(matrix.detach() for matrix in frozen), backend=backend)
    seed = torch.linspace(-1, 1, y.numel()).view_as(y)
    for one, expected in zip(torch.autograd.grad(y, [x, weights], seed), wanted[1:3], strict=True):
        assert torch.equal(one, expected)


@pytest.mark.parametrize("layer", ["routed", "mixed"])
def test_the_backward_pass_keeps_the_input_and_two_projections(layer: str) -> None:
    tokens, width, ffn, experts, active = 64, 8, 48, 4, 2
    leaves, indices = inputs((experts, active, tokens, width, ffn), torch.float32)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        if layer == "routed":
            y = moe_ffn(leaves[0], leaves[1], indices, *leaves[2:])
        else:
            y = dense_mixing(leaves[0], torch.full((tokens, experts), 0.25), *leaves[2:])
    for leaf in leaves[2:]:
        kept.pop(leaf.untyped_storage().data_ptr(), None)
    rows = tokens * (active if layer == "routed" else experts)
    projections, small = rows * 2 * ffn * 4, 3 * rows * 8 + 1024  # the latter: the order of rows, and weights
    assert y.requires_grad and projections <= sum(kept.values()) <= projections + tokens * width * 4 + small


def test_gradients_in_blocks_of_rows_have_the_references_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    length = loop.BLOCK // 1000
    for rows in (1, length, 2 * length + 3):
        h, da = torch.randn(rows, 2000, generator=generator), torch.randn(rows, 1000, generator=generator)
        weights = torch.rand(rows, generator=generator)
        for found, wanted in zip(loop.swiglu_backward(h, da, weights), swiglu_backward(h, da, weights), strict=True):
            assert wanted is not None and torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close_to_fp32(dtype: torch.dtype) -> None:
    for backend in CPU_BACKENDS:
        leaves, indices = inputs((4, 2, 65, 32, 48), dtype)
        wanted = with_gradients(reference_moe, [leaf.detach().float().requires_grad_(True) for leaf in leaves], indices)
        for one, expected in zip(with_gradients(moe_ffn, leaves, indices, backend=backend), wanted, strict=True):
            assert one.dtype == dtype and relative_error(one, expected) < 2e-2


@pytest.mark.slow
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_compiled_layer_is_one_graph_and_computes_the_same(backend: str) -> None:
    leaves, indices = inputs((4, 2, 24, 16, 32), torch.float32)
    wanted = with_gradients(moe_ffn, leaves, indices, backend=backend)
    compiled = torch.compile(moe_ffn, fullgraph=True, dynamic=False)
    for one, expected in zip(with_gradients(compiled, leaves, indices, backend=backend), wanted, strict=True):
        assert relative_error(one, expected) <= 1e-6


def test_rows_are_spread_and_combined_with_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(7, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    order = sort_by_expert(torch.tensor([[0, 2], [1, 0], [2, 1], [0, 1], [2, 0], [1, 2], [2, 1]]), 3)
    assert torch.autograd.gradcheck(lambda x, w: combine(spread(x, order).sin(), w, order), (x, weights))
    wanted = x.sin() * weights.sum(1, keepdim=True)
    assert torch.allclose(combine(spread(x, order).sin(), weights, order), wanted)
    nothing = sort_by_expert(torch.empty(0, 2, dtype=torch.long), 3)
    empty = x[:0].detach().requires_grad_(True)
    combine(spread(empty, nothing), weights[:0], nothing).sum().backward()
    assert empty.grad is not None and empty.grad.shape == (0, 4)


@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
def test_the_loop_alone_brings_the_counts_to_the_host_and_once_for_both_passes(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaves, indices = inputs((4, 2, 9, 8, 12), torch.float32)
    reads, tensor_cpu = [], Tensor.cpu

    def counted(tensor: Tensor) -> Tensor:
        reads.append(tensor)
        return tensor_cpu(tensor)

    monkeypatch.setattr(Tensor, "cpu", counted)
    with_gradients(moe_ffn, leaves, indices, backend=backend)
    assert len(reads) == (1 if backend == "loop" else 0)


def test_on_a_gpu_the_loops_products_are_given_the_counts_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were one: nothing is computed."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    devices = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function.name() == "flexpert::loop_rows":
                devices.append([tensor.device.type for tensor in args])
            return function(*args, **(kwargs or {}))

    with FakeTensorMode(), torch.no_grad(), Watch():
        x, weights, gate_up, down = (
            torch.empty(shape, device="cuda") for shape in ((9, 8), (9, 2), (4, 2, 12, 8), (4, 8, 12))
        )
        indices = torch.empty(9, 2, dtype=torch.int64, device="cuda")
        assert moe_ffn(x, weights, indices, gate_up, down, backend="loop", checked=False).device.type == "cuda"
    assert devices == [["cuda", "cuda", "cpu"]] * 2


def test_the_choice_follows_what_there_is_and_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    cpu = torch.device("cpu")
    dispatch.told.clear()
    with caplog.at_level(logging.INFO, "flexpert_kernels"):
        for _ in range(2):
            assert dispatch.choose(2, 2, 64, torch.bfloat16, cpu, (64, 64)) == "dense"
            assert dispatch.choose(8, 2, 64, torch.bfloat16, cpu, (64, 64)) == dispatch.ON_CPU
            assert dispatch.choose(2, 2, 64, torch.bfloat16, cpu, (64, 64), is_part=True) == dispatch.ON_CPU
    assert len(caplog.messages) == 2


def test_on_a_gpu_the_choice_follows_its_age_the_shapes_and_the_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were one: nothing is computed."""
    gpu, bf16, age = torch.device("cuda"), torch.bfloat16, (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: age)
    assert dispatch.choose(8, 2, 4096, bf16, gpu, (4096, 11008)) == "triton"
    assert dispatch.choose(2, 1, 1 << 15, bf16, gpu, (4096, 11008)) == "loop"
    assert dispatch.choose(8, 2, 4096, torch.float32, gpu, (4096, 11008)) == "loop"
    assert dispatch.choose(8, 2, 4096, bf16, gpu, (4096, 11009)) == "loop"
    assert dispatch.choose(512, 8, 4096, bf16, gpu, (4096, 11008)) == "loop"
    for dtype, backend in ((torch.float32, "triton"), (bf16, "triton"), (torch.float64, "loop")):
        with FakeTensorMode():
            assert dispatch.elementwise(torch.empty(4, 8, dtype=dtype, device=gpu)) == backend
    age = (7, 5)
    assert dispatch.choose(8, 2, 4096, bf16, gpu, (4096, 11008)) == "loop"


@pytest.mark.parametrize("backend", [*CPU_BACKENDS, "reference"])
def test_under_autocast_the_result_is_in_its_type(backend: str) -> None:
    for case in ((4, 2, 9, 16, 24), (3, 3, 9, 16, 24)):
        leaves, indices = inputs(case, torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            y = moe_ffn(leaves[0], leaves[1], indices, *leaves[2:], backend=backend)
        assert y.dtype == torch.bfloat16
        assert relative_error(y, moe_ffn(leaves[0], leaves[1], indices, *leaves[2:])) < 1e-2
        assert all(part.dtype == torch.float32 for part in torch.autograd.grad(y.float().sum(), leaves))


def check_without_rows(backend: str) -> None:
    leaves, indices = inputs((3, 2, 0, 8, 16), torch.float32)
    for part, like in zip(with_gradients(moe_ffn, leaves, indices, backend=backend), [leaves[0], *leaves], strict=True):
        assert part.shape == like.shape and part.abs().sum() == 0


@pytest.mark.parametrize("backend", [*CPU_BACKENDS, "reference"])
def test_no_tokens_are_no_mistake(backend: str) -> None:
    check_without_rows(backend)


def check_expanded_gradient() -> None:
    """As `y.sum().backward()` hands it on: one number for all."""
    leaves, indices = inputs((3, 2, 5, 8, 16), torch.float32)
    for wanted, found in zip(
        *(
            torch.autograd.grad(moe_ffn(leaves[0], leaves[1], indices, *leaves[2:], backend=backend).sum(), leaves)
            for backend in ("loop", "triton")
        ),
        strict=True,
    ):
        assert relative_error(found, wanted) <= 1e-5


def test_the_kernels_take_what_a_training_step_brings(interpreted: Callable[..., Any]) -> None:
    interpreted(check_without_rows, "triton")
    interpreted(check_expanded_gradient)


def check_interpreted(case: Case, dtype: torch.dtype, held: bool) -> None:
    """The Triton backend against the definition in fp64; in the interpreter's process."""
    with poisoned():
        leaves, indices = inputs(case, dtype)
        if held:
            indices = indices.where(torch.arange(indices.numel()).view_as(indices) % 3 != 1, -1)
        wanted = with_gradients(
            reference_moe, [leaf.detach().double().requires_grad_(True) for leaf in leaves], indices
        )
        found = with_gradients(moe_ffn, leaves, indices, backend="triton")
        again = with_gradients(moe_ffn, leaves, indices, backend="triton")
    for name, one, other, expected in zip(("y", "x", "weights", "gate_up", "down"), found, again, wanted, strict=True):
        assert one.dtype == dtype and relative_error(one, expected) <= (1e-5 if dtype == torch.float32 else 1e-2), name
        assert torch.equal(one, other), f"{name}: other bits the second time"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("case", [(3, 2, 11, 16, 24), (4, 4, 7, 8, 40), (2, 1, 1, 8, 8)], ids=str)
def test_the_kernels_together_are_the_layer(interpreted: Callable[..., Any], case: Case, dtype: torch.dtype) -> None:
    for held in (False, True):
        interpreted(check_interpreted, case, dtype, held)


def check_dense_interpreted() -> None:
    (x, _, gate_up, down), _ = inputs((3, 3, 7, 8, 16), torch.float32)
    probs = torch.rand(7, 3, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
    leaves = [x, probs, gate_up, down]
    seed = torch.linspace(-1, 1, 56).view(7, 8)
    with poisoned():
        found = dense_mixing(*leaves)
        gradients = torch.autograd.grad(found, leaves, seed)
    double = [leaf.detach().double().requires_grad_(True) for leaf in leaves]
    wanted = reference_moe(double[0], double[1], torch.arange(3).repeat(7, 1), *double[2:])
    assert relative_error(found, wanted) <= 1e-6
    for one, expected in zip(gradients, torch.autograd.grad(wanted, double, seed.double()), strict=True):
        assert relative_error(one, expected) <= 1e-6


def test_dense_mixing_on_the_kernels_is_the_layer(interpreted: Callable[..., Any]) -> None:
    interpreted(check_dense_interpreted)


def check_route_interpreted() -> None:
    from flexpert_kernels.route import reference

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(9, 5, generator=generator).requires_grad_(True)
    seeds = [torch.randn(shape, generator=generator) for shape in ((9, 5), (9, 3), (9,))]

    def outcome(found: tuple[Tensor, ...]) -> list[Tensor]:
        probs, weights, indices, normaliser = found
        (gradient,) = torch.autograd.grad((probs, weights, normaliser), logits, seeds)
        return [probs, weights, indices, normaliser, gradient]

    for one, expected in zip(outcome(route(logits, 3)), outcome(reference.route(logits, 3)), strict=True):
        assert relative_error(one, expected) <= 1e-6


def test_the_routers_gradient_on_its_kernel_is_autograds(interpreted: Callable[..., Any]) -> None:
    interpreted(check_route_interpreted)
