"""A tiny public model and data sets, prepared once for all tests of training and of what comes after it."""

from pathlib import Path

import pytest
from toy import SHAPE, train, write_texts

from flexpert.cli import run_stage


@pytest.fixture(scope="session")
def road(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data/{public,letters}, a public model in public/model."""
    root = tmp_path_factory.mktemp("road")
    write_texts(
        root / "public_texts", ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "nine", "birds"], 40, seed=0
    )
    write_texts(root / "letters_texts", ["dear", "sir", "yours", "faithfully", "regarding", "invoice"], 40, seed=1)
    for name, tokenizer in (
        ("public", "train_tokenizer.vocab_size=300"),
        ("letters", f"tokenizer={root}/data/public/tokenizer"),
    ):
        documents = f"data.documents={root}/{name}_texts/*.txt"
        run_stage("prepare", [documents, tokenizer, "valid_fraction=0.3", f"output_dir={root}/data/{name}"])
    train("pretrain", *SHAPE, f"data.dir={root}/data/public", f"output_dir={root}/public")
    return root


@pytest.fixture(scope="session")
def expert_overrides(road: Path) -> list[str]:
    return [
        f"base={road}/public/model", f"data.dir={road}/data/letters", "name=letters", "router.init=unit_mean",
        f"public_data={road}/data/public", "router.documents=8",
    ]  # fmt: skip
