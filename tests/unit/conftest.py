"""A tiny public model and contributions to it, with odd, unequal sizes and another value in every place."""

import hashlib
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from flexpert import signals
from flexpert.checkpoint.digest import base_digest, digest_tensor
from flexpert.checkpoint.directory import ModelDirectory
from flexpert.checkpoint.layout import Architecture
from flexpert.contribution.pack import pack
from flexpert.contribution.record import ExpertIdentity, contribution_digest, expert_shapes
from flexpert.errors import UserError
from flexpert.records import write_record

ARCHITECTURE = Architecture(
    hidden_size=24,
    num_hidden_layers=3,
    intermediate_size=40,
    num_attention_heads=4,
    num_key_value_heads=2,
    rms_norm_eps=3e-5,
    rope_theta=1234.0,
)
VOCABULARY = 101


@pytest.fixture
def stopped_in_popen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Who starts a process here is told to stop at that moment; the ids of those that were started."""
    started: list[int] = []

    class Popen(subprocess.Popen[bytes]):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            started.append(self.pid)
            os.kill(os.getpid(), signal.SIGTERM)

    handlers = {number: signal.getsignal(number) for number in signals.STOPPING}
    monkeypatch.setattr(subprocess, "Popen", Popen)
    monkeypatch.setattr(signals, "_received", None)
    yield started
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def refused() -> Callable[..., AbstractContextManager[None]]:
    """`with refused("part", …)`: the block must raise a UserError of one line that holds every part."""

    @contextmanager
    def check(*parts: object) -> Iterator[None]:
        with pytest.raises(UserError) as caught:
            yield
        message = str(caught.value)
        assert "\n" not in message
        for part in parts:
            assert str(part) in message

    return check


def write_tokenizer(directory: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = {f"word{index}": index for index in range(VOCABULARY - 1)} | {"[UNK]": VOCABULARY - 1}
    Tokenizer(WordLevel(words, unk_token="[UNK]")).save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}\n')


@pytest.fixture(scope="session")
def make_base() -> Callable[..., Path]:
    """`make_base(directory, dtype=torch.float32, shard_size="5GB", …)`: the same values for every directory; further
    arguments are sizes other than `ARCHITECTURE`'s."""

    def make(directory: Path, dtype: torch.dtype = torch.float32, shard_size: str = "5GB", **sizes: int) -> Path:
        from transformers import Olmo2Config, Olmo2ForCausalLM

        shape = ARCHITECTURE.to_json() | sizes
        rope_theta = shape.pop("rope_theta")
        config = Olmo2Config(
            **shape,
            vocab_size=VOCABULARY,
            max_position_embeddings=77,
            rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
            pad_token_id=3,
            eos_token_id=5,
        )
        torch.manual_seed(0)
        model = Olmo2ForCausalLM(config).to(dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(mean=0.5)
        model.save_pretrained(directory, max_shard_size=shard_size)
        write_tokenizer(directory)
        return directory

    return make


@pytest.fixture(scope="session")
def shared_base(make_base: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tests must not write here; those that change a base take `base`."""
    return make_base(tmp_path_factory.mktemp("shared") / "base")


@pytest.fixture
def base(shared_base: Path, tmp_path: Path) -> Path:
    """A copy of the public model that the test may change."""
    return Path(shutil.copytree(shared_base, tmp_path / "base"))


def random_expert(
    seed: int, bias: bool, dtype: torch.dtype, architecture: Architecture = ARCHITECTURE
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = expert_shapes(architecture, bias)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def identity(expert_id: str) -> ExpertIdentity:
    return ExpertIdentity(expert_id, f"Owner of {expert_id.upper()}", f"LicenseRef-{expert_id}")


@pytest.fixture(scope="session")
def make_contribution() -> Callable[..., Path]:
    """`make_contribution(directory, base, seed=1, bias=False, dtype=torch.float32, tensors=None)`, named after it."""

    def make(
        directory: Path,
        base: Path,
        *,
        seed: int = 1,
        bias: bool = False,
        dtype: torch.dtype = torch.float32,
        tensors: Mapping[str, torch.Tensor] | None = None,
    ) -> Path:
        architecture = ModelDirectory.open(base).architecture
        return pack(
            directory,
            tensors=random_expert(seed, bias, dtype, architecture) if tensors is None else tensors,
            identity=identity(directory.name),
            base_digest=base_digest(base),
            architecture=architecture,
            router={"bias": bias, "init": "zero"},
            training={"steps": 7, "tokens": 7000},
        )

    return make


@pytest.fixture(scope="session")
def forge_contribution() -> Callable[..., Path]:
    """`forge_contribution(directory, base, tensors, **changes)`: a contribution from another hand than ours, whose
    record is true to its files but for `changes`."""

    def forge(directory: Path, base: Path, tensors: Mapping[str, torch.Tensor], **changes: Any) -> Path:
        directory.mkdir()
        file = directory / "expert.safetensors"
        save_file(dict(tensors), file)
        entry = {
            "name": file.name,
            "bytes": file.stat().st_size,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
        digests = {name: digest_tensor(tensor) for name, tensor in tensors.items()}
        record: dict[str, Any] = {
            "id": directory.name,
            "title": "Forged",
            "license": None,
            "base_digest": base_digest(base),
            "architecture": ARCHITECTURE.to_json(),
            "dtype": "F32",
            "router": {"bias": False, "init": "zero"},
            "training": {},
            "files": [entry],
            "tensors": {name: digest.to_json() for name, digest in digests.items()},
        } | changes
        record = {"digest": contribution_digest(record)} | record
        write_record(directory / "contribution.json", "flexpert.contribution", record)
        return directory

    return forge


@pytest.fixture
def expert_tensors() -> dict[str, torch.Tensor]:
    """A random expert's tensors, under a contribution's names."""
    return random_expert(seed=1, bias=False, dtype=torch.float32)


@pytest.fixture
def contribution(shared_base: Path, make_contribution: Callable[..., Path], tmp_path: Path) -> Path:
    """A good contribution."""
    return make_contribution(tmp_path / "math", shared_base)


def contributions_of(request: pytest.FixtureRequest, bias: bool) -> dict[str, Path]:
    """One contribution for each of the module's `IDS`."""
    base, make = request.getfixturevalue("shared_base"), request.getfixturevalue("make_contribution")
    folder = request.getfixturevalue("tmp_path_factory").mktemp("contributions")
    return {name: make(folder / name, base, seed=seed, bias=bias) for seed, name in enumerate(request.module.IDS)}


@pytest.fixture(scope="module")
def contributions(request: pytest.FixtureRequest) -> dict[str, Path]:
    return contributions_of(request, bias=False)


@pytest.fixture(scope="module")
def biased(request: pytest.FixtureRequest) -> dict[str, Path]:
    return contributions_of(request, bias=True)
