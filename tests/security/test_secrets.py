"""What leaves the machine with a run's metrics, and what its config file holds: no secret, path, name or text."""

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import wandb
import yaml

from flexpert.config.compose import compose
from flexpert.config.groups import MonitorConfig
from flexpert.config.schema import all_keys
from flexpert.config.stages import STAGE_CONFIGS
from flexpert.monitor.wandb import WandbRun, allowed_config, wandb_mode
from flexpert.stage import comparable

SECRETS = {
    "WANDB_API_KEY": "5ec2e7" * 6 + "abcd",
    "HF_TOKEN": "hf_SecretOfTheHub",
    "AWS_SECRET_ACCESS_KEY": "SecretOfTheCloud",
    "DATABASE_URL": "postgres://user:SecretOfTheDatabase@host/db",
}
PRIVATE = {
    "base": "/private/models/public-base",
    "data.dir": "/private/patients-2024",
    "title": "Owner Whose Title Is Private",
    "license": "LicenseRef-private-terms",
    "public_data": "private-relative-folder",
}


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    yield
    wandb.teardown()


def expert_config(output: Path) -> str:
    """A resolved config with something private wherever it fits."""
    given = [f"{key}={value}" for key, value in PRIVATE.items()]
    return compose("expert", ["name=math", "train.steps=3", "optim.lr=3e-3", f"output_dir={output}", *given])[1]


@pytest.mark.slow
@pytest.mark.usefixtures("secrets")
def test_a_wandb_run_holds_numbers_and_choices_and_nothing_else(tmp_path: Path) -> None:
    """An offline run, all of whose files are searched. Its logs, which W&B does not upload, name its own directory."""
    output = tmp_path / "run"
    output.mkdir()
    resolved = expert_config(output)
    flat = comparable(resolved) | {
        "title": PRIVATE["title"],
        "license": PRIVATE["license"],
        "prompt": "A private prompt",
    }
    run = WandbRun(MonitorConfig(wandb="offline"), "offline", "expert", output, flat)
    for step in (1, 2):
        run.log({"step": step, "tokens": 100 * step, "loss": 3.25 / step})
    run.close()

    # W&B's own process may still be writing when `finish` has returned.
    for _ in range(100):
        files = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
        if any(b"expert-math" in content and b"loss" in content for content in files.values()):
            break
        time.sleep(0.1)
    synced = {path: content for path, content in files.items() if "logs" not in path.parts and path.suffix != ".log"}
    record = b"".join(content for path, content in synced.items() if path.suffix == ".wandb")
    for expected in (b"optim.lr", b"0.003", b"train.steps", b"loss", b"expert-math"):
        assert expected in record
    forbidden = [*SECRETS.values(), *PRIVATE.values(), "A private prompt"]
    for text in [*forbidden, *(Path(value).name for value in PRIVATE.values() if "/" in value)]:
        assert not [path for path, content in files.items() if text.encode() in content], text
    for text in (str(tmp_path), str(Path.home()), "requirements"):
        assert not [path for path, content in synced.items() if text.encode() in content or text in path.name], text
    host = socket.gethostname().encode()
    assert bytes([len(host)]) + host not in record  # as protobuf writes a string


def test_every_key_that_may_be_uploaded_is_meant_to_be() -> None:
    """Every key of every stage with a text that looks harmless: only choices and the id of the expert pass."""
    keys = {key for stage in STAGE_CONFIGS.values() for key, _, _ in all_keys(stage)}
    assert allowed_config(dict.fromkeys(keys, "harmless")).keys() == {
        "name",
        "optim.schedule",
        "train.device",
        "router.init",
    }
    assert allowed_config({key: ["harmless"] for key in keys}) == {}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("token", "abc"),
        ("secret_number", 42),
        ("train.api_key", "abc"),
        ("model.source", "hub"),
        ("optim.note", ["of", "the", "owner"]),
        ("train.mapping", {"news": "folder"}),
        ("router.embedding", "folder"),
        ("router.initial", "mean"),
        ("router.documents", 1000),
        ("names", "math"),
        ("seeds", 1),
        ("seed.word", 1),
        ("data.max_documents", 3),
        ("train.device", "/dev/private"),
        ("exclude", []),
    ],
)
def test_a_new_key_is_not_uploaded(key: str, value: object) -> None:
    assert allowed_config({key: value, "seed": 3}) == {"seed": 3}


def test_numbers_and_switches_of_the_recipe_are_uploaded() -> None:
    allowed = allowed_config(comparable(expert_config(Path("out"))))
    assert allowed["optim.betas"] == [0.9, 0.95]
    assert allowed["optim.lr"] == 3e-3
    assert allowed["train.tokens"] is None
    assert allowed["name"] == "math"
    assert {"train.steps", "optim.schedule", "router.init", "router.bias", "seed"} <= allowed.keys()


def test_a_key_of_wandb_alone_decides_between_online_and_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert wandb_mode(MonitorConfig()) == "offline"
    monkeypatch.setenv("WANDB_API_KEY", SECRETS["WANDB_API_KEY"])
    assert wandb_mode(MonitorConfig()) == "online"
    for mode in ("off", "offline"):
        assert wandb_mode(MonitorConfig(wandb=mode)) == mode


@pytest.mark.parametrize("stage", STAGE_CONFIGS)
def test_the_resolved_config_of_a_stage_holds_nothing_of_the_environment(
    stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Composed in two environments that have no value in common, a config is the same."""
    needed = {
        "prepare": ["data=demo_math", "train_tokenizer.vocab_size=512", "output_dir=/o"],
        "pretrain": ["data.dir=/d", "train.steps=1"],
        "expert": ["base=/b", "data.dir=/d", "train.steps=1", "router.init=random", "name=math"],
        "assemble": ["base=/b", "contributions=/c"],
        "remove": ["model=/m", "experts=news"],
        "verify": ["contribution=/c"],
        "plan": [],
        "tune_router": ["model=/m", "data.dir=/d", "train.steps=1"],
        "tune_kernels": ["model=flex_37b"],
        "evaluate": ["model=/m", "data.dirs.a=/d", "output_dir=/o"],
        "generate": ["model=/m", "prompt=${oc.env:HF_TOKEN} A private prompt"],
        "report": ["run=/r"],
        "pipeline": [],
        **{name: ["run=/r"] for name in ("status", "logs", "cancel", "sync")},
    }[stage]
    _, before = compose(stage, needed)
    for name in os.environ:
        monkeypatch.setenv(name, "SecretOfTheEnvironment")
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    _, after = compose(stage, needed)
    assert before == after
    assert not [value for value in [*SECRETS.values(), "SecretOfTheEnvironment", "A private prompt"] if value in after]
    assert yaml.safe_load(after)
