"""One training step on a CPU beside transformers: the same weights and batch, tokens per second and peak memory.

    python benchmarks/train_step.py             (about twenty minutes on two quiet cores)

Three jobs at two sizes: pretraining (dense), an expert job (2 of 2, one FFN and one router row trained), and 4 of 8
experts (everything trained). The peer is transformers with the fastest of its expert implementations, its attention,
norms and embeddings frozen by `requires_grad` in the expert job; its experts are one fused tensor and must be trained
whole. Both sides run forward, backward, clipping and a fused AdamW step; steps alternate in one process, medians are
taken, and the first losses must agree. Peak memory is that of a process that runs one side alone.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import FlexOlmoConfig, FlexOlmoForCausalLM, Olmo2Config, Olmo2ForCausalLM, PreTrainedModel

from flexpert.checkpoint.huggingface import load_model
from flexpert.model.loss import chunked_nll, router_z_sum
from flexpert.model.transformer import Transformer, build_on_meta
from flexpert.train.compilation import compile_blocks
from flexpert.train.freeze import train_only

RESULT = Path(__file__).parent / "results/train_step.md"
#: Of transformers. Its `batched_mm` copies the weights of a token's experts for each token: 24 GiB are too few for it.
IMPLEMENTATIONS = ("eager", "grouped_mm")
LR, REPEATS = 1e-4, 7


@dataclass(frozen=True)
class Size:
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    vocab_size: int
    batch: int
    sequence_length: int

    @property
    def tokens(self) -> int:
        return self.batch * self.sequence_length


SIZES = {
    "10M": Size(256, 4, 4, 1024, 4096, 8, 256),
    "60M": Size(512, 8, 8, 2048, 8192, 2, 512),
    "check": Size(64, 2, 2, 128, 320, 2, 32),
}
#: Job → experts and active experts; 8 experts are a quarter as wide.
JOBS = {"dense": (0, 0), "expert 2 of 2": (2, 2), "4 of 8": (8, 4)}


def write_model(size: Size, job: str, directory: Path) -> None:
    """Random weights as a transformers directory, which both sides load."""
    torch.manual_seed(0)
    shape = {
        "hidden_size": size.hidden_size,
        "num_hidden_layers": size.num_layers,
        "num_attention_heads": size.num_heads,
        "intermediate_size": size.intermediate_size // (4 if job == "4 of 8" else 1),
        "vocab_size": size.vocab_size,
        "max_position_embeddings": size.sequence_length,
        "pad_token_id": None,
        "eos_token_id": 0,
        "tie_word_embeddings": False,
    }
    experts, active = JOBS[job]
    if experts:
        config = FlexOlmoConfig(**shape, num_experts=experts, num_experts_per_tok=active)
        FlexOlmoForCausalLM(config).save_pretrained(directory)
    else:
        Olmo2ForCausalLM(Olmo2Config(**shape)).save_pretrained(directory)


def expert_job(whole: Transformer) -> Transformer:
    """The model of `flexpert expert`: the two experts of an assembled model in parameters of their own."""
    job = build_on_meta(replace(whole.config), (1, 1)).to_empty(device="cpu")
    source = dict(whole.named_parameters())
    with torch.no_grad():
        for name, parameter in job.named_parameters():
            if ".groups." in name:
                group = int(name.split(".groups.")[1][0])
                parameter.copy_(source[name.replace(f".groups.{group}.", ".groups.0.")][group : group + 1])
            elif ".router.weight." in name:
                row = int(name[-1])
                parameter.copy_(source[f"{name[:-1]}0"][row : row + 1])
            else:
                parameter.copy_(source[name])
    train_only(job, lambda name: any(part in name for part in (".groups.1.", ".router.weight.1")))
    return job


class Side:
    """One side's model and optimiser; `step` runs one training step and returns the mean cross-entropy before it."""

    def __init__(self, model: nn.Module, loss: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        self.loss = loss
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LR, fused=True)

    def step(self, batch: Tensor) -> float:
        total, nll = self.loss(batch)
        torch.autograd.backward(total)
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(nll)


def ours(directory: Path, job: str, compiled: bool) -> Side:
    model = load_model(directory)[0].requires_grad_(True).train()
    if job == "expert 2 of 2":
        model = expert_job(model)
    if compiled:
        compile_blocks(model)  # as `train.compile` does

    def loss(batch: Tensor) -> tuple[Tensor, Tensor]:
        hidden = model(batch[:, :-1])
        nll_T, lse_T = chunked_nll(hidden.stream_BSD.flatten(0, 1), model.head.weight, batch[:, 1:].flatten())
        nll = nll_T.mean()
        total = nll + 1e-5 * lse_T.square().mean()
        if hidden.routings:
            total = total + 1e-3 * router_z_sum(hidden.routings) / len(nll_T)
        return total, nll.detach()

    return Side(model, loss)


def theirs(directory: Path, job: str, implementation: str) -> Side:
    options = {} if job == "dense" else {"experts_implementation": implementation}
    auto = transformers.AutoModelForCausalLM
    model: PreTrainedModel = auto.from_pretrained(directory, dtype=torch.float32, **options).train()
    if job == "expert 2 of 2":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".experts." in name or "mlp.gate." in name)

    def loss(batch: Tensor) -> tuple[Tensor, Tensor]:
        logits = model(batch[:, :-1], use_cache=False).logits.flatten(0, 1)
        nll = nn.functional.cross_entropy(logits, batch[:, 1:].flatten())
        return nll, nll.detach()

    return Side(model, loss)


def batch_of(size: Size) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, size.vocab_size, (size.batch, size.sequence_length + 1), generator=generator)


def make(kind: str, directory: Path, job: str) -> Side:
    return (
        ours(directory, job, kind == "compiled") if kind in ("eager", "compiled") else theirs(directory, job, kind[3:])
    )


def fastest_peer(directory: Path, job: str, batch: Tensor) -> str:
    """The expert implementation of transformers whose steps take least time."""
    if job == "dense":
        return "hf:eager"
    seconds = {}
    for name in IMPLEMENTATIONS:
        side = theirs(directory, job, name)
        seconds[f"hf:{name}"] = min(timed(side, batch) for _ in range(3))
    return min(seconds, key=lambda name: seconds[name])


def timed(side: Side, batch: Tensor) -> float:
    started = time.perf_counter()
    side.step(batch)
    return time.perf_counter() - started


def peak_memory(kind: str, size: str, job: str, directory: Path) -> int:
    """Largest resident memory, bytes, of a process that runs three steps of one side."""
    command = [sys.executable, __file__, "--memory-of", kind, "--sizes", size, "--job", job]
    command += ["--directory", str(directory)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def compare(size_name: str, job: str) -> list[str]:
    """Rows of the table for one job at one size."""
    size = SIZES[size_name]
    batch = batch_of(size)
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        write_model(size, job, directory)
        peer = fastest_peer(directory, job, batch)
        kinds = [peer, "eager", "compiled"]
        sides = {kind: make(kind, directory, job) for kind in kinds}
        losses = {kind: side.step(batch) for kind, side in sides.items()}  # compiles, and warms up
        assert max(losses.values()) - min(losses.values()) < 1e-4, losses
        seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
        for _ in range(REPEATS):
            for kind, side in sides.items():
                seconds[kind].append(timed(side, batch))
        del sides
        rows = []
        base = statistics.median(seconds[peer])
        for kind in kinds:
            median = statistics.median(seconds[kind])
            title = f"transformers ({kind[3:]})" if kind == peer else f"Flexpert, {kind}"
            limit = f"{ceiling(size):.2f}" if job.startswith("expert") and kind != peer else ""
            speeds = [size.tokens / value for value in seconds[kind]]
            memory = peak_memory(kind, size_name, job, directory) / 2**20
            rows.append(
                f"| {job}, {size_name} | {title} | {size.tokens / median:,.0f} "
                f"({min(speeds):,.0f} to {max(speeds):,.0f}) | {base / median:.2f} | {limit} | {memory:,.0f} |"
            )
            print(rows[-1], flush=True)
        return rows


def ceiling(size: Size) -> float:
    """FLOPs of transformers' expert step over ours: what freezing alone can give.

    Per token and layer in matrix products of D²: forward attention 4, FFNs 2·3F/D; gradients of activations as much
    again; of weights, both FFNs there and one here. The output head has a forward, a repeated forward (ours, in place
    of storing logits) and the activations' gradient.
    """
    ratio = size.intermediate_size / size.hidden_size
    head = size.vocab_size / size.hidden_size / size.num_layers
    both = 2 * (4 + 6 * ratio)
    return (both + 6 * ratio + 2 * head) / (both + 3 * ratio + 3 * head)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", nargs="+", default=["10M", "60M"], choices=SIZES)
    parser.add_argument("--memory-of")
    parser.add_argument("--job", choices=JOBS)
    parser.add_argument("--directory", type=Path)
    arguments = parser.parse_args()
    if arguments.memory_of:
        side = make(arguments.memory_of, arguments.directory, arguments.job)
        batch = batch_of(SIZES[arguments.sizes[0]])
        for _ in range(3):
            side.step(batch)
        # Not `ru_maxrss`, which counts the process that started this one as well.
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
        print(int(line.split()[1]) * 1024)
        return
    machine = f"{len(os.sched_getaffinity(0))} cores ({platform.machine()}), {torch.get_num_threads()} threads"
    versions = f"PyTorch {torch.__version__}, transformers {transformers.__version__}"
    lines = [
        f"Training step on a CPU, fp32; {date.today()}, {machine}, {versions}.",
        f"Medians of {REPEATS} (slowest to fastest). Ceiling: the ratio of the FLOPs, what freezing alone can give.",
        "",
        "| job, size | | tokens/s | ratio | ceiling | peak memory, MiB |",
        "|---|---|---|---|---|---|",
    ]
    for size in arguments.sizes:
        for job in [arguments.job] if arguments.job else JOBS:
            lines += compare(size, job)
    text = "\n".join(lines) + "\n"
    print(text)
    if "check" not in arguments.sizes and not arguments.job:
        RESULT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
