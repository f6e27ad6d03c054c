"""`assemble` against `cp` and `sync` of the same bytes, both from a cold cache: throughput and peak resident memory.

    python benchmarks/assemble.py [--sizes 1 4 8] [--repeats 3] [--directory DIR]

For each size (GB of weights) it makes a public model and three contributions of random bfloat16 weights, then copies
and assembles them in turn. Assembling reads each byte once, checks that it is finite and has the recorded hash, and
writes it once; both end with the bytes on the disk. The seconds are those of the work itself, without the start of
Python. Prints a table in Markdown and writes it to `benchmarks/results/assemble.md`; exits with status 1 where the
ratio is below 0.8 or the memory above 512 MiB for any size. Needs free disk space of 2.2 times the largest size, and
an idle machine.
"""

import argparse
import json
import math
import os
import platform
import shutil
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

RESULT = Path(__file__).parent / "results/assemble.md"
LEAST_RATIO, MOST_MEMORY_MIB = 0.8, 512
OWNERS = ("news", "code", "math")
VOCABULARY = 16_384


class Weights(Mapping[str, "torch.Tensor"]):
    """Tensors of these shapes, each a view of the same random values: nothing is made before it is asked for."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], seed: int) -> None:
        import torch  # not in the processes that are measured

        self.shapes = shapes
        largest = max(math.prod(shape) for shape in shapes.values())
        self.storage = torch.randn(largest, generator=torch.Generator().manual_seed(seed)).bfloat16()

    def __getitem__(self, name: str) -> "torch.Tensor":
        shape = self.shapes[name]
        tensor: torch.Tensor = self.storage[: math.prod(shape)].reshape(shape)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def make_inputs(folder: Path, gigabytes: float) -> list[Path]:
    """A public model and one contribution for each owner: so many GB in all."""
    from flexpert.assembly.tensors import TensorSource, write_tensors
    from flexpert.checkpoint.digest import base_digest, tensor_bytes
    from flexpert.checkpoint.directory import ModelDirectory
    from flexpert.checkpoint.layout import model_config, model_shapes
    from flexpert.contribution.pack import pack
    from flexpert.contribution.record import ExpertIdentity, expert_shapes

    D = 2048 if gigabytes >= 1 else 1024
    F = 4 * D
    layer_bytes = 2 * (4 * D * D + (1 + len(OWNERS)) * 3 * D * F)
    num_layers = max(1, round((gigabytes * 1e9 - 2 * 2 * VOCABULARY * D) / layer_bytes))
    config = {
        "architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2", "vocab_size": VOCABULARY, "hidden_size": D,
        "intermediate_size": F, "num_hidden_layers": num_layers, "num_attention_heads": 16, "num_key_value_heads": 16,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 500_000.0, "tie_word_embeddings": False,
    }  # fmt: skip
    base = folder / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(config))
    (base / "tokenizer.json").write_text("{}")
    weights = Weights(model_shapes(model_config(config, base / "config.json")), seed=0)

    def source(name: str) -> TensorSource:
        return TensorSource(name, "BF16", weights.shapes[name], lambda: [tensor_bytes(weights[name])], name)

    write_tensors(base / "model.safetensors", map(source, weights))
    architecture, digest = ModelDirectory.open(base).architecture, base_digest(base)
    for seed, owner in enumerate(OWNERS, start=1):
        pack(
            folder / owner,
            tensors=Weights(expert_shapes(architecture, bias=False), seed),
            identity=ExpertIdentity(owner, owner),
            base_digest=digest,
            architecture=architecture,
            router={"bias": False, "init": "zero"},
            training={},
        )
    return [base, *(folder / owner for owner in OWNERS)]


def files_below(folders: list[Path]) -> list[Path]:
    return [path for folder in folders for path in folder.rglob("*") if path.is_file()]


def forget(folders: list[Path]) -> None:
    """Drop the files from the page cache."""
    os.sync()
    for path in files_below(folders):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


class Run(NamedTuple):
    seconds: float
    memory_mib: float


def run(command: list[str]) -> Run:
    """Run this program's `--work` and read what it prints last."""
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return Run(*map(float, output.split()[-2:]))


def peak_memory_mib() -> float:
    """Of this process, since its program was loaded; `ru_maxrss` would count the process that started it as well."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def copy(inputs: list[Path], output: Path) -> None:
    output.mkdir()
    subprocess.run(["cp", "-r", *map(str, inputs), str(output)], check=True)
    subprocess.run(["sync", *map(str, files_below([output])), str(output)], check=True)


def assemble_inputs(inputs: list[Path], output: Path) -> None:
    from flexpert.assembly.assemble import assemble

    assemble(inputs[0], inputs[1:], output)


WORK = {"copy": copy, "assemble": assemble_inputs}


def measure(folder: Path, gigabytes: float, repeats: int) -> tuple[float, dict[str, Run]]:
    """The GB that were made, and the medians of copying and of assembling them."""
    inputs = make_inputs(folder, gigabytes)
    weights = sum(path.stat().st_size for path in files_below(inputs)) / 1e9
    runs: dict[str, list[Run]] = {work: [] for work in WORK}
    for _ in range(repeats):
        for work in WORK:  # in turn, so that a slow spell of the machine meets both
            forget(inputs)
            runs[work].append(run([sys.executable, __file__, "--work", work, *map(str, [*inputs, folder / "output"])]))
            shutil.rmtree(folder / "output")
    return weights, {work: Run(*map(statistics.median, zip(*many, strict=True))) for work, many in runs.items()}


def report(rows: list[tuple[float, dict[str, Run]]], repeats: int) -> str:
    machine = (
        f"{platform.machine()}, {os.cpu_count()} CPUs, Linux {platform.release()}, Python {platform.python_version()}, "
    )
    machine += f"{ssl.OPENSSL_VERSION}"
    lines = [
        f"`assemble` against `cp` and `sync` from a cold cache, medians of {repeats}; {date.today()}, {machine}.",
        "",
        "| weights, GB | cp + sync, GB/s | assemble, GB/s | ratio | peak memory, MiB |",
        "|---|---|---|---|---|",
    ]
    for weights, runs in rows:
        plain, ours = weights / runs["copy"].seconds, weights / runs["assemble"].seconds
        memory = runs["assemble"].memory_mib
        lines.append(f"| {weights:.2f} | {plain:.2f} | {ours:.2f} | {ours / plain:.2f} | {memory:.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=float, nargs="+", default=[1, 4, 8], metavar="GB")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--directory", type=Path, default=Path(), help="where the files are made; default: here")
    parser.add_argument("--work", choices=WORK, help=argparse.SUPPRESS)  # what the processes that are timed do
    parser.add_argument("paths", type=Path, nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        import flexpert.assembly.assemble  # noqa: F401 (its import is not timed)

        start = time.perf_counter()
        WORK[arguments.work](arguments.paths[:-1], arguments.paths[-1])
        print(time.perf_counter() - start, peak_memory_mib())
        return
    needed, free = 2.2 * max(arguments.sizes) * 1e9, shutil.disk_usage(arguments.directory).free
    if free < needed:
        sys.exit(f"{arguments.directory.resolve()} has {free / 1e9:.1f} GB free; {needed / 1e9:.1f} GB are needed")
    rows = []
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory(dir=arguments.directory, prefix="assemble-benchmark-") as folder:
            rows.append(measure(Path(folder).resolve(), size, arguments.repeats))
    text = report(rows, arguments.repeats)
    print(text)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(text, encoding="utf-8")
    ratios = [runs["copy"].seconds / runs["assemble"].seconds for _, runs in rows]
    memory = max(runs["assemble"].memory_mib for _, runs in rows)
    sys.exit(min(ratios) < LEAST_RATIO or memory > MOST_MEMORY_MIB)


if __name__ == "__main__":
    main()
