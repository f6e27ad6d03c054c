"""AdamW over what is trained; frozen parameters are not even listed."""

from typing import Any

import torch
from torch.distributed.tensor import DTensor

from flexpert.config.accelerators import load
from flexpert.config.groups import OptimConfig
from flexpert.model.transformer import Transformer
from flexpert.parallel.tensor import local
from flexpert.train.schedule import lr_factor


def build_optimizer(model: Transformer, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW with three groups: embeddings (no weight decay), router rows (their own rate), everything else.

    The last is two where experts are on another mesh than the rest: one fused step cannot take both.
    """
    members: dict[str, list[torch.nn.Parameter]] = {"embedding": [], "router": [], "other": [], "experts": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = "router" if ".router." in name else "embedding" if name.startswith("embedding.") else "other"
            is_apart = ".groups." in name and isinstance(parameter, DTensor)
            members["experts" if is_apart else kind].append(parameter)
    groups = [
        {
            "params": parameters,
            "peak_lr": (config.router_lr or config.lr) if kind == "router" else config.lr,
            "weight_decay": 0.0 if kind == "embedding" else config.weight_decay,
        }
        for kind, parameters in members.items()
        if parameters
    ]
    betas = (config.betas[0], config.betas[1])
    if config.adam == "torch":
        return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)
    kind = load("optim.adam", config.adam)
    optimizer: torch.optim.Optimizer = kind(groups, lr=config.lr, betas=betas, eps=config.eps, adam_w_mode=True)
    optimizer.register_step_pre_hook(counts_to_groups)
    optimizer.register_step_post_hook(counts_to_states)
    return optimizer


def counts_to_groups(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Give each group the number of steps that its parameters have had.

    transformer-engine and apex count in groups, torch in each parameter's state, where checkpoints look for it.
    """
    for group in optimizer.param_groups:
        group["step"] = max(int(optimizer.state[parameter].get("step", 0)) for parameter in group["params"])


def counts_to_states(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """The other way, after a step."""
    for group in optimizer.param_groups:
        for state in (optimizer.state[parameter] for parameter in group["params"]):
            if state:
                state["step"] = torch.tensor(float(group["step"]))


def set_learning_rate(optimizer: torch.optim.Optimizer, config: OptimConfig, step: int, num_steps: int) -> float:
    """Set every group's rate for this step, and return the main one."""
    factor = lr_factor(config, step, num_steps)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return config.lr * factor


@torch.no_grad()
def project_biases(model: Transformer) -> None:
    """Bring trained router biases back to at most 0, where they act.

    The router takes min(b, 0), whose gradient above 0 is 0: a bias that a step carried there would never come back.
    """
    for name, parameter in model.named_parameters():
        if ".router.bias." in name and parameter.requires_grad:
            local(parameter).clamp_(max=0)
