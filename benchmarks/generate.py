"""Greedy generation: tokens per second beside `transformers.generate` on the same model directories.

    python benchmarks/generate.py        (some minutes on two cores)

Random models, written by us and loaded by both in fp32: a dense one of 20M parameters, and a mixture of four such
experts of which four or two are active. Both programs run in this process, in turns, with the same threads, until each
row has its repeats; every run must end with the same tokens. A rate counts new tokens only, and its time includes
reading the prompts. Prints a table in Markdown and writes it to `benchmarks/results/generate.md`.
"""

import argparse
import os
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from flexpert.checkpoint.huggingface import load_model, save_model
from flexpert.config.groups import ModelConfig
from flexpert.data.tokenizer import Tokenizer, train_tokenizer
from flexpert.model.generate import generate, store_for_batches
from flexpert.model.transformer import build_on_meta, initialise

RESULT = Path(__file__).parent / "results/generate.md"
GOAL = 1.5
DENSE = ModelConfig(
    hidden_size=384,
    num_layers=8,
    num_heads=6,
    intermediate_size=1024,
    vocab_size=8192,
    max_sequence_length=1024,
    initializer_range=0.05,  # so that greedy text is not one token for ever
)
MODELS = {
    "dense": DENSE,
    "4 experts, all active": replace(DENSE, num_experts=4, active_experts=4),
    "4 experts, 2 active": replace(DENSE, num_experts=4, active_experts=2),
}
BATCHES = (1, 8)


def write_model(config: ModelConfig, tokenizer: Tokenizer, directory: Path) -> None:
    directory.mkdir()
    model = build_on_meta(config).to_empty(device="cpu")
    initialise(model, seed=0)
    save_model(model, directory, tokenizer, torch.float32)


def load_theirs(directory: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model.generation_config.eos_token_id = None  # every row gets its full length
    return model.eval()


def seconds(runs: dict[str, Callable[[], torch.Tensor]], repeats: int) -> dict[str, list[float]]:
    """Wall-clock times of each, in turns; the first turn is not counted."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        results = []
        for name, run in runs.items():
            start = time.perf_counter()
            results.append(run())
            if turn:
                times[name].append(time.perf_counter() - start)
        assert all(torch.equal(result, results[0]) for result in results), "both must say the same"
    return times


def rate(times: list[float], tokens: int) -> str:
    """Median tokens per second, and the slowest and fastest repeat."""
    return f"{tokens / statistics.median(times):.0f} ({tokens / max(times):.0f} to {tokens / min(times):.0f})"


def measure(
    title: str, config: ModelConfig, directory: Path, theirs: PreTrainedModel, batch: int, arguments: argparse.Namespace
) -> str:
    """A line of the table."""
    ours = load_model(directory)[0]
    if batch > 1:
        store_for_batches(ours)  # as `flexpert generate` does
    generator = torch.Generator().manual_seed(batch)
    prompt_BS = torch.randint(1, config.vocab, (batch, arguments.prompt), generator=generator)
    theirs_settings = {"attention_mask": torch.ones_like(prompt_BS), "do_sample": False}
    times = seconds(
        {
            "ours": lambda: generate(ours, prompt_BS, arguments.new, eos_id=-1),
            "theirs": lambda: theirs.generate(prompt_BS, max_new_tokens=arguments.new, **theirs_settings)[
                :, arguments.prompt :
            ],
        },
        arguments.repeats,
    )
    ratios = [their / our for our, their in zip(times["ours"], times["theirs"], strict=True)]
    ratio = statistics.median(times["theirs"]) / statistics.median(times["ours"])
    rates = [rate(times[name], batch * arguments.new) for name in ("ours", "theirs")]
    columns = [f"{title} ({config.num_params() / 1e6:.0f}M)", str(batch), *rates]
    return f"| {' | '.join(columns)} | **{ratio:.2f}** ({min(ratios):.2f} to {max(ratios):.2f}) |"


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description="Greedy generation beside transformers.")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=128, help="new tokens of a prompt")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    load = os.getloadavg()[0]
    lines = []
    with tempfile.TemporaryDirectory() as root:
        tokenizer = train_tokenizer(["the models never see it"], 300, Path(root) / "tokenizer")
        for number, (title, config) in enumerate(MODELS.items()):
            directory = Path(root) / str(number)
            write_model(config, tokenizer, directory)
            theirs = load_theirs(directory)
            for batch in BATCHES:
                lines.append(measure(title, config, directory, theirs, batch, arguments))
                print(lines[-1], flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux
    versions = (
        f"Python {platform.python_version()}, PyTorch {torch.__version__}, transformers {transformers.__version__}"
    )
    header = [
        f"Greedy generation, {arguments.prompt} tokens of prompt and {arguments.new} new ones, fp32; {date.today()}.",
        f"{processor()}, {os.cpu_count()} CPUs, {arguments.threads} threads, load {load:.1f} at the start; {versions}.",
        f"Medians of {arguments.repeats} repeats (smallest to largest), in turns; equal tokens. Goal: {GOAL}×.",
        f"Peak memory of the process, with both programs in it: {peak:.1f} GiB.",
        "",
        "| model | prompts at a time | Flexpert, new tokens/s | transformers, new tokens/s | ratio |",
        "|---|---|---|---|---|",
    ]
    text = "\n".join([*header, *lines]) + "\n"
    print(f"\n{text}")
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
