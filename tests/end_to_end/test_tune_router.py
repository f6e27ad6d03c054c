"""Router tuning: only rows move, the result is a whole model, and its record says that it was tuned."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from toy import train

from flexpert.cli import run_stage
from flexpert.errors import UserError
from flexpert.train.loop import Trainer


@pytest.fixture
def assembled(road: Path, expert_overrides: list[str], tmp_path: Path) -> Path:
    """The public model and one expert, in assembled."""
    train("expert", *expert_overrides, f"output_dir={tmp_path}/letters")
    base, contribution = f"base={road}/public/model", f"contributions=[{tmp_path}/letters/contribution]"
    run_stage("assemble", [base, contribution, f"output_dir={tmp_path}/assembled"])
    return tmp_path / "assembled"


def test_only_router_rows_move_and_the_record_says_so(road: Path, assembled: Path, tmp_path: Path) -> None:
    train("tune_router", f"model={assembled}", f"data.dir={road}/data/public", f"output_dir={tmp_path}/tuned")
    before, after = assembled, tmp_path / "tuned/model"
    assert {path.name for path in before.iterdir()} == {path.name for path in after.iterdir()}
    for path in before.iterdir():
        same = path.read_bytes() == (after / path.name).read_bytes()
        assert same == (path.name not in ("router.safetensors", "assembly.json")), path.name
    old, new = (safetensors.torch.load_file(path / "router.safetensors") for path in (before, after))
    assert old.keys() == new.keys()
    assert not any(torch.equal(old[name], new[name]) for name in old)
    assert "tuned" not in json.loads((before / "assembly.json").read_text())["router"]
    assert json.loads((after / "assembly.json").read_text())["router"]["tuned"] is True

    run_stage("remove", [f"model={after}", "experts=[letters]", f"output_dir={tmp_path}/removed"])
    assert json.loads((tmp_path / "removed/assembly.json").read_text())["router"]["tuned"] is True
    run_stage("generate", [f"model={after}", "prompt=dear", "max_new_tokens=4"])


def test_the_tuned_model_says_how_many_experts_it_was_tuned_for(road: Path, assembled: Path, tmp_path: Path) -> None:
    data = f"data.dir={road}/data/public"
    train("tune_router", f"model={assembled}", data, "active_experts=1", f"output_dir={tmp_path}/tuned")
    after = tmp_path / "tuned/model"
    assert json.loads((assembled / "config.json").read_text())["num_experts_per_tok"] == 2
    assert json.loads((after / "config.json").read_text())["num_experts_per_tok"] == 1
    assert json.loads((after / "assembly.json").read_text())["active_experts"] == 1


@pytest.mark.parametrize("moment", ["before", "during"])
@pytest.mark.parametrize("name", ["trunk.safetensors", "expert-letters.safetensors", "tokenizer_config.json"])
def test_an_altered_model_is_not_tuned(
    name: str, moment: str, road: Path, assembled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def alter() -> None:
        data = bytearray((assembled / name).read_bytes())
        data[-4] ^= 1
        (assembled / name).write_bytes(data)

    original = Trainer.run

    def run(trainer: Trainer) -> None:
        original(trainer)
        alter()

    if moment == "before":
        alter()
    else:
        monkeypatch.setattr(Trainer, "run", run)
    with pytest.raises(UserError, match=rf"{name} was altered") as caught:
        train("tune_router", f"model={assembled}", f"data.dir={road}/data/public", f"output_dir={tmp_path}/tuned")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "tuned/model").exists()
    assert (tmp_path / "tuned").exists() == (moment == "during")
