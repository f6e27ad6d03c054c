"""What public functions refuse, and what they say of it: the argument at fault, what was expected, what was given."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from flexpert_kernels import combine, dense_mixing, moe_ffn, route, sort_by_expert, spread
from torch import Tensor


def to(value: Any) -> Callable[[Any], Any]:
    return lambda _: value


def double(tensor: Tensor) -> Tensor:
    return tensor.double()


#: Function, what is changed in arguments that fit, and what is said.
MISTAKES: list[tuple[Callable[..., Any], dict[str, Callable[[Any], Any]], str]] = [
    (moe_ffn, {"x_TD": lambda t: t.tolist()}, "x_TD: a tensor expected, list given"),
    (moe_ffn, {"x_TD": double}, "x_TD: type = torch.float32 expected, torch.float64 given"),
    (moe_ffn, {"down_EDF": double}, "down_EDF: type = torch.float32 expected, torch.float64 given"),
    (moe_ffn, {"x_TD": lambda t: t.long()}, "x_TD: type .* expected, torch.int64 given"),
    (moe_ffn, {"x_TD": lambda t: t[0]}, r"x_TD: shape (T, D) expected, (8,) given"),
    (moe_ffn, {"x_TD": lambda t: t[:5]}, "x_TD: T = 6 expected, 5 given"),
    (moe_ffn, {"x_TD": lambda t: t[:, :7]}, "x_TD: D = 8 expected, 7 given"),
    (moe_ffn, {"weights_TK": lambda t: t[:, :1]}, "weights_TK and indices_TK: the same K expected, 1 and 2 given"),
    (moe_ffn, {"weights_TK": lambda t: t[:, :0], "indices_TK": lambda t: t[:, :0]},
     "weights_TK and indices_TK: K of at least 1 expected, 0 given"),
    (moe_ffn, {"indices_TK": lambda t: t.float()}, "indices_TK: type torch.int32 or torch.int64 expected"),
    (moe_ffn, {"indices_TK": lambda t: t + 3}, "indices_TK: experts below 3 expected, 5 given"),
    (moe_ffn, {"indices_TK": lambda t: t[:5]}, "indices_TK: T = 6 expected, 5 given"),
    (moe_ffn, {"gate_up_E2FD": lambda t: t[:, :1]}, "gate_up_E2FD: shape (E, 2, F, D) expected, (3, 1, 12, 8) given"),
    (moe_ffn, {"gate_up_E2FD": lambda t: t.mT}, "gate_up_E2FD: D = 8 expected, 12 given"),
    (moe_ffn, {"down_EDF": lambda t: t.mT}, "down_EDF: D = 8 expected, 12 given"),
    (moe_ffn, {"down_EDF": lambda t: t[1:]}, "gate_up_E2FD and down_EDF: the same E expected, 3 and 2 given"),
    (moe_ffn, {"down_EDF": lambda t: t.mT.contiguous().mT, "backend": to("grouped_mm")},
     "down_EDF: contiguous memory for backend grouped_mm expected, strides .* given"),
    (moe_ffn, {"down_EDF": lambda t: t[..., :6], "gate_up_E2FD": lambda t: t[:, :, :6].clone(),
               "backend": to("grouped_mm")}, "down_EDF: contiguous memory"),
    (moe_ffn, {"down_EDF": lambda t: t[..., :6].clone(), "gate_up_E2FD": lambda t: t[:, :, :6].clone(),
               "backend": to("grouped_mm")}, "gate_up_E2FD and down_EDF: rows of .* 16 bytes .* D = 8, F = 6 given"),
    (moe_ffn, {"x_TD": double, "gate_up_E2FD": double, "down_EDF": double, "backend": to("grouped_mm")},
     "x_TD: bf16, fp16 or fp32 for backend grouped_mm expected, torch.float64 given"),
    (moe_ffn, {"down_EDF": lambda t: t.to("meta")}, "down_EDF: device = cpu expected, meta given"),
    (moe_ffn, {"backend": to("triton")}, "backend: a CUDA device of sm_80 or newer"),
    (moe_ffn, {"backend": to("cuda")}, "backend: auto, reference, .* expected, cuda given"),
    (dense_mixing, {"x_TD": lambda t: t.tolist()}, "x_TD: a tensor expected, list given"),
    (dense_mixing, {"probs_TE": lambda t: t.long()}, "probs_TE: type .* expected, torch.int64 given"),
    (dense_mixing, {"probs_TE": lambda t: t[:, :2]}, "probs_TE: E = 3 expected, 2 given"),
    (dense_mixing, {"probs_TE": lambda t: t[:4]}, "x_TD and probs_TE: the same T expected, 6 and 4 given"),
    (dense_mixing, {"down_EDF": double}, "down_EDF: type = torch.float32 expected, torch.float64 given"),
    (dense_mixing, {"gate_up_E2FD": lambda t: t.to("meta")}, "gate_up_E2FD: device = cpu expected, meta given"),
    (dense_mixing, {"down_EDF": lambda t: t.mT}, "down_EDF: D = 8 expected, 12 given"),
    (sort_by_expert, {"indices_TK": lambda t: t.float()}, "indices_TK: type .* expected, torch.float32 given"),
    (sort_by_expert, {"indices_TK": lambda t: t[0]}, r"indices_TK: shape (T, K) expected, (2,) given"),
    (sort_by_expert, {"num_experts": to(0)}, "num_experts: an integer from 1 to 32767 expected, 0 given"),
    (sort_by_expert, {"num_experts": to(1 << 15)}, "num_experts: an integer from 1 to 32767 expected, 32768 given"),
    (sort_by_expert, {"num_experts": to(3.0)}, "num_experts: an integer from 1 to 32767 expected, 3.0 given"),
    (spread, {"x_TD": lambda t: t[:5]}, "x_TD and order.places_TK: the same T expected, 5 and 6 given"),
    (spread, {"x_TD": lambda t: t.long()}, "x_TD: type .* expected, torch.int64 given"),
    (spread, {"x_TD": lambda t: t.to("meta")}, "x_TD: device = cpu expected, meta given"),
    (spread, {"order": tuple}, "order: what sort_by_expert returned expected, tuple given"),
    (combine, {"y_ND": lambda t: t[1:]}, "y_ND and order.order_N: the same N expected, 11 and 12 given"),
    (combine, {"weights_TK": lambda t: t[:, :1]}, "weights_TK and order.places_TK: the same K expected, 1 and 2 given"),
    (combine, {"weights_TK": lambda t: t.flatten()}, r"weights_TK: shape (T, K) expected, (12,) given"),
    (combine, {"weights_TK": lambda t: t.bool()}, "weights_TK: type .* expected, torch.bool given"),
    (route, {"logits_TE": lambda t: t[0]}, r"logits_TE: shape (T, E) expected, (3,) given"),
    (route, {"logits_TE": lambda t: t.long()}, "logits_TE: type .* expected, torch.int64 given"),
    (route, {"top_k": to(4)}, "top_k: an integer from 1 to 3 expected, 4 given"),
    (route, {"top_k": to(0)}, "top_k: an integer from 1 to 3 expected, 0 given"),
    (route, {"top_k": to(-1)}, "top_k: an integer from 1 to 3 expected, -1 given"),
]  # fmt: skip


@pytest.mark.parametrize(("function", "change", "message"), MISTAKES)
def test_what_does_not_fit_is_named_before_anything_runs(
    function: Callable[..., Any], change: dict[str, Callable[[Any], Any]], message: str
) -> None:
    x, weights, indices = torch.rand(6, 8), torch.rand(6, 2), torch.tensor([[0, 2]]).repeat(6, 1)
    order = sort_by_expert(indices, 3)
    matrices = {"gate_up_E2FD": torch.rand(3, 2, 12, 8), "down_EDF": torch.rand(3, 8, 12)}
    arguments: dict[str, Any] = {
        moe_ffn: {"x_TD": x, "weights_TK": weights, "indices_TK": indices, **matrices, "backend": "auto"},
        dense_mixing: {"x_TD": x, "probs_TE": torch.rand(6, 3), **matrices},
        sort_by_expert: {"indices_TK": indices, "num_experts": 3},
        spread: {"x_TD": x, "order": order},
        combine: {"y_ND": spread(x, order), "weights_TK": weights, "order": order},
        route: {"logits_TE": torch.rand(6, 3), "top_k": 2},
    }[function]
    function(**arguments)
    for name, changed in change.items():
        arguments[name] = changed(arguments[name])
    said = message.replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=f"^{said}"):
        function(**arguments)


def refuse_what_kernels_cannot_compute() -> None:
    def layer(experts: int, dtype: torch.dtype) -> Tensor:
        x, weights, indices = torch.rand(5, 8, dtype=dtype), torch.rand(5, 1), torch.zeros(5, 1, dtype=torch.int64)
        matrices = torch.rand(experts, 2, 8, 8, dtype=dtype), torch.rand(experts, 8, 8, dtype=dtype)
        return moe_ffn(x, weights, indices, *matrices, backend="triton")

    assert layer(3, torch.float32).shape == (5, 8)
    with pytest.raises(ValueError, match=r"x_TD: bf16, fp16 or fp32 for backend triton expected, torch\.float64 given"):
        layer(3, torch.float64)
    with pytest.raises(ValueError, match="backend: another for more than 256 experts expected, triton given"):
        layer(257, torch.float32)


def test_what_the_kernels_cannot_compute_is_named(interpreted: Callable[..., Any]) -> None:
    interpreted(refuse_what_kernels_cannot_compute)
