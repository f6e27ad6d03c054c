"""For `gpu_moe.py`: steps of an expert job with the frozen half skipped, and in the reference's way."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from moe_timing import Setting
from torch import nn

from flexpert.config.compose import compose
from flexpert.config.groups import ModelConfig, OptimConfig
from flexpert.model.flops import flops_per_token
from flexpert.model.loss import chunked_nll
from flexpert.model.transformer import build_on_meta
from flexpert.parallel.layout import Layout
from flexpert.planning.job import expert_job
from flexpert.planning.memory import HALF, memory_of
from flexpert.train.expert import OWN
from flexpert.train.freeze import cast_frozen, train_only
from flexpert.train.optimizer import build_optimizer

#: Share of the GPU's memory that the plan may fill.
USED = 0.75


def shape_of(setting: Setting) -> ModelConfig:
    """As many layers of two experts as the plan says fit; both have gradients in the reference's way."""
    config: ModelConfig = compose("plan", ["model=flex_2x7b"])[0].model
    if not setting.on_gpu:
        return replace(config, hidden_size=48, intermediate_size=32, num_heads=4, vocab_size=256, num_layers=1)

    def needed(layers: int) -> int:
        part = replace(config, num_layers=layers)
        planned = memory_of(expert_job(part, 1, 1), Layout(1), setting.sequences * setting.length, 1024, "none")
        return planned.total + HALF * part.num_ffn_params()

    available = USED * torch.cuda.get_device_properties(setting.device).total_memory
    fitting = [layers for layers in range(1, config.num_layers + 1) if needed(layers) <= available]
    return replace(config, num_layers=max(fitting, default=1))


class ExpertJob:
    """As `flexpert expert` has it on a GPU, of random weights."""

    def __init__(self, setting: Setting, config: ModelConfig) -> None:
        self.setting = setting
        self.model = build_on_meta(config, (1, 1))
        train_only(self.model, lambda name: any(part in name for part in OWN))
        if setting.on_gpu:
            cast_frozen(self.model, setting.dtype)
        self.model.to_empty(device=setting.device)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.fill_(1.0) if "norm" in name else parameter.normal_(0.0, 0.02)
        self.optimizer = build_optimizer(self.model, OptimConfig())
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.frozen = [parameter for name, parameter in self.model.named_parameters() if ".groups.0." in name]
        self.tokens_BS = torch.randint(0, config.vocab, (setting.sequences, setting.length + 1), device=setting.device)

    def compute(self, everything: bool) -> None:
        """Whether the frozen expert gets gradients."""
        for parameter in self.frozen:
            parameter.requires_grad_(everything)

    def step(self, everything: bool) -> Iterator[None]:
        """Its parts: both passes, and the optimiser's step."""
        self.compute(everything)
        with torch.autocast("cuda", torch.bfloat16, enabled=self.setting.on_gpu):
            hidden = self.model(self.tokens_BS[:, :-1])
            targets_T = self.tokens_BS[:, 1:].flatten()
            nll_T, _ = chunked_nll(hidden.stream_BSD.flatten(0, 1), self.model.head.weight, targets_T)
        nll_T.mean().backward()  # type: ignore[no-untyped-call]
        for parameter in self.frozen:
            if parameter.grad is not None:
                parameter.grad.zero_()
        yield
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        yield
        self.model.zero_grad(set_to_none=True)

    def operations(self, everything: bool) -> float:
        """Of a step, as they are performed: attention skips what is after a token and repeats a product in its backward
        pass (five, where four are counted), and the loss computes its logits twice.
        """
        self.compute(everything)
        model, length = self.model, self.setting.length
        counted, plain = flops_per_token(model, length), flops_per_token(model, 0)
        attention = (counted.forward - plain.forward) / 2 + (counted.backward - plain.backward) * 5 / 8
        logits = 2 * model.config.vocab * model.config.hidden_size
        return (plain.total + attention + logits) * self.setting.sequences * length
