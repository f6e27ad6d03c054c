"""Tokenising: `flexpert prepare` beside Megatron's preprocessing, on the same text with the same tokenizer.

    python benchmarks/prepare.py [megabytes=50] [repeats=5]        (about five minutes on two free cores)

Megatron-LM's `tools/preprocess_data.py` is not in the megatron-core wheel, so its core is written out here as it is
there: a pool that is handed lines by `imap` in chunks of 32, an encoder in each worker that parses a line and encodes
its text, and the wheel's own `IndexedDatasetBuilder` in the parent. Its tokenizer is the `tokenizers` library directly,
which is faster than the wrapper that Megatron calls.

The text is the demo's corpora, repeated in another order each time, up to the size. Each run is a process of its own,
runs of both programs alternate, and times are from the first line read to the last file closed, without imports. Both
must write the same token file, byte for byte. Flexpert also hashes every document and every file, and flushes to the
disk. Prints a table in Markdown and writes it to `benchmarks/results/prepare.md`.
"""

import filecmp
import json
import multiprocessing
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tokenizers

from flexpert.data import demo
from flexpert.data.tokenizer import load_tokenizer, train_tokenizer

RESULT = Path(__file__).parent / "results/prepare.md"
CORPORA = ("public", "math", "code", "news", "records")
VOCAB_SIZE = 8192
WORKERS = (1, 2)
SYSTEMS = {"flexpert": "**Flexpert**", "megatron": "Megatron's"}


def write_text(path: Path, num_bytes: int) -> int:
    """JSON lines with so many bytes of text; returns how many there are."""
    texts = [text for name in CORPORA for text in demo.documents(name, 0)]
    chooser, written = random.Random(0), 0
    with path.open("w", encoding="utf-8") as file:
        while written < num_bytes:
            for text in chooser.sample(texts, len(texts)):
                file.write(json.dumps({"text": text}) + "\n")
                written += len(text.encode())
                if written >= num_bytes:
                    break
    return written


class MegatronEncoder:
    """As `Encoder` in Megatron-LM's tools/preprocess_data.py, without sentence splitting."""

    tokenizer: tokenizers.Tokenizer

    def __init__(self, directory: Path, eos_id: int) -> None:
        self.directory, self.eos_id = directory, eos_id

    def initializer(self) -> None:
        MegatronEncoder.tokenizer = tokenizers.Tokenizer.from_file(str(self.directory / "tokenizer.json"))

    def encode(self, line: str) -> tuple[list[int], list[int], int]:
        text = json.loads(line)["text"]
        ids = MegatronEncoder.tokenizer.encode(text, add_special_tokens=False).ids
        ids.append(self.eos_id)
        return ids, [len(ids)], len(line)


def run_megatron(text: Path, directory: Path, output: Path, num_workers: int) -> float:
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    tokenizer = load_tokenizer(directory)
    output.mkdir()
    started = time.perf_counter()
    encoder = MegatronEncoder(directory, tokenizer.eos_id)
    with text.open(encoding="utf-8") as lines, multiprocessing.Pool(num_workers, encoder.initializer) as pool:
        builder = IndexedDatasetBuilder(f"{output}/train.bin", dtype=DType.optimal_dtype(tokenizer.vocab_size))
        for ids, lengths, _ in pool.imap(encoder.encode, lines, 32):
            builder.add_document(ids, lengths)
        builder.finalize(f"{output}/train.idx")
    return time.perf_counter() - started


def run_flexpert(text: Path, directory: Path, output: Path, num_workers: int) -> float:
    # Here, because every worker of the pool imports this module first.
    from flexpert.config.compose import compose
    from flexpert.data.prepare import run

    config, resolved = compose(
        "prepare",
        [f"data.documents={text}", f"tokenizer={directory}", "valid_fraction=0", f"output_dir={output}",
         f"parallel.num_workers={num_workers}"],
    )  # fmt: skip
    started = time.perf_counter()
    run(config, resolved)
    return time.perf_counter() - started


def one_run(system: str, text: str, directory: str, output: str, num_workers: str) -> None:
    """One measurement, in a process of its own: prints wall and CPU seconds as the last line."""
    started = cpu_seconds()
    runner = run_megatron if system == "megatron" else run_flexpert
    seconds = runner(Path(text), Path(directory), Path(output), int(num_workers))
    print(json.dumps([seconds, cpu_seconds() - started]))


def cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measure(
    folder: Path, text: Path, directory: Path, repeats: int, workers: tuple[int, ...]
) -> tuple[dict[tuple[str, int], Any], int]:
    """(wall, CPU) seconds of every run by system and number of workers; and the number of tokens."""
    times: dict[tuple[str, int], list[tuple[float, float]]] = {}
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}  # one thread a process, as the workers have
    reference = folder / "reference.bin"
    for _ in range(repeats):
        for num_workers in workers:
            for system in SYSTEMS:
                with tempfile.TemporaryDirectory(dir=folder) as output:
                    command = [
                        sys.executable,
                        __file__,
                        system,
                        str(text),
                        str(directory),
                        f"{output}/out",
                        str(num_workers),
                    ]
                    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
                    wall, cpu = json.loads(done.stdout.splitlines()[-1])
                    times.setdefault((system, num_workers), []).append((wall, cpu))
                    result = Path(output) / "out/train.bin"
                    if not reference.exists():
                        result.rename(reference)
                    elif not filecmp.cmp(reference, result, shallow=False):
                        raise SystemExit(f"{system} with {num_workers} workers wrote other tokens")
    return times, reference.stat().st_size // 2  # uint16


def table(times: dict[tuple[str, int], Any], num_tokens: int, num_bytes: int, repeats: int) -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in ("tokenizers", "megatron-core", "numpy"))
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    lines = [
        f"`flexpert prepare` and Megatron's preprocessing; {date.today()}, {machine}, {versions}.",
        f"{num_bytes / 1e6:.1f} MB of text, {num_tokens:,} tokens, vocabulary {VOCAB_SIZE:,}; medians of {repeats} "
        "alternating runs (smallest to largest); equal token files.",
        "",
        "| | workers | tokens/s | MB/s | CPU seconds | ratio to Megatron's |",
        "|---|---|---|---|---|---|",
    ]
    walls = {case: statistics.median(wall for wall, _ in runs) for case, runs in times.items()}
    for (system, num_workers), runs in times.items():
        rates = [num_tokens / wall for wall, _ in runs]
        wall = walls[system, num_workers]
        ratio = walls["megatron", num_workers] / wall
        cpu = statistics.median(cpu for _, cpu in runs)
        spread = f"{statistics.median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f})"
        speed = num_bytes / 1e6 / wall
        lines.append(f"| {SYSTEMS[system]} | {num_workers} | {spread} | {speed:.2f} | {cpu:.1f} | {ratio:.2f} |")
    lines += ["", "With one worker Flexpert is one process; Megatron's is two, of which one parses and encodes."]
    return "\n".join(lines) + "\n"


def main() -> None:
    settings = dict(argument.split("=") for argument in sys.argv[1:])
    num_bytes, repeats = int(float(settings.get("megabytes", 50)) * 1e6), int(settings.get("repeats", 5))
    workers = (int(settings["workers"]),) if "workers" in settings else WORKERS
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        num_bytes = write_text(folder / "text.jsonl", num_bytes)
        texts = (text for name in CORPORA for text in demo.documents(name, 0))
        train_tokenizer(texts, VOCAB_SIZE, folder / "tokenizer")
        times, num_tokens = measure(folder, folder / "text.jsonl", folder / "tokenizer", repeats, workers)
    text = table(times, num_tokens, num_bytes, repeats)
    print(text)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in SYSTEMS:
        one_run(*sys.argv[1:])
    else:
        main()
