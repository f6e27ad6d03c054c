"""Text, a tokenizer for it and `flexpert prepare` in one call, for the tests of data."""

import json
import random
from pathlib import Path
from typing import Any

from flexpert.cli import main
from flexpert.data.indexed import IndexedTokens
from flexpert.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

WORDS = ["one", "two", "naïve", "日本", "😀", "a\r\nb", "x = 3.14", '"quoted"', "\ttab", "end."]


def make_texts(count: int, seed: int = 0) -> list[str]:
    chooser = random.Random(seed)
    return [f"{seed}/{index}: {' '.join(chooser.choices(WORDS, k=chooser.randint(1, 30)))}" for index in range(count)]


def make_tokenizer(directory: Path, vocab_size: int = 320) -> Tokenizer:
    return train_tokenizer(make_texts(60), vocab_size, directory)


def json_lines(texts: list[str], **fields: str) -> bytes:
    return b"".join(json.dumps({"text": text, **fields}).encode() + b"\n" for text in texts)


def prepare(output: Path, *overrides: str) -> Path:
    main(["prepare", f"output_dir={output}", *overrides])
    return output


def manifest(directory: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((directory / "manifest.json").read_text())
    return record


def content(directory: Path, split: str) -> list[str]:
    """Decoded documents of a split."""
    tokenizer, source = load_tokenizer(directory / "tokenizer"), IndexedTokens(directory / split)
    return [tokenizer.decode(source.document(index)[:-1]) for index in range(len(source))]
