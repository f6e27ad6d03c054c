"""One GPU: an expert's training on it beside the CPU's numbers, and a step at 7B width beside `flexpert plan`'s.

    python benchmarks/gpu.py            (about ten minutes on one H100)
    python benchmarks/gpu.py --small    (any machine, with or without a GPU: shows that it runs)

Everything goes through the product: a public model of random weights is written as a directory, text is prepared, and
`flexpert expert` trains on both, as many layers as the plan says fit. Rates are medians over the steps after the first
four, which compile and warm up.
"""

import argparse
import gc
import platform
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path

import torch

from flexpert.checkpoint.directory import ModelDirectory
from flexpert.checkpoint.huggingface import fill, job_tensor_map, save_model
from flexpert.cli import run_stage
from flexpert.config.compose import compose
from flexpert.config.groups import ModelConfig
from flexpert.data.tokenizer import load_tokenizer
from flexpert.model.loss import chunked_nll
from flexpert.model.transformer import Transformer, build_on_meta, initialise
from flexpert.monitor.jsonl import read_metrics
from flexpert.parallel.layout import Layout
from flexpert.planning.cost import cost_of
from flexpert.planning.job import Job, expert_job
from flexpert.planning.memory import memory_of
from flexpert.train.expert import OWN, job_config
from flexpert.train.freeze import cast_frozen, train_only

RESULT = Path(__file__).parent / "results/gpu.md"
WARM_UP, STEPS, LENGTH = 4, 12, 4096
#: Share of the GPU's memory that the plan may fill; the rest is CUDA's own and fragmentation.
USED = 0.85
SETTINGS = [("none", "false"), ("none", "true"), ("selective", "true"), ("full", "true")]


def build_base(folder: Path, config: ModelConfig, device: torch.device) -> None:
    """A public model of random weights, in bf16."""
    model = build_on_meta(config).to_empty(device=device)
    initialise(model, 0)
    folder.mkdir()
    save_model(model, folder, load_tokenizer(folder.parent / "data/tokenizer"), torch.bfloat16)


def step(base: ModelDirectory, device: torch.device) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one batch of an expert job, as `Trainer` computes them on this device."""
    model = build_on_meta(job_config(base.config, False), (1, 1))
    train_only(model, lambda name: any(part in name for part in OWN))
    if device.type == "cuda":
        cast_frozen(model, torch.bfloat16)
    model.to_empty(device=device)
    for expert in (False, True):
        fill(model, job_tensor_map(model.config, expert), base.files)
    for index, layer in enumerate(model.blocks):
        generator = torch.Generator().manual_seed(index)
        for parameter in layer.get_submodule("feed_forward.router").parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    tokens = torch.randint(0, base.config.vocab, (2, 129), generator=torch.Generator().manual_seed(1)).to(device)
    with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
        hidden = model(tokens[:, :-1])
        nll_T, _ = chunked_nll(hidden.stream_BSD.flatten(0, 1), model.head.weight, tokens[:, 1:].flatten())
    nll_T.mean().backward()  # type: ignore[no-untyped-call]
    return nll_T.mean().item(), gradients(model)


def gradients(model: Transformer) -> dict[str, torch.Tensor]:
    return {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}


def agreement(base: ModelDirectory, device: torch.device) -> str:
    """The device's bf16 beside the CPU's fp32."""
    (loss, found), (wanted_loss, wanted) = step(base, device), step(base, torch.device("cpu"))
    assert found.keys() == wanted.keys()
    worst = max(((found[name] - value).norm() / value.norm()).item() for name, value in wanted.items())
    assert abs(loss / wanted_loss - 1) < 1e-2 and worst < 5e-2, (loss, wanted_loss, worst)
    return (
        f"Against fp32 on the CPU, with the same weights and tokens: loss {abs(loss / wanted_loss - 1):.1e}, largest "
        f"difference of a gradient {worst:.1e}, relative."
    )


def job_of(config: ModelConfig) -> Job:
    return expert_job(config, 1, 1)


def layers_that_fit(config: ModelConfig, tokens: int, memory: int) -> int:
    def needed(layers: int) -> int:
        return memory_of(job_of(replace(config, num_layers=layers)), Layout(1), tokens, 1024, "none").total

    return max((n for n in range(1, config.num_layers + 1) if needed(n) <= USED * memory), default=1)


def measure(
    folder: Path, config: ModelConfig, sequences: int, length: int, settings: Sequence[tuple[str, str]]
) -> list[str]:
    """A row for each setting: what training says, and what the plan says."""
    rows = []
    plan, _ = compose("plan", ["cluster=h100", f"sequence_length={length}", f"microbatch_sequences={sequences}",
                               f"batch_tokens={sequences * length}"])  # fmt: skip
    for recompute, compiled in settings:
        output = folder / f"{recompute}-{compiled}"
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        run_stage("expert", [
            f"base={folder}/base", f"data.dir={folder}/data", "name=math", "router.init=random", f"output_dir={output}",
            f"train.steps={STEPS}", f"train.batch_tokens={sequences * length}", f"train.sequence_length={length}",
            f"train.microbatch_sequences={sequences}", f"train.recompute={recompute}", f"train.compile={compiled}",
            "optim.warmup_steps=2", "checkpoint.interval=null", "monitor.wandb=off",
        ])  # fmt: skip
        steps = read_metrics(output / "metrics.jsonl")
        rates = [row["tokens_per_second"] for row in steps[WARM_UP:]]
        mfu = [row["mfu"] for row in steps[WARM_UP:] if row["mfu"] is not None]
        peak = max(row["peak_memory_bytes"] for row in steps)
        job, planned_for = job_of(config), "full" if recompute == "full" else "none"
        memory = memory_of(job, Layout(1), sequences * length, 1024, planned_for).total
        seconds = cost_of(job, Layout(1), replace(plan, recompute=planned_for)).seconds
        share = f"{statistics.median(mfu):.1%}" if mfu else "n/a"
        spread = f"{statistics.median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f})"
        planned = f"{sequences * length / seconds:,.0f} | {memory / 2**30:.1f}"
        rows.append(f"| {recompute} | {compiled} | {spread} | {share} | {peak / 2**30:.1f} | {planned} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    small = parser.parse_args().small
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type != "cuda" and not small:
        parser.exit(2, "gpu.py: there is no CUDA device here; --small shows that the script runs\n")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()}, no GPU"
    config = compose("pretrain", ["data.dir=/d", "model=olmo2_7b", "train.steps=1"])[0].model
    sequences, length = 2, LENGTH
    if small:
        config, length = replace(config, hidden_size=64, num_heads=4, intermediate_size=96, vocab_size=4096), 64
        layers = 2
    else:
        layers = layers_that_fit(config, sequences * length, torch.cuda.get_device_properties(device).total_memory)
    config = replace(config, num_layers=layers, max_sequence_length=length)
    tiny = replace(config, hidden_size=256, num_heads=4, intermediate_size=640, num_layers=2, vocab_size=4096)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run_stage("prepare", ["data=demo_math", "train_tokenizer.vocab_size=4096", f"output_dir={folder}/data"])
        build_base(folder / "tiny", replace(tiny, initializer_range=0.1), device)
        agreed = agreement(ModelDirectory.open(folder / "tiny"), device)
        build_base(folder / "base", config, device)
        rows = measure(folder, config, sequences, length, SETTINGS[::2] if small else SETTINGS)
    text = "\n".join([
        f"`flexpert expert` at 7B width, {layers} layers; {date.today()}, {name}, PyTorch {torch.__version__}, CUDA "
        f"{torch.version.cuda}, Python {platform.python_version()}.",
        f"{sequences} sequences of {length} tokens a step; medians (smallest to largest) of {STEPS - WARM_UP} steps.",
        agreed,
        "",
        "| recompute | compiled | tokens/s | MFU | memory, GiB | planned tokens/s (mfu 0.4) | planned GiB |",
        "|---|---|---|---|---|---|---|",
        *rows,
        "",
    ])  # fmt: skip
    print(text)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
