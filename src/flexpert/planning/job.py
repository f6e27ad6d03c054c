"""What a stage trains: its tensors by shape, and the operations of a token. Nothing here needs PyTorch.

Shapes: D residual width, K width of keys and values, F FFN width, V vocabulary, E experts, S positions.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from flexpert.config.groups import ModelConfig
from flexpert.config.stages import PlanConfig


class Weight(NamedTuple):
    """A parameter of the built model.

    Attributes:
        unit: what `fully_shard` gathers together with it: root, block, router, or experts I of group I.
        shape: of the whole.
        trained: has gradient and optimiser state, and an fp32 master; what is frozen is held in bf16.
        tensor_dim: split over the ranks of `tensor`; None: all of these have it.
    """

    unit: str
    shape: tuple[int, ...]
    trained: bool
    tensor_dim: int | None = None

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Job:
    """One run of a training stage.

    Attributes:
        stage: its name.
        model: the shape that is trained, of which E = 0 is dense.
        group_sizes: how its experts are held apart, as `Transformer` takes it.
        trains_trunk: embeddings, attention, norms and head, and a dense model's FFN.
        trains_experts, trains_rows: for each group, whether its FFNs, and its router rows, are trained.
        tokens: of the whole run.
        count: runs of this kind.
    """

    stage: str
    model: ModelConfig
    group_sizes: tuple[int, ...]
    trains_trunk: bool
    trains_experts: tuple[bool, ...]
    trains_rows: tuple[bool, ...]
    tokens: int
    count: int = 1

    @property
    def all_active(self) -> bool:
        return self.model.active_experts == self.model.num_experts

    def block(self) -> list[Weight]:
        """The parameters of each of the L blocks."""
        model, trained = self.model, self.trains_trunk
        D, F, K = model.hidden_size, model.intermediate_size, model.kv_heads * model.head_dim
        dense = [((D, D), 0), ((K, D), 0), ((K, D), 0), ((D, D), 1), ((D,), 0), ((K,), 0), ((D,), None), ((D,), None)]
        if not model.num_experts:
            dense += [((F, D), 0), ((F, D), 0), ((D, F), 1)]
        weights = [Weight("block", shape, trained, dim) for shape, dim in dense]
        groups = zip(self.group_sizes, self.trains_experts, self.trains_rows, strict=True)
        for index, (size, experts, rows) in enumerate(groups):
            weights += [Weight(f"experts {index}", shape, experts) for shape in ((size, 2, F, D), (size, D, F))]
            shapes: list[tuple[int, ...]] = [(size, D), (size,)] if model.router_bias else [(size, D)]
            weights += [Weight("router", shape, rows) for shape in shapes]
        return weights

    def root(self) -> list[Weight]:
        """Embedding, last norm and head."""
        D, V, trained = self.model.hidden_size, self.model.vocab, self.trains_trunk
        return [Weight("root", (V, D), trained, 0), Weight("root", (D,), trained), Weight("root", (V, D), trained, 0)]

    def num_trained(self) -> int:
        """Trained parameters of the whole model."""
        block = sum(weight.num_elements for weight in self.block() if weight.trained)
        return self.model.num_layers * block + sum(weight.num_elements for weight in self.root() if weight.trained)

    def flops_per_token(self, sequence_length: int) -> tuple[int, int]:
        """(forward, backward) operations of a token, equal to those of `flexpert.model.flops`, which has the rules."""
        model, forward, backward = self.model, 0, 0
        D, F, K = model.hidden_size, model.intermediate_size, model.kv_heads * model.head_dim
        has_gradient = self.trains_trunk  # whether the residual stream has one

        def add(size: int, gradients: int) -> None:
            nonlocal forward, backward
            forward, backward = forward + 2 * size, backward + 2 * size * gradients

        for _ in range(model.num_layers):
            add(D * (D + 2 * K) + D * D, self.trains_trunk + has_gradient)
            add(2 * D * sequence_length, 2 * has_gradient)
            if not model.num_experts:
                add(3 * D * F, self.trains_trunk + has_gradient)
                continue
            add(model.num_experts * D, any(self.trains_rows) + has_gradient)
            sizes = self.group_sizes if self.all_active else (model.active_experts,)
            for num_active, trained in zip(sizes, self.trains_experts, strict=True):
                add(2 * num_active * D * F, trained + has_gradient)
                add(num_active * D * F, trained + (trained or any(self.trains_rows) or has_gradient))
            has_gradient |= any(self.trains_rows) or any(self.trains_experts)
        add(model.vocab * D, self.trains_trunk + has_gradient)
        return forward, backward


def pretrain_job(model: ModelConfig, tokens: int) -> Job:
    """The public model of a mixture, or the dense model itself, all of it trained."""
    return Job("pretrain", replace(model, num_experts=0, active_experts=1), (), True, (), (), tokens)


def expert_job(model: ModelConfig, tokens: int, count: int) -> Job:
    """The frozen public FFN and an owner's, which is trained with its router row; both run on every token."""
    pair = replace(model, num_experts=2, active_experts=2)
    return Job("expert", pair, (1, 1), False, (False, True), (False, True), tokens, count)


def tune_router_job(model: ModelConfig, tokens: int) -> Job:
    """The assembled mixture, of which the router rows are trained."""
    return Job("tune_router", model, (model.num_experts,), False, (False,), (True,), tokens)


def jobs_of(config: PlanConfig) -> list[Job]:
    """The runs of the pipeline that ends with this model, in their order."""
    model = config.model
    jobs = [pretrain_job(model, config.public_tokens)]
    if model.num_experts > 1:
        jobs.append(expert_job(model, config.expert_tokens, model.num_experts - 1))
        jobs.append(tune_router_job(model, config.router_tokens))
    return [job for job in jobs if config.stage in ("all", job.stage)]
