"""Stages at toy size: seconds, not minutes. `SHAPE` is the model, `train` runs a training stage."""

import random
from pathlib import Path

import numpy as np

from flexpert.cli import run_stage
from flexpert.data.indexed import IndexedWriter
from flexpert.data.tokenizer import train_tokenizer

#: A training stage at toy size.
TOY = [
    "train.steps=6", "train.batch_tokens=128", "train.sequence_length=16", "optim.lr=1e-2", "optim.warmup_steps=2",
    "train.microbatch_sequences=8", "monitor.wandb=off", "checkpoint.interval=2", "checkpoint.keep=10",
]  # fmt: skip
SHAPE = ["model.hidden_size=24", "model.num_layers=2", "model.num_heads=2", "model.intermediate_size=40"]


def write_texts(path: Path, words: list[str], documents: int, seed: int) -> None:
    """Plain-text documents from a small vocabulary."""
    path.mkdir()
    chooser = random.Random(seed)
    for number in range(documents):
        text = " ".join(chooser.choice(words) for _ in range(chooser.randint(20, 60)))
        (path / f"{number:03d}.txt").write_text(f"{text} {number}.\n", encoding="utf-8")


def write_data_sets(root: Path, words: dict[str, list[str]]) -> None:
    """A tokenizer, and by name 45 documents of 1 to 19 words, tokenized with it."""
    generator = np.random.default_rng(0)
    texts = {
        name: [" ".join(generator.choice(known, size=size)) for size in generator.integers(1, 20, size=45)]
        for name, known in words.items()
    }
    tokenizer = train_tokenizer([text for documents in texts.values() for text in documents], 310, root / "tokenizer")
    for name, documents in texts.items():
        (root / name).mkdir()
        tokenizer.copy_to(root / name / "tokenizer")
        with IndexedWriter(root / name / "train", np.uint16) as writer:
            for document in documents:
                writer.add([*tokenizer.encode(document), tokenizer.eos_id])


def train(stage: str, *overrides: str) -> None:
    """A training stage at toy size; later overrides win."""
    run_stage(stage, with_toy(*overrides))


def with_toy(*overrides: str) -> list[str]:
    """These overrides, and those of `TOY` that they do not replace."""
    given = {override.split("=")[0] for override in overrides}
    return [*(d for d in TOY if d.split("=")[0] not in given), *overrides]
