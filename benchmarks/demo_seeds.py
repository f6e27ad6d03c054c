"""The demo over several seeds: Flexpert beside its peers on the same held-out documents, and whether the gates hold.

    python benchmarks/demo_seeds.py 0 1 2        (about ten minutes a seed on two cores)

The peers are what the owners could do otherwise with the same steps and text: the public model, the soup of their dense
fine-tunes, the ensemble of them (BTM), and each fine-tune alone on its own domain. Prints a table in Markdown and
writes it to `benchmarks/results/demo_seeds.md`; exits with status 1 where a gate fails for any seed.
"""

import platform
import statistics
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import torch
import yaml

from flexpert.evaluation.gates import Gate, bits, check_gates, expert_domains, mean_bits
from flexpert.records import read_record

RESULT = Path(__file__).parent / "results/demo_seeds.md"
PEERS = {"public model": "public", "soup": "soup", "BTM": "btm", "**Flexpert**": "model"}


def run_demo(seed: int) -> tuple[dict[str, Any], list[Gate]]:
    """Run the demo with this seed, or take the run that is there; returns its evaluation and gates."""
    run = Path(f"runs/demo-seed-{seed}")
    command = ["pipeline", "pipeline=demo", f"seed={seed}", f"output_dir={run}"]
    # A gate that fails is part of the result.
    subprocess.run([sys.executable, "-P", "-m", "flexpert", *command], check=False)
    evaluation = read_record(run / "evaluation/evaluation.json", "flexpert.evaluation")
    thresholds = yaml.safe_load((run / "pipeline.yaml").read_text(encoding="utf-8"))["pipeline"]["gates"]
    return evaluation, check_gates(evaluation, thresholds)


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def own_fine_tunes(evaluation: dict[str, Any]) -> float:
    """Mean over private domains of what each owner's own fine-tune reaches."""
    return statistics.mean(bits(evaluation, f"dense {name}", name) for name in expert_domains(evaluation))


def on_private(evaluation: dict[str, Any], method: str) -> float:
    return statistics.mean(bits(evaluation, method, name) for name in expert_domains(evaluation))


def table(seeds: list[int], runs: list[tuple[dict[str, Any], list[Gate]]]) -> str:
    evaluations = [evaluation for evaluation, _ in runs]
    machine = f"{platform.machine()}, Python {platform.python_version()}, PyTorch {torch.__version__}"
    counts = {name: entry["documents"] for name, entry in evaluations[0]["domains"].items()}
    lines = [
        f"Demo, seeds {', '.join(map(str, seeds))}; {date.today()}, {machine}.",
        f"Held-out documents (seed {seeds[0]}): {', '.join(f'{name} {count}' for name, count in counts.items())}.",
        "",
        "| bits per byte, mean over seeds (smallest to largest) | private domains | public text | all |",
        "|---|---|---|---|",
    ]
    for title, method in PEERS.items():
        columns = [
            spread([on_private(e, method) for e in evaluations]),
            spread([bits(e, method, "public") for e in evaluations]),
            spread([mean_bits(e, method) for e in evaluations]),
        ]
        lines.append(f"| {title} | {' | '.join(columns)} |")
    lines.append(f"| each owner's fine-tune, own domain | {spread([own_fine_tunes(e) for e in evaluations])} | – | – |")
    lines += ["", f"| gate | threshold | {' | '.join(f'seed {seed}' for seed in seeds)} |"]
    lines.append("|---" * (2 + len(seeds)) + "|")
    for gates in zip(*(gates for _, gates in runs), strict=True):
        cells = [f"{gate.value:.3f} ({gate.where}){'' if gate.holds else ' **fails**'}" for gate in gates]
        lines.append(f"| {gates[0].claim} | {gates[0].threshold:g} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    seeds = [int(argument) for argument in sys.argv[1:]] or [0, 1, 2]
    runs = [run_demo(seed) for seed in seeds]
    text = table(seeds, runs)
    print(text)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(text, encoding="utf-8")
    sys.exit(not all(gate.holds for _, gates in runs for gate in gates))


if __name__ == "__main__":
    main()
