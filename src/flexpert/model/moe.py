"""The feed-forward layers: one dense FFN (public model), or a mixture of experts.

Shapes: T tokens, D residual width, F FFN width, E experts, K active experts.
"""

import torch
import torch.nn.functional as F
from flexpert_kernels import dense_mixing, lacking, moe_ffn
from torch import Tensor, nn

from flexpert.config.groups import ModelConfig
from flexpert.errors import UserError
from flexpert.model.router import Router, Routing


class FeedForward(nn.Module):
    """SwiGLU FFN `W2 (silu(W1 x) ⊙ W3 x)`; gate_proj = W1, up_proj = W3, down_proj = W2."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, ffn_width = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(width, ffn_width, bias=False)
        self.up_proj = nn.Linear(width, ffn_width, bias=False)
        self.down_proj = nn.Linear(ffn_width, width, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)), None


class ExpertGroup(nn.Module):
    """Experts that live in one pair of stacked parameters: gate and up [E, 2, F, D], down [E, D, F].

    All experts of a group are frozen or trained together.

    Attributes:
        backend: of `flexpert_kernels.moe_ffn`.
    """

    backend = "auto"

    def __init__(self, num_experts: int, hidden_size: int, ffn_size: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2, ffn_size, hidden_size))
        self.down = nn.Parameter(torch.empty(num_experts, hidden_size, ffn_size))

    def matrices(self) -> tuple[Tensor, Tensor]:
        """As the products read them."""
        return self.gate_up, self.down

    def forward(self, x_TD: Tensor, weights: Tensor, indices_TK: Tensor | None = None, is_part: bool = False) -> Tensor:
        """What the group adds to each token, [T, D].

        Args:
            x_TD: tokens.
            weights: of all the group's experts, [T, E]; or, with `indices_TK`, of those that they name, [T, K].
            indices_TK: each token's experts, counted from the group's first; negative: held elsewhere.
            is_part: whether some are.
        """
        if indices_TK is None:
            return dense_mixing(x_TD, weights, *self.matrices())
        return moe_ffn(
            x_TD, weights, indices_TK, *self.matrices(), backend=self.backend, checked=False, is_part=is_part
        )


def held(indices_TK: Tensor, first: int, size: int) -> Tensor:
    """Indices counted from a group's first expert; -1: not of its `size` ones."""
    local_TK = indices_TK - first
    return torch.where((local_TK >= 0) & (local_TK < size), local_TK, -1)


class MixtureOfExperts(nn.Module):
    """`Σ_{e ∈ topk} p_e · E_e(x)`: the router's probabilities weight the experts' outputs.

    Where every expert is active (each expert job, small assembled models) there is nothing to sort and the mixture is
    plain matrix products; otherwise tokens go to their experts, and no token is ever dropped.

    Args:
        config: shapes; `num_experts` must be the sum of `group_sizes`.
        group_sizes: experts in each separately held group; (E,) for an assembled model, (1, 1) in an expert job.
    """

    def __init__(self, config: ModelConfig, group_sizes: tuple[int, ...]) -> None:
        super().__init__()
        assert sum(group_sizes) == config.num_experts
        self.all_active = config.active_experts == config.num_experts
        self.router = Router(config.hidden_size, group_sizes, config.active_experts, config.router_bias)
        self.group_sizes = group_sizes
        self.groups = nn.ModuleList(
            ExpertGroup(size, config.hidden_size, config.intermediate_size) for size in group_sizes
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        """[…, D] → the mixture's output of the same shape, and the routing of its T tokens."""
        x_TD = x.reshape(-1, x.shape[-1])
        routing = self.router(x_TD)
        y_TD, first = None, 0
        for size, group in zip(self.group_sizes, self.groups, strict=True):
            last = first + size
            if self.all_active:
                part = group(x_TD, routing.probs_TE[:, first:last].to(x.dtype))
            else:
                here_TK = held(routing.indices_TK, first, size)
                part = group(x_TD, routing.weights_TK.to(x.dtype), here_TK, len(self.groups) > 1)
            y_TD = part if y_TD is None else y_TD + part
            first = last
        assert y_TD is not None
        return y_TD.view_as(x), routing


def set_backend(model: nn.Module, backend: str, device: torch.device) -> None:
    """Choose what computes a model's experts where not all are active; see `flexpert_kernels.moe_ffn`.

    Raises:
        UserError: the device, or what is installed, does not allow it.
    """
    groups = [module for module in model.modules() if isinstance(module, ExpertGroup)]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for group in groups:
        num_experts, *widths = group.down.shape
        lacks = lacking(device, dtype, tuple(widths), num_experts) if backend == "triton" else ""
        if backend == "grouped_mm" and any(width * dtype.itemsize % 16 for width in widths):
            lacks = f"rows of {widths[0]} or {widths[1]} are not multiples of 16 bytes"
        if lacks:
            raise UserError(f"moe_backend={backend} cannot be used: {lacks}; leave moe_backend=auto")
        group.backend = backend
