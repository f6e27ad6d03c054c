"""Taking an expert out: excluding at load, removing on disk and never having assembled it are one and the same."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from toy import train

from flexpert.checkpoint.huggingface import load_model
from flexpert.cli import run_stage
from flexpert.errors import UserError


@pytest.fixture(scope="module")
def federation(road: Path, expert_overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three experts of different seeds, assembled; without the middle one, twice."""
    root = tmp_path_factory.mktemp("federation")
    contributions = []
    for seed, name in enumerate(("letters", "memos", "notes")):
        overrides = [o for o in expert_overrides if not o.startswith("name=")]
        train("expert", *overrides, f"name={name}", f"seed={seed}", f"output_dir={root}/{name}")
        contributions.append(f"{root}/{name}/contribution")
    base = f"base={road}/public/model"
    run_stage(
        "assemble", [base, f"contributions=[{','.join(contributions)}]", "active_experts=3", f"output_dir={root}/all"]
    )
    kept = f"contributions=[{contributions[0]},{contributions[2]}]"
    run_stage("assemble", [base, kept, "active_experts=3", f"output_dir={root}/never"])
    run_stage("remove", [f"model={root}/all", "experts=[memos]", f"output_dir={root}/removed"])
    return root


def evaluate(road: Path, root: Path, model: str, output: str, *overrides: str) -> dict[str, object]:
    dirs = f"data.dirs={{public:{road}/data/public,letters:{road}/data/letters}}"
    run_stage(
        "evaluate", [f"model={root}/{model}", dirs, "sequence_length=16", f"output_dir={root}/{output}", *overrides]
    )
    record = json.loads((root / output / "evaluation.json").read_text())
    return record["methods"]["model"]  # type: ignore[no-any-return]


def test_excluding_equals_removing_equals_never_assembling(road: Path, federation: Path) -> None:
    excluded = evaluate(road, federation, "all", "excluded", "exclude=[memos]")
    removed = evaluate(road, federation, "removed", "evaluated_removed")
    never = evaluate(road, federation, "never", "evaluated_never")
    assert excluded == removed == never  # every float in the record, to the last bit
    assert excluded != evaluate(road, federation, "all", "evaluated_all")


def test_logits_are_bit_equal_for_any_number_of_active_experts(federation: Path) -> None:
    tokens = torch.randint(0, 300, (3, 16), generator=torch.Generator().manual_seed(0))
    for active in (1, 2, 3):
        excluded = load_model(federation / "all", exclude=["memos"], active_experts=active)[0].logits(tokens)
        for directory in ("removed", "never"):
            other = load_model(federation / directory, active_experts=active)[0].logits(tokens)
            assert torch.equal(excluded, other)


def test_the_directories_are_equal_file_by_file(federation: Path) -> None:
    names = {path.name for path in (federation / "never").iterdir()}
    assert names == {path.name for path in (federation / "removed").iterdir()}
    for name in names:
        assert (federation / "never" / name).read_bytes() == (federation / "removed" / name).read_bytes(), name


@pytest.mark.parametrize("name", ["trunk.safetensors", "router.safetensors", "expert-notes.safetensors"])
def test_a_truncated_model_is_refused_before_the_output_is_claimed(
    name: str, road: Path, federation: Path, tmp_path: Path
) -> None:
    path = shutil.copytree(federation / "all", tmp_path / "all") / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{name} is truncated"):
        evaluate(road, tmp_path, "all", "evaluated")
    assert not (tmp_path / "evaluated").exists()


def test_nothing_of_the_removed_expert_is_left(federation: Path) -> None:
    """Searched by name, by hash, and by value: no run of eight of its weights is in any file."""
    record = json.loads((federation / "memos/contribution/contribution.json").read_text())
    hashes = [entry["sha256"] for entry in record["tensors"].values()] + [record["digest"].removeprefix("sha256:")]
    hashes += [file["sha256"] for file in record["files"]]
    content = (federation / "memos/contribution/expert.safetensors").read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    values = np.frombuffer(content[header:], np.float32)
    pieces = [values[start : start + 8].tobytes() for start in range(0, len(values) - 8, 97)]
    seen = 0
    for path in sorted((federation / "all").iterdir()):
        seen += sum(piece in path.read_bytes() for piece in pieces)
    assert seen == len(pieces), "the search itself finds what is there"
    for path in sorted((federation / "removed").iterdir()):
        data = path.read_bytes()
        assert "memos" not in path.name and b"memos" not in data, path
        assert not any(digest.encode() in data for digest in hashes), path
        assert not any(piece in data for piece in pieces), path


def test_removing_every_expert_but_the_public_one_leaves_the_public_model(road: Path, federation: Path) -> None:
    tokens = torch.randint(0, 300, (3, 16), generator=torch.Generator().manual_seed(0))
    alone = load_model(federation / "all", exclude=["letters", "memos", "notes"])[0]
    public = load_model(road / "public/model")[0]
    assert (alone.logits(tokens) - public.logits(tokens)).abs().max() <= 1e-6


@pytest.mark.parametrize("model", ["public", "all", "removed"])
def test_transformers_loads_it_whole_and_generates_the_same(
    model: str, road: Path, federation: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = road / "public/model" if model == "public" else federation / model
    theirs, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    tokenizer = AutoTokenizer.from_pretrained(directory)
    prompt = "dear sir the cat"
    run_stage("generate", [f"model={directory}", f"prompt={prompt}", "max_new_tokens=24"])
    ours = capsys.readouterr().out.removesuffix("\n")
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    wanted = theirs.generate(ids, max_new_tokens=24, do_sample=False)
    assert ours == tokenizer.decode(wanted[0], skip_special_tokens=False).removesuffix("<|endoftext|>")
