"""One table of layouts against one process: the same loss and the same gradient of every parameter."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flexpert.checkpoint.huggingface import load_model, save_model
from flexpert.checkpoint.sharding import local_part
from flexpert.config.groups import ModelConfig, OptimConfig
from flexpert.data.tokenizer import Tokenizer, train_tokenizer
from flexpert.errors import UserError
from flexpert.model.loss import IGNORE, chunked_nll, router_z_sum
from flexpert.model.moe import ExpertGroup
from flexpert.model.transformer import Transformer, build_on_meta, initialise
from flexpert.parallel import collectives
from flexpert.parallel.apply import apply_parallel, put_for_inference
from flexpert.parallel.layout import Layout, check_layout, problem
from flexpert.parallel.mesh import Meshes, build_meshes
from flexpert.parallel.ranks import Ranks, clip_gradients
from flexpert.parallel.tensor import local
from flexpert.train.optimizer import build_optimizer

SHAPE = {
    "hidden_size": 16, "num_layers": 2, "num_heads": 4, "intermediate_size": 24, "vocab_size": 32,
    "max_sequence_length": 16,
}  # fmt: skip
MAX_NORM = 0.25
OWN = (".groups.1.", ".router.weight.1", ".router.bias.1")


@dataclass(frozen=True)
class Kind:
    """A model, how its experts are held, and which parameters are trained."""

    config: ModelConfig
    group_sizes: tuple[int, ...] | None = None
    own: tuple[str, ...] = ("",)


KINDS = {
    "dense": Kind(ModelConfig(**SHAPE)),
    "all of 4": Kind(ModelConfig(**SHAPE, num_experts=4, active_experts=4)),
    "2 of 4": Kind(ModelConfig(**SHAPE, num_experts=4, active_experts=2, router_bias=True)),
    "expert job": Kind(ModelConfig(**SHAPE, num_experts=2, active_experts=2, router_bias=True), (1, 1), OWN),
}
DENSE = [
    Layout(2), Layout(2, 2), Layout(2, 2, sequence=True), Layout(4, 2, sequence=True), Layout(4, 4),
    Layout(4, replicas=2), Layout(4, 2, replicas=2),
]  # fmt: skip
MIXED = [
    Layout(2), Layout(2, expert=2), Layout(2, expert_tensor=2), Layout(2, 2, expert_tensor=2),
    Layout(2, 2, expert_tensor=2, sequence=True), Layout(2, 2, expert=2, sequence=True), Layout(2, 2, sequence=True),
    Layout(4, expert=2), Layout(4, 2, expert=2, sequence=True), Layout(4, expert=2, expert_tensor=2),
    Layout(4, 2, expert=2, expert_tensor=2, sequence=True), Layout(4, 2, expert_tensor=2), Layout(4, expert=4),
    Layout(4, 2, expert=2, expert_tensor=2), Layout(4, expert=2, replicas=2),
]  # fmt: skip
CASES = [("dense", layout) for layout in DENSE] + [(kind, layout) for kind in [*KINDS][1:] for layout in MIXED]


def fill(model: Transformer) -> None:
    """Values that depend on the parameter's name alone, this rank's part of them."""
    for index, (name, parameter) in enumerate(model.named_parameters()):
        value = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)) * 0.3
        value = value + 1 if "norm" in name else -value.abs() if ".router.bias" in name else value
        part, place = local_part(parameter)
        with torch.no_grad():
            part.copy_(value[place])


def build(kind: Kind, meshes: Meshes | None = None, compute: torch.dtype = torch.float32) -> Transformer:
    model = build_on_meta(kind.config, kind.group_sizes)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in kind.own))
    if meshes is not None:
        apply_parallel(model, meshes, compute)
    model.to_empty(device="cpu")
    fill(model)
    return model


def losses(model: Transformer, sequences: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """The sum over this rank's sequences to differentiate, and all ranks' two parts of it, [2]."""
    tokens_BS = torch.where(sequences < 0, ~sequences, sequences)[:, :-1]
    hidden, weight_VD = model(tokens_BS), local(model.head.weight)
    targets_T = torch.where(sequences[:, 1:] < 0, IGNORE, sequences[:, 1:]).flatten()
    vocabulary = ranks.vocabulary(len(weight_VD))
    nll_T, lse_T = chunked_nll(hidden.stream_BSD.flatten(0, 1), weight_VD, targets_T, 7, vocabulary)
    text = nll_T.sum() + 1e-2 * lse_T.square().sum()
    counted_T = ranks.own_positions(sequences[:, 1:] >= 0).flatten()
    router = 1e-2 * router_z_sum(hidden.routings, counted_T) if hidden.routings else text.new_zeros(())
    parts = ranks.sum(text.detach()), ranks.sum(router.detach(), of_positions=True)
    return text + router, torch.stack(parts)


def put_together(parameters: dict[str, Tensor], num_ranks: int) -> dict[str, Tensor]:
    """Every parameter whole, by hand, from what `local_part` says of each rank."""
    found = {}
    for name, parameter in parameters.items():
        held: list[tuple[Tensor, tuple[slice, ...]]] = [None] * num_ranks  # type: ignore[list-item]
        part, place = local_part(parameter)
        dist.all_gather_object(held, (part.detach(), place))
        found[name] = torch.full(parameter.shape, torch.nan)
        for value, where in held:
            found[name][where] = value
    return found


class Course(NamedTuple):
    """What training does: at every step the parts of the loss and the norm of the gradient; the first step's gradients,
    clipped; the parameters at the end."""

    parts: list[Tensor]
    norms: list[Tensor]
    gradients: dict[str, Tensor]
    parameters: dict[str, Tensor]


def train(model: Transformer, ranks: Ranks, num_ranks: int = 1) -> Course:
    """Five steps of AdamW; each accumulates over two microbatches, whose ranks have unequal numbers of targets."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = build_optimizer(model, OptimConfig())
    index, number = ranks.share
    generator = torch.Generator().manual_seed(0)
    course = Course([], [], {}, {})
    for _ in range(5):
        sequences = torch.randint(0, 32, (8, 9), generator=generator)
        lengths = torch.randint(2, 10, (8, 1), generator=generator)
        sequences = torch.where(torch.arange(9) < lengths, sequences, ~sequences)  # negative: not predicted
        num_targets = int((sequences[:, 1:] >= 0).sum())
        own, step_parts = sequences[index::number], torch.zeros(2)
        for microbatch in own.chunk(2):
            total, parts = losses(model, microbatch, ranks)
            (total / num_targets).backward()  # type: ignore[no-untyped-call]
            step_parts += parts
        course.parts.append(step_parts)
        course.norms.append(clip_gradients(list(trained.values()), MAX_NORM))
        if not course.gradients:
            gradients = {name: p.grad for name, p in trained.items() if p.grad is not None}
            assert gradients.keys() == trained.keys()
            course.gradients.update(put_together(gradients, num_ranks) if num_ranks > 1 else gradients)
            course.gradients.update({name: value.clone() for name, value in course.gradients.items()})
        for group in optimizer.param_groups:
            group["lr"] = 1e-2
        optimizer.step()
        optimizer.zero_grad()
    course.parameters.update(put_together(trained, num_ranks) if num_ranks > 1 else trained)
    return course


def on_ranks(kind: Kind, layout: Layout, folder: Path | None, tokenizer: Tokenizer) -> Course:
    """The model is written before it is trained."""
    meshes = build_meshes(layout, torch.device("cpu"))
    model = build(kind, meshes)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    if folder is not None:
        write(model, folder, tokenizer)
    return train(model, Ranks(meshes), layout.num_ranks)


def write(model: Transformer, folder: Path, tokenizer: Tokenizer) -> None:
    folder.mkdir(exist_ok=True)
    save_model(model, folder, tokenizer, torch.float32, max_file_bytes=8000)


BAD = [
    (KINDS["dense"], Layout(6, 4), "6 ranks do not divide by parallel.tensor=4"),
    (KINDS["dense"], Layout(8, 8), "4 attention heads do not divide by parallel.tensor=8"),
    (KINDS["dense"], Layout(2, expert=2), "a dense model has no experts to share"),
    (KINDS["2 of 4"], Layout(4, 2, expert=2), "parallel.sequence=true"),
    (KINDS["dense"], Layout(6, replicas=4), "6 data ranks do not divide by parallel.replicas=4"),
    (KINDS["2 of 4"], Layout(8, expert=8), "4 experts do not divide by parallel.expert=8"),
    (KINDS["2 of 4"], Layout(16, expert_tensor=16), "width of 24 does not divide by 16 ranks"),
    (KINDS["2 of 4"], Layout(4, 4, expert_tensor=4, sequence=True), "9 positions do not divide by parallel.tensor=4"),
]


@pytest.mark.parametrize(("kind", "layout", "message"), BAD, ids=[message for _, _, message in BAD])
def test_a_layout_that_does_not_fit_is_answered_with_some_that_do(kind: Kind, layout: Layout, message: str) -> None:
    groups = kind.group_sizes or (kind.config.num_experts,)
    with pytest.raises(UserError) as raised:
        check_layout(layout, kind.config, groups, 9)
    fault, _, advice = str(raised.value).partition("; what would do: ")
    assert message in fault
    proposed = [Layout(*numbers) for numbers in map(layout_numbers, advice.split("; or "))]
    assert proposed and all(problem(option, kind.config, groups, 9) is None for option in proposed)
    assert all(option.num_ranks == layout.num_ranks for option in proposed)


def layout_numbers(text: str) -> tuple[int, int, int, int, bool]:
    """The arguments of `Layout` from how one is written."""
    words = dict(word.removeprefix("parallel.").split("=") for word in text.split())
    tensor, data = int(words["tensor"]), int(words["data"])
    return tensor * data, tensor, int(words["expert"]), int(words["expert_tensor"]), words["sequence"] == "true"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer(["a few words"] * 3, 270, tmp_path_factory.mktemp("tokenizer") / "bpe")


@pytest.fixture(scope="module")
def alone(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Course, Path | None]]:
    """Every kind in one process, and the file that it was written to."""
    courses: dict[str, tuple[Course, Path | None]] = {}
    for name, kind in KINDS.items():
        model, folder = build(kind), tmp_path_factory.mktemp("model") if kind.group_sizes is None else None
        if folder is not None:
            write(model, folder, tokenizer)
        courses[name] = train(model, Ranks()), folder
    return courses


def check_close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (found[name] - value).norm() <= 1e-5 * value.norm(), name


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "layout"), CASES, ids=[f"{kind}: {layout}" for kind, layout in CASES])
def test_every_layout_trains_as_one_process(
    kind: str, layout: Layout, alone: dict[str, tuple[Course, Path | None]], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    wanted, folder = alone[kind]
    assert min(wanted.norms) > 2 * MAX_NORM, "they are clipped"
    written = None if folder is None else tmp_path / "model"
    for course in run_ranks(on_ranks, layout.num_ranks, KINDS[kind], layout, written, tokenizer):
        torch.testing.assert_close(course.parts, wanted.parts, rtol=1e-5, atol=0)
        torch.testing.assert_close(course.norms, wanted.norms, rtol=1e-5, atol=0)
        check_close(course.gradients, wanted.gradients)
        check_close(course.parameters, wanted.parameters)
    if folder is not None and written is not None:
        for path in folder.iterdir():
            assert (written / path.name).read_bytes() == path.read_bytes(), path.name


def in_bf16(kind: Kind, layout: Layout, sequences: Tensor) -> tuple[Tensor, dict[str, Tensor], set[tuple[str, str]]]:
    """Parts of the loss, gradients, and what the first router and its experts were computed in."""
    meshes = build_meshes(layout, torch.device("cpu"))
    model, ranks, seen = build(kind, meshes, torch.bfloat16), Ranks(meshes), set()
    layer = model.blocks[0].feed_forward
    rows = put_together(dict(layer.router.named_parameters()), layout.num_ranks)

    def see_router(router: nn.Module, _: object) -> None:
        same = all(torch.equal(local(value), rows[name]) for name, value in router.named_parameters())
        seen.add(("router", "exact" if same else "rounded"))

    layer.router.register_forward_pre_hook(see_router)
    layer.groups[0].register_forward_pre_hook(lambda group, _: seen.add(("experts", str(group.down.dtype))))
    index, number = ranks.share
    total, parts = losses(model, sequences[index::number], ranks)
    total.backward()  # type: ignore[no-untyped-call]
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return parts, put_together(gradients, layout.num_ranks), seen


@pytest.mark.parametrize("layout", [Layout(2), Layout(2, 2, expert=2, sequence=True)], ids=str)
def test_products_are_in_bf16_and_the_router_in_fp32(layout: Layout) -> None:
    """Beside one process in fp32: bf16 has 8 bits, and what they round away adds up to a twentieth of a gradient."""
    sequences = torch.randint(0, 32, (4, 9), generator=torch.Generator().manual_seed(0))
    model = build(KINDS["all of 4"])
    total, wanted = losses(model, sequences, Ranks())
    total.backward()  # type: ignore[no-untyped-call]
    for parts, gradients, seen in run_ranks(in_bf16, layout.num_ranks, KINDS["all of 4"], layout, sequences):
        assert seen == {("router", "exact"), ("experts", "torch.bfloat16")}
        torch.testing.assert_close(parts, wanted, rtol=2e-2, atol=0)
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and gradients[name].dtype == torch.float32
            assert (gradients[name] - parameter.grad).norm() <= 0.1 * parameter.grad.norm(), name


def growth(function: Callable[[], Any]) -> tuple[int, Any]:
    """Bytes by which this process's own memory is larger, at its largest, while the function runs; its result."""

    def now() -> int:
        return int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0]) * 1024

    sizes, over = [now()], threading.Event()

    def watch() -> None:
        while not over.wait(0.002):
            sizes.append(now())

    watcher = threading.Thread(target=watch)
    watcher.start()
    result = function()
    over.set()
    watcher.join()
    return max(sizes) - sizes[0], result


def pass_through(layout: Layout, source: Path, target: Path, tokenizer: Tokenizer) -> tuple[int, int]:
    """Read a directory into the layout and write it from there; how much memory each took."""
    ranks, cpu = Ranks(build_meshes(layout, torch.device("cpu"))), torch.device("cpu")
    reading, (model, _) = growth(
        lambda: load_model(source, give_memory=lambda model: put_for_inference(model, ranks, cpu))
    )
    target.mkdir(exist_ok=True)
    writing, _ = growth(lambda: save_model(model, target, tokenizer, torch.float32))
    return reading, writing


def events_of_two_layers() -> list[str]:
    """What a rank does of exchanges and experts in a forward and a backward pass, in its order."""
    events: list[str] = []

    def told(event: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            events.append(event)
            return function(*args)

        return run

    collectives.waited = told("wait", collectives.waited)  # in a process of its own
    collectives.Way.send = told("send", collectives.Way.send)  # type: ignore[method-assign]
    ExpertGroup.forward = told("experts", ExpertGroup.forward)  # type: ignore[method-assign]
    ranks = Ranks(build_meshes(Layout(2, expert=2), torch.device("cpu")))
    total, _ = losses(build(KINDS["2 of 4"], ranks.meshes), torch.arange(18).view(2, 9), ranks)
    events.append("backward")
    total.backward()  # type: ignore[no-untyped-call]
    return events


def test_while_one_half_is_under_way_the_other_is_computed() -> None:
    forward = ["send", "send", "wait", "experts", "send", "wait", "experts", "send", "wait", "wait"]
    backward = [event for event in forward if event != "experts"]
    for events in run_ranks(events_of_two_layers, 2):
        middle = events.index("backward")  # before it, the parts of the loss are summed over the ranks
        assert events[:middle] == [*forward, *forward, "wait", "wait"]
        assert events[middle + 1 :] == [*backward, *backward]


@pytest.mark.slow
@pytest.mark.parametrize("layout", [Layout(4), Layout(4, 4), Layout(4, 2)], ids=str)
def test_no_rank_holds_the_whole_model(layout: Layout, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """A quarter each, and on the way one tensor of, here, a tenth."""
    model = build_on_meta(
        ModelConfig(hidden_size=256, num_layers=16, num_heads=4, intermediate_size=1024, vocab_size=8192)
    )
    initialise(model.to_empty(device="cpu"), 0)
    (tmp_path / "source").mkdir()
    save_model(model, tmp_path / "source", tokenizer, torch.float32)
    whole = sum(4 * parameter.numel() for parameter in model.parameters())
    del model
    for reading, writing in run_ranks(pass_through, 4, layout, tmp_path / "source", tmp_path / "target", tokenizer):
        assert reading < 0.5 * whole and writing < 0.5 * whole, (reading / whole, writing / whole)
    for path in (tmp_path / "source").iterdir():
        assert (tmp_path / "target" / path.name).read_bytes() == path.read_bytes(), path.name
