"""Router tuning: only rows move, the result is a whole model, and its record says that it was tuned."""

import json
from pathlib import Path

import safetensors.torch
import torch
from toy import train

from flexpert.cli import run_stage


def test_only_router_rows_move_and_the_record_says_so(road: Path, expert_overrides: list[str], tmp_path: Path) -> None:
    train("expert", *expert_overrides, f"output_dir={tmp_path}/letters")
    base, contribution = f"base={road}/public/model", f"contributions=[{tmp_path}/letters/contribution]"
    run_stage("assemble", [base, contribution, f"output_dir={tmp_path}/assembled"])
    data = f"data.dir={road}/data/public"
    train("tune_router", f"model={tmp_path}/assembled", data, f"output_dir={tmp_path}/tuned")
    before, after = tmp_path / "assembled", tmp_path / "tuned/model"
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
