"""A tiny model and checkpoints of it, of two runs, to be damaged and restored in milliseconds."""

import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from ranks import run_ranks
from torch import Tensor

from flexpert.checkpoint import envelope
from flexpert.checkpoint.distributed import Saver, trained_state
from flexpert.config.groups import CheckpointConfig, ModelConfig
from flexpert.model.transformer import Transformer
from flexpert.parallel.environment import is_first

#: What a record holds beside hashes; numbers that can be written in more ways than one.
CONTENT = {
    "skipped_steps": 5,
    "guard": {"loss": [0.30000000000000004, 1e-05]},
    "wandb_id": None,
    "inputs": {"data": "é"},
}
KEY, RECORD, STEP = envelope.KEY_NAME, envelope.RECORD_NAME, "step-000000003"
FILES = [".metadata", "__0_0.distcp", "__1_0.distcp", RECORD]
#: What the newest step of a run may be mixed up with.
FOREIGN = ["run/step-000000002", "earlier/step-000000003", "other/step-000000003", "other/step-000000002"]

Trained = tuple[Transformer, torch.optim.Optimizer]


def tiny(**shape: int) -> Trained:
    sizes = {"vocab_size": 11, "hidden_size": 8, "num_layers": 1, "num_heads": 2, "intermediate_size": 12} | shape
    model = Transformer(ModelConfig(**sizes))  # type: ignore[arg-type]
    for parameter in model.parameters():  # some are memory as it was found, another one on each rank
        torch.nn.init.normal_(parameter)
    return model, torch.optim.AdamW(model.parameters())


def update(trained: Trained, seed: int) -> None:
    torch.manual_seed(seed)
    for parameter in trained[0].parameters():
        parameter.grad = torch.randn_like(parameter)
    trained[1].step()


def carried(trained: Trained) -> dict[str, Tensor]:
    """All that a checkpoint restores, and what the next random numbers are."""
    state = trained_state(*trained)
    tensors = {name: value.detach().clone() for name, value in state["model"].items()}
    for name, moments in state["optimizer"].items():
        tensors |= {f"{key} of {name}": value.clone() for key, value in moments.items()}
    return tensors | {"random": torch.rand(3)}


def blank(trained: Trained) -> None:
    for part in trained_state(*trained).values():
        for value in part.values():
            for tensor in value.values() if isinstance(value, dict) else [value]:
                tensor.data.zero_()
    torch.manual_seed(1234)


def save(saver: Saver, step: int, trained: Trained) -> OSError | None:
    saver.save(step, *trained, CONTENT)
    return saver.wait()


def make(root: Path) -> dict[str, dict[str, Tensor]]:
    """On each of two ranks, so that a step has two shards."""
    torch.manual_seed(0)
    trained, found = tiny(), {}
    for seed, where in enumerate(["run/2", "run/3", "earlier/3", "other/2", "other/3"]):
        name, _, step = where.partition("/")
        if is_first():
            (root / name).mkdir(exist_ok=True)
            if name == "earlier":  # another attempt at the same step of the same run
                shutil.copy(root / "run" / KEY, root / name)
        saver = Saver(root / name, envelope.open_key(root / name) if is_first() else b"", CheckpointConfig(keep=10))
        update(trained, seed)
        assert save(saver, int(step), trained) is None
        found[where] = carried(trained)
    return found


class Made(NamedTuple):
    """Attributes:
    root: run/step-…{2,3} and what may take their place: earlier/step-…3, other/step-…{2,3}.
    carried: "run/3" → what that step restores.
    """

    root: Path
    key: bytes
    carried: dict[str, dict[str, Tensor]]


def make_runs(root: Path) -> Made:
    found = run_ranks(make, 2, root)[0]
    assert sorted(path.name for path in (root / "run" / STEP).iterdir()) == FILES
    return Made(root, envelope.open_key(root / "run"), found)


def assert_carries(trained: Trained, wanted: dict[str, Tensor]) -> None:
    found = carried(trained)
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
