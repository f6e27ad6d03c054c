"""`flexpert plan` against what is really allocated, kept, sent and computed."""

import math
import multiprocessing
import operator
import random
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import megatron.core.parallel_state  # noqa: F401  (before processes are forked, each of which would take seconds for it)
import pytest
import torch
import torch.distributed as dist
from flexpert_kernels.moe import layer
from omegaconf import OmegaConf
from ranks import run_ranks
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from flexpert.checkpoint import distributed
from flexpert.checkpoint.layout import model_shapes
from flexpert.cli import main
from flexpert.config.compose import compose
from flexpert.config.groups import ModelConfig, OptimConfig
from flexpert.config.tree import conf_directory
from flexpert.model.flops import Flops, flops_per_token
from flexpert.model.loss import chunked_nll, router_z_sum
from flexpert.model.transformer import Transformer, build_on_meta
from flexpert.monitor.devices import peak_of
from flexpert.parallel.apply import apply_parallel
from flexpert.parallel.expert import ExpertAxes, apply_expert_parallel
from flexpert.parallel.layout import Layout, problem
from flexpert.parallel.mesh import build_meshes
from flexpert.parallel.ranks import Ranks
from flexpert.parallel.tensor import TensorAxis, apply_tensor_parallel, local
from flexpert.planning.cost import data_bytes, expert_bytes, tensor_bytes
from flexpert.planning.goodput import Saving, checkpoint_bytes, saving_of
from flexpert.planning.job import Job, expert_job, jobs_of, pretrain_job, tune_router_job
from flexpert.planning.memory import activation_bytes, state_bytes
from flexpert.planning.plan import contribution_bytes, model_bytes
from flexpert.planning.search import GIB, choices_of
from flexpert.train.expert import expert_tensors
from flexpert.train.freeze import cast_frozen
from flexpert.train.optimizer import build_optimizer


def published(name: str) -> ModelConfig:
    return ModelConfig(**OmegaConf.load(conf_directory() / "model" / f"{name}.yaml"))  # type: ignore[arg-type]


FLEX_37B = published("flex_37b")
SMALL = ModelConfig(
    hidden_size=64, num_layers=3, num_heads=4, num_kv_heads=2, intermediate_size=160, vocab_size=256, num_experts=4,
    active_experts=2,
)  # fmt: skip


def whole_job(model: ModelConfig) -> Job:
    """A mixture of which everything is trained, as no stage does."""
    return Job("whole", model, (model.num_experts,), True, (True,), (True,), 1)


def kinds(model: ModelConfig) -> dict[str, Job]:
    return {
        "pretrain": pretrain_job(model, 1),
        "expert": expert_job(model, 1, 7),
        "tune_router": tune_router_job(model, 1),
        "whole": whole_job(model),
    }


def is_trained(job: Job, name: str) -> bool:
    """By the names of the built model."""
    if ".groups." in name:
        return job.trains_experts[int(name.split(".groups.")[1].split(".")[0])]
    return job.trains_rows[int(name.rpartition(".")[2])] if ".router." in name else job.trains_trunk


def build(job: Job) -> Transformer:
    """On the meta device, frozen parts in bf16 as on a GPU."""
    model = build_on_meta(job.model, job.group_sizes or None)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_trained(job, name))
    cast_frozen(model, torch.bfloat16)
    return model


def local_bytes(tensors: Any) -> int:
    parts = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return sum(part.numel() * part.element_size() for part in parts)


def held(model: Transformer, optimizer: torch.optim.Optimizer) -> tuple[int, int, int]:
    """(weights, gradients, moments) of this rank."""
    parameters = list(model.parameters())
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return local_bytes(parameters), local_bytes(gradients), local_bytes(moments)


def in_fake_world(function: Callable[..., Any], rank: int, num_ranks: int, *args: Any) -> Any:
    """`function(*args)` in a process that believes to be one of `num_ranks`; the others never answer."""
    receive, send = multiprocessing.get_context("fork").Pipe(duplex=False)

    def run() -> None:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=num_ranks)
        send.send(function(*args))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    send.close()
    try:
        return receive.recv()  # EOFError where it failed; pytest shows its traceback
    finally:
        process.join()


def allocated(job: Job, layout: Layout) -> tuple[int, int, int]:
    model = build(job)
    apply_parallel(model, build_meshes(layout, torch.device("cpu")), torch.bfloat16)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer = build_optimizer(model, OptimConfig())
    for group in optimizer.param_groups:
        group["fused"] = group["foreach"] = False  # there is no fused step on the meta device
    optimizer.step()
    return held(model, optimizer)


LAYOUTS_37B = [
    ("expert", Layout(8, expert=4, expert_tensor=2)),
    ("whole", Layout(8, expert=8)),
    ("tune_router", Layout(64, 2, expert=4, expert_tensor=2, sequence=True)),
    ("pretrain", Layout(512, 8)),
    ("expert", Layout(512, 2, expert=2, expert_tensor=4, sequence=True)),
    ("whole", Layout(512, 4, expert=8, expert_tensor=2, sequence=True)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "layout"), LAYOUTS_37B, ids=[f"{kind} {layout}" for kind, layout in LAYOUTS_37B])
def test_state_of_the_37b_layouts_is_what_a_rank_allocates(kind: str, layout: Layout) -> None:
    job = kinds(FLEX_37B)[kind]
    assert problem(layout, job.model, job.group_sizes, 4096) is None
    assert in_fake_world(allocated, 0, layout.num_ranks, job, layout) == state_bytes(job, layout)


@pytest.mark.parametrize("rank", [0, 11])
def test_where_nothing_divides_the_first_rank_holds_most(rank: int) -> None:
    job, layout = whole_job(replace(FLEX_37B, num_layers=2)), Layout(12, expert=4)
    found, planned = in_fake_world(allocated, rank, 12, job, layout), state_bytes(job, layout)
    assert found == planned if rank == 0 else all(map(operator.lt, found, planned))


def loss(model: Transformer, ranks: Ranks, tokens: Tensor) -> Tensor:
    hidden, weight = model(tokens[:, :-1]), local(model.head.weight)
    stream_TD, targets_T = hidden.stream_BSD.flatten(0, 1), tokens[:, 1:].flatten()
    nll_T, _ = chunked_nll(stream_TD, weight, targets_T, 64, ranks.vocabulary(len(weight)))
    return nll_T.sum() + (router_z_sum(hidden.routings) if hidden.routings else 0.0)


def fill(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            part = local(parameter)
            part.copy_(torch.randn(part.shape, generator=generator) * 0.1)


LENGTH = 256
TOKENS = torch.randint(0, 256, (1, LENGTH + 1), generator=torch.Generator().manual_seed(0))
CASES: list[tuple[str, Layout]] = [
    ("pretrain", Layout(1)),
    ("pretrain", Layout(2)),
    ("pretrain", Layout(2, 2, sequence=True)),
    ("expert", Layout(2, 2, expert_tensor=2)),
    ("expert", Layout(4, 2, expert=2, expert_tensor=2, sequence=True)),
    ("expert", Layout(4, 2, expert=2, expert_tensor=2)),
    ("tune_router", Layout(2)),
    ("tune_router", Layout(2, expert=2)),
    ("whole", Layout(4, 2, expert=2, expert_tensor=2, sequence=True)),
    ("all active", Layout(2, expert=2)),
]
SMALL_JOBS = kinds(SMALL) | {"all active": tune_router_job(replace(SMALL, active_experts=4), 1)}
IDS = [f"{kind} {layout}" for kind, layout in CASES]


class Sent(TorchDispatchMode):
    """Bytes that this rank sends, by the name of the process group, were each collective a ring."""

    #: Of a collective's input, over n ranks.
    SHARES: ClassVar[dict[str, Callable[[int], float]]] = {
        "_allgather_base_": lambda n: n - 1,
        "all_gather_into_tensor": lambda n: n - 1,
        "_reduce_scatter_base_": lambda n: (n - 1) / n,
        "reduce_scatter_tensor": lambda n: (n - 1) / n,
        "allreduce_": lambda n: 2 * (n - 1) / n,
        "all_reduce": lambda n: 2 * (n - 1) / n,
        "alltoall_base_": lambda n: (n - 1) / n,
        "all_to_all_single": lambda n: (n - 1) / n,
    }

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, float] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._overloadpacket.__name__
        if function.namespace == "c10d" or (function.namespace == "_c10d_functional" and name in self.SHARES):
            if function.namespace == "c10d":  # those of `fully_shard`
                given = args[0 if name == "allreduce_" else 1]
                place = next(index for index, of in enumerate(function._schema.arguments) if of.name == "process_group")
                group = dist.ProcessGroup.unbox(args[place])
            else:  # ours; PyTorch 2.13 gives the group, 2.11 its name
                given, group = args[0], [*args, *(kwargs or {}).values()][-1]
                if isinstance(group, str):
                    group = dist.distributed_c10d._resolve_process_group(group)
            (tensor,) = given if isinstance(given, list) else [given]
            sent = tensor.numel() * tensor.element_size() * self.SHARES[name](group.size())
            self.bytes[group.group_name] = self.bytes.get(group.group_name, 0.0) + sent
        return function(*args, **(kwargs or {}))


def step(job: Job, layout: Layout) -> tuple[tuple[int, int, int], dict[str, float]]:
    """What a rank holds after a real step, and the bytes that it has sent over each axis."""
    meshes = build_meshes(layout, torch.device("cpu"))
    model = build(job)
    apply_parallel(model, meshes, torch.bfloat16)
    model.to_empty(device="cpu")
    fill(model)
    with Sent() as sent:
        loss(model, Ranks(meshes), TOKENS).backward()  # type: ignore[no-untyped-call]
    optimizer = build_optimizer(model, OptimConfig())
    optimizer.step()
    groups = {axis: mesh.get_group(axis).group_name
              for mesh in (meshes.dense, meshes.experts) for axis in mesh.mesh_dim_names or ()}  # fmt: skip
    assert len(set(groups.values())) == len(groups)
    return held(model, optimizer), {axis: sent.bytes.get(name, 0.0) for axis, name in groups.items()}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "layout"), CASES, ids=IDS)
def test_a_real_step_holds_and_sends_what_was_planned(kind: str, layout: Layout) -> None:
    # So many layers that the first, into which no gradient flows where the trunk is frozen, does not count.
    job = replace(SMALL_JOBS[kind], model=replace(SMALL_JOBS[kind].model, num_layers=10))
    found = run_ranks(step, layout.num_ranks, job, layout)
    assert [state for state, _ in found] == [state_bytes(job, layout)] * layout.num_ranks
    dense, experts = data_bytes(job, layout, 1)
    width, between = expert_bytes(job, layout, LENGTH, 2)
    planned = {"dp": dense, "tp": tensor_bytes(job, layout, LENGTH, 2), "edp": experts, "etp": width, "ep": between}
    sent = {axis: sum(rank[axis] for _, rank in found) / layout.num_ranks for axis in planned}
    assert planned == pytest.approx(sent, rel=0.1)


def kept(job: Job, layout: Layout) -> int:
    """Bytes that autograd keeps on this rank, parameters apart, where all is computed in bf16."""
    layer.as_computed = lambda *tensors: tensors  # a CPU would compute experts in fp32; this process is this test's own
    meshes = build_meshes(layout, torch.device("cpu"))
    model = build_on_meta(job.model, job.group_sizes or None).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_trained(job, name))
    if layout.tensor > 1:
        apply_tensor_parallel(model, TensorAxis(meshes.dense["tp"], layout.sequence))
    if layout.expert * layout.expert_tensor > 1:
        same_tokens = ("etp",) if layout.tensor > 1 and not layout.sequence else ()
        apply_expert_parallel(model, ExpertAxes(meshes.experts["ep", "etp"], same_tokens))
    model.to_empty(device="cpu")
    fill(model)
    own = {local(parameter).untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(x: Tensor) -> Tensor:
        storage = (x.to_local() if isinstance(x, DTensor) else x).untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage  # held, so that no other takes its place
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        total = loss(model, Ranks(meshes), TOKENS)
    assert total.requires_grad
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize(("kind", "layout"), CASES, ids=IDS)
def test_activations_are_what_autograd_keeps(kind: str, layout: Layout) -> None:
    found = run_ranks(kept, layout.num_ranks, SMALL_JOBS[kind], layout)
    # Tokens choose experts unequally, so that it is the mean of the ranks that counts.
    mean = sum(found) / layout.num_ranks
    assert activation_bytes(SMALL_JOBS[kind], layout, LENGTH, fused_norms=False) == pytest.approx(mean, rel=0.05)


@pytest.mark.parametrize("kind", SMALL_JOBS)
def test_recomputing_keeps_inputs_and_one_block(kind: str) -> None:
    job, layout = SMALL_JOBS[kind], Layout(2)
    deeper = replace(job, model=replace(job.model, num_layers=job.model.num_layers + 1))
    some, more = (activation_bytes(of, layout, LENGTH, "full") for of in (job, deeper))
    assert more - some == 2 * LENGTH * job.model.hidden_size
    one = replace(job, model=replace(job.model, num_layers=2))
    assert some < activation_bytes(one, layout, LENGTH) + 2 * LENGTH * 3 * job.model.hidden_size


@pytest.mark.parametrize("model", [FLEX_37B, replace(SMALL, router_bias=True)], ids=["flex_37b", "small"])
@pytest.mark.parametrize("kind", ["pretrain", "expert", "tune_router", "whole"])
def test_operations_and_parameters_are_those_of_the_built_model(kind: str, model: ModelConfig) -> None:
    job = kinds(model)[kind]
    built = build(job)
    assert Flops(*job.flops_per_token(LENGTH)) == flops_per_token(built, LENGTH)
    assert job.num_trained() == sum(p.numel() for p in built.parameters() if p.requires_grad)
    counted = job.model.num_layers * sum(w.num_elements for w in job.block()) + sum(w.num_elements for w in job.root())
    assert counted == job.model.num_params()


def test_files_have_the_bytes_of_their_tensors() -> None:
    shapes = model_shapes(FLEX_37B)
    assert model_bytes(FLEX_37B) == sum(2 * math.prod(shape) for shape in shapes.values())
    job = kinds(FLEX_37B)["expert"]
    with FakeTensorMode():
        tensors = expert_tensors(Transformer(job.model, job.group_sizes), torch.bfloat16)
        assert contribution_bytes(FLEX_37B) == local_bytes(tensors.values())
    for each in kinds(FLEX_37B).values():
        assert checkpoint_bytes(each) == distributed.checkpoint_bytes(build(each))


def simulated(saving: Saving, interval: int, num_failures: int) -> float:
    """The goodput of a run that goes through its steps, savings, failures and restarts one after the other."""
    generator = random.Random(0)
    now, saved = 0.0, 0
    for _ in range(num_failures):
        fails = now + generator.expovariate(1 / saving.between_failures)
        now += saving.restart
        step = writing = saved  # the step that is being written, or was
        written = 0.0  # when
        while now < fails:
            now, step = now + saving.step, step + 1
            if step % interval == 0:
                now = max(now, written)
                saved = writing if written <= fails else saved
                now += saving.stall
                writing, written = step, now + saving.write
        saved = writing if written <= fails else saved
        now = fails
    return saved * saving.step / now


@pytest.mark.parametrize(
    ("saving", "interval"),
    [
        (Saving(1.0, 0.5, 8.0, 15.0, 100.0), 20),
        (Saving(1.0, 3.0, 0.0, 15.0, 100.0), 20),  # waited for: nothing is written beside the steps
        (Saving(1.0, 2.0, 12.0, 0.0, 100.0), 5),  # the next save waits for the one before
        (Saving(1.0, 0.0, 5.0, 60.0, 50.0), 5),  # most restarts fail, too
        (Saving(79.0, 0.17, 8.8, 197.0), 50),
    ],
)
def test_goodput_is_that_of_a_simulated_run(saving: Saving, interval: int) -> None:
    assert saving.goodput(interval) == pytest.approx(simulated(saving, interval, 40_000), rel=0.015)


@pytest.mark.parametrize(
    "saving",
    [
        Saving(7.9, 0.17, 8.8, 197.0),
        Saving(0.5, 8.9, 0.0, 197.0),
        Saving(2.0, 0.1, 90.0, 20.0),
        Saving(1.0, 0.0, 0.0, 1.0, 100.0),
        Saving(50.0, 1.0, 1.0, 1.0, 10.0),
    ],
)
def test_no_interval_is_better_than_the_best(saving: Saving) -> None:
    assert saving.best_interval() == max(range(1, 3000), key=saving.goodput)


@pytest.mark.parametrize("stall", [0.1, 8.9])
def test_the_best_interval_follows_youngs_rule(stall: float) -> None:
    young = math.sqrt(2 * stall * 3 * 3600)
    assert Saving(0.01, stall, 5.0, 197.0).best_interval() * 0.01 == pytest.approx(young, rel=0.02)


def test_a_save_copies_what_a_rank_holds_and_a_restart_reads_what_was_saved() -> None:
    config, _ = compose("plan", ["stage=expert"])
    (job,) = jobs_of(config)
    choice = choices_of(job, config)[0]
    saving, model = saving_of(choice, config), build(job)
    saved, frozen = distributed.checkpoint_bytes(model), [p for p in model.parameters() if not p.requires_grad]
    assert saving.stall == pytest.approx(0.1 + saved / 64 / 20e9, rel=0.01)  # all of it is spread over 64 GPUs
    assert saving.write == saved / 10e9
    assert saving.restart == pytest.approx(180 + (2 * saved + local_bytes(frozen)) / 10e9)


@pytest.mark.parametrize(("cluster", "device"), [("a100", "NVIDIA A100-SXM4-80GB"), ("h100", "NVIDIA H100 80GB HBM3"),
                                                 ("h200", "NVIDIA H200")])  # fmt: skip
def test_clusters_have_the_peaks_that_training_divides_by(cluster: str, device: str) -> None:
    assert compose("plan", [f"cluster={cluster}"])[0].cluster.peak_flops == peak_of(device)


def test_layouts_are_told_best_first_and_fit() -> None:
    config, _ = compose("plan", ["nodes=2"])
    for job in jobs_of(config):
        choices = choices_of(job, config)
        seconds = [choice.cost.seconds for choice in choices]
        assert len(choices) > 1 and seconds == sorted(seconds)
        for choice in choices:
            assert problem(choice.layout, job.model, job.group_sizes, config.sequence_length) is None
            assert choice.memory.total <= (config.cluster.memory_gib - config.reserve_gib) * GIB


def test_time_of_the_public_model_is_six_operations_for_each_parameter_and_token() -> None:
    config, _ = compose("plan", ["stage=pretrain", "mfu=0.5", "public_tokens=1e12"])
    (job,) = jobs_of(config)
    cost = choices_of(job, config)[0].cost
    rule = 6 * 7.3e9 * 1e12 / (64 * 989.5e12 * 0.5)
    assert cost.compute_seconds * 1e12 / config.batch_tokens == pytest.approx(rule, rel=0.1)
    assert cost.waiting_seconds == 0  # 64 GPUs gather weights in less time than they compute


def test_a_slower_network_and_recomputation_cost_time() -> None:
    best = {}
    for words in ([], ["cluster.inter_node_gbs=1"], ["recompute=full"]):
        config, _ = compose("plan", ["stage=pretrain", "parallel.tensor=1", *words])
        best[" ".join(words)] = choices_of(jobs_of(config)[0], config)[0].cost
    plain, slow, again = best.values()
    assert slow.waiting_seconds > 0 == plain.waiting_seconds
    assert slow.data_bytes == plain.data_bytes and slow.compute_seconds == plain.compute_seconds
    assert again.compute_seconds == pytest.approx(plain.compute_seconds * 4 / 3) and again.flops == plain.flops


def test_the_command_prints_what_to_book(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "model=flex_37b"])
    out = capsys.readouterr().out
    assert "37.60B parameters, 20.29B active; 8 x 8 H100" in out
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    booked = {line[0]: line for line in lines[:3]}
    assert [line[1] for line in booked.values()] == ["1", "7", "1"]
    for line in booked.values():
        runs, steps, seconds, days, hours, all_hours = (float(line[i].replace(",", "")) for i in (1, 6, 7, 8, 9, 10))
        assert days == pytest.approx(steps * seconds / 86400, rel=0.03)
        assert hours == pytest.approx(days * 24 * 8, rel=0.03)
        assert all_hours == pytest.approx(runs * hours, rel=0.01)
    assert next(line for line in lines if line[0] == "assembly")[1:3] == ["75.20", "75.20"]
    (told,) = (line for line in out.splitlines() if line.startswith("checkpoint.interval"))
    for stage, line in booked.items():
        found = re.search(rf"(\d+) of {stage} \(([\d.]+) s, ([\d.]+)%\)", told)
        assert found is not None and int(found[1]) * float(line[7]) == pytest.approx(float(found[2]), rel=0.01)
        assert 95 < float(found[3]) < 100


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["nodes=1", "cluster.memory_gib=20"], ("pretrain: no layout fits 1 x 8 H100 of 20 GiB", "the least is")),
        (["parallel.tensor=3"], ("64 ranks do not divide by parallel.tensor=3", "what would do: parallel.tensor=")),
        (["parallel.expert=3", "stage=tune_router"], ("what would do: parallel.tensor=",)),
        (["model=tiny"], ("plan needs model.vocab_size=…",)),
        (["nodes=3"], ("microbatches of a step do not divide",)),
        (["model=olmo2_7b", "stage=expert"], ("stage=expert needs a mixture",)),
    ],
)
def test_what_cannot_be_planned_is_one_line(
    words: list[str], parts: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", *words])
    out, error = capsys.readouterr()
    assert ended.value.code == 2 and out == "" and error.count("\n") == 1
    assert not [part for part in parts if part not in error], error
