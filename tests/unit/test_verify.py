"""`flexpert verify`: what is as it was written is described, anything else is one line and status 2."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flexpert.assembly.assemble import assemble
from flexpert.assembly.record import read_assembly
from flexpert.assembly.remove import remove
from flexpert.checkpoint.digest import base_digest
from flexpert.cli import main
from flexpert.records import read_record

Maker = Callable[..., Path]
Refused = Callable[..., AbstractContextManager[None]]
Fails = Callable[..., None]
IDS = ("news", "math")


@pytest.fixture
def model(shared_base: Path, contributions: dict[str, Path], tmp_path: Path) -> Path:
    assemble(shared_base, list(contributions.values()), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Fails:
    """`fails(overrides, part, …)`: verify must end with status 2 and one line that holds every part."""

    def check(overrides: list[str], *parts: object) -> None:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["verify", *overrides])
        out, error = capsys.readouterr()
        assert (ended.value.code, out, error.count("\n")) == (2, "", 1)
        assert all(str(part) in error for part in parts), error

    return check


def flip(path: Path, place: int = -4) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_a_contribution_is_described(contribution: Path, shared_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads((contribution / "contribution.json").read_text())
    before = {path: path.read_bytes() for path in contribution.iterdir()}
    main(["verify", f"contribution={contribution}"])
    out = capsys.readouterr().out
    size = f"{(contribution / 'expert.safetensors').stat().st_size:,} bytes"
    for part in ("math", "Owner of MATH", "LicenseRef-math", record["digest"], base_digest(shared_base), size,
                 "1 file and 12 tensors", "every number is finite", "not checked: its base"):  # fmt: skip
        assert part in out
    main(["verify", f"contribution={contribution}", f"base={shared_base}"])
    out = capsys.readouterr().out
    assert f"checked: {shared_base} is that base" in out and "not checked" not in out
    assert {path: path.read_bytes() for path in contribution.iterdir()} == before


def test_a_model_is_described(
    model: Path, contributions: dict[str, Path], shared_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["verify", f"model={model}"])
    out = capsys.readouterr().out
    for name, path in contributions.items():
        assert f"{name}: {json.loads((path / 'contribution.json').read_text())['digest']}" in out
    listed = read_assembly(model).files
    assert {path.name for path in model.iterdir()} - {file.name for file in listed} == {
        "config.json",
        "model.safetensors.index.json",
        "assembly.json",
    }
    for part in ("3 experts (public, news, math)", base_digest(shared_base), f"SHA-256 of {len(listed)} files",
                 "without a hash: assembly.json, config.json, model.safetensors.index.json\n"):  # fmt: skip
        assert part in out


def test_a_public_model_is_described_with_the_digest_that_contributions_name(
    shared_base: Path, make_base: Maker, contribution: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    digest = json.loads((contribution / "contribution.json").read_text())["base_digest"]
    sharded = make_base(tmp_path / "sharded", shard_size="20KB")
    for path in (shared_base, sharded):
        main(["verify", f"model={path}", f"digest={digest}"])
        out = capsys.readouterr().out
        for part in (f"{path} is a public model", f"  digest {digest}\n", "every number is finite", "F32",
                     "rope_theta 1,234.0", "checked: its digest is the one that was given"):  # fmt: skip
            assert part in out, out


def test_a_digest_that_was_told_must_be_the_one_that_is_there(
    contribution: Path, model: Path, shared_base: Path, tmp_path: Path, fails: Fails,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    output, wrong = tmp_path / "new/verified.json", "sha256:" + "0" * 64
    for word in (f"contribution={contribution}", f"model={model}", f"model={shared_base}"):
        main(["verify", word])
        lines = capsys.readouterr().out.splitlines()
        digest = next(line for line in lines if line.startswith("  digest ")).removeprefix("  digest ")
        fails([word, f"digest={wrong}", f"output={output}"], word.partition("=")[2], digest, wrong)
        assert not output.parent.exists()
        main(["verify", word, f"digest={digest}"])
        assert "checked: its digest is the one that was given\n" in capsys.readouterr().out
        fails([word, f"digest={digest.upper()}"], "is no digest")


def test_what_was_verified_is_written(
    contribution: Path, model: Path, shared_base: Path, tmp_path: Path, fails: Fails
) -> None:
    base, output = base_digest(shared_base), tmp_path / "new/verified.json"
    record = json.loads((contribution / "contribution.json").read_text())
    weights = (contribution / "expert.safetensors").stat().st_size
    public = sum((shared_base / name).stat().st_size for name in ("model.safetensors", "tokenizer.json"))
    expected = {
        f"contribution={contribution}": ("math", record["digest"], base, 1, weights),
        f"model={shared_base}": ("public", base, base, 2, public),
    }
    for word, values in expected.items():
        main(["verify", word, f"output={output}"])
        found = read_record(output, "flexpert.verified")
        assert tuple(found[key] for key in ("id", "digest", "base_digest", "files", "bytes")) == values
    main(["verify", f"model={model}", f"output={output}"])
    found = read_record(output, "flexpert.verified")
    assert (found["id"], found["base_digest"]) == (None, base)
    assert found["bytes"] == sum(file.bytes for file in read_assembly(model).files)
    fails([f"model={model}", f"output={tmp_path}"], f"output={tmp_path} is a directory")
    fails([f"model={model}", f"output={output}/x.json"], f"output={output} cannot be written")


def test_the_digest_of_a_model_is_of_its_parts_and_their_order(
    model: Path, shared_base: Path, contributions: dict[str, Path], tmp_path: Path
) -> None:
    def digest(path: Path) -> str:
        main(["verify", f"model={path}", f"output={tmp_path}/verified.json"])
        return str(read_record(tmp_path / "verified.json", "flexpert.verified")["digest"])

    parts = list(contributions.values())
    assemble(shared_base, parts, tmp_path / "again")
    assemble(shared_base, parts[::-1], tmp_path / "reversed")
    assemble(shared_base, parts[:1], tmp_path / "fewer")
    digests = [digest(path) for path in (model, *(tmp_path / name for name in ("again", "reversed", "fewer")))]
    assert digests[0] == digests[1] and len(set(digests)) == 3


def test_another_k_is_told(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It may be changed by hand, and config.json has no hash."""
    main(["verify", f"model={model}"])
    assert "note" not in capsys.readouterr().out
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "num_experts_per_tok": 1}))
    main(["verify", f"model={model}"])
    assert "note: config.json has 1 experts active for a token, assembly.json 3\n" in capsys.readouterr().out


def test_it_needs_no_torch(model: Path, contribution: Path, shared_base: Path) -> None:
    program = (
        "import sys; from flexpert.cli import main\n"
        f"main(['verify', 'model={model}'])\n"
        f"main(['verify', 'contribution={contribution}', 'base={shared_base}'])\n"
        f"main(['verify', 'model={shared_base}'])\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def test_what_is_neither_is_refused(
    shared_base: Path, contribution: Path, model: Path, tmp_path: Path, fails: Fails
) -> None:
    mixture = shutil.copytree(model, tmp_path / "mixture")
    (mixture / "assembly.json").unlink()
    fails([f"model={mixture}"], mixture, "holds no assembly.json")
    fails([f"model={contribution}"], "is a contribution, not a model")
    fails([f"contribution={model}"], "is a model, not a contribution")
    fails([f"contribution={contribution}", f"base={model}"], f"base={model} is a mixture")
    fails([f"contribution={tmp_path}/absent"], "does not exist")


def test_another_base_is_named(contribution: Path, base: Path, make_base: Maker, tmp_path: Path, fails: Fails) -> None:
    flip(base / "model.safetensors")
    fails([f"contribution={contribution}", f"base={base}"], contribution, base, "another base")
    wide = make_base(tmp_path / "wide", intermediate_size=48)
    fails([f"contribution={contribution}", f"base={wide}"], contribution, wide, "intermediate_size")


def test_a_contribution_that_is_not_as_it_was_written_is_refused(
    contribution: Path, tmp_path: Path, fails: Fails
) -> None:
    path, record = contribution / "expert.safetensors", contribution / "contribution.json"
    for name, place in (("tensor", -4), ("file", 20)):
        shutil.copytree(contribution, tmp_path / name / "math")
        flip(tmp_path / name / "math" / path.name, place)
        fails([f"contribution={tmp_path}/{name}/math"], tmp_path / name / "math")
    content = json.loads(record.read_text())
    record.write_text(json.dumps(content | {"title": "Mine"}))
    fails([f"contribution={contribution}"], record, "altered")
    record.write_text(json.dumps(content))
    path.write_bytes(path.read_bytes()[:-4])
    fails([f"contribution={contribution}"], path, "bytes")
    path.unlink()
    fails([f"contribution={contribution}"], path, "missing")


def test_a_hash_that_the_tensors_do_not_cover_is_compared_too(contribution: Path, fails: Fails) -> None:
    record = contribution / "contribution.json"
    content = json.loads(record.read_text())  # the digest of a contribution does not depend on its files
    content["files"][0]["sha256"] = "0" * 64
    record.write_text(json.dumps(content))
    fails([f"contribution={contribution}"], contribution / "expert.safetensors", "altered")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_contribution_with_a_number_that_is_not_finite_is_refused(
    bad: float, shared_base: Path, forge_contribution: Maker, expert_tensors: dict[str, torch.Tensor], tmp_path: Path,
    fails: Fails,
) -> None:  # fmt: skip
    expert_tensors["layers.1.up_proj.weight"][3, 5] = bad
    forged = forge_contribution(tmp_path / "forged", shared_base, expert_tensors)
    fails([f"contribution={forged}"], forged, "'layers.1.up_proj.weight' holds NaN or infinity")


def test_a_public_model_with_a_number_that_is_not_finite_or_of_two_types_is_refused(base: Path, fails: Fails) -> None:
    path, name = base / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(path)
    save_file({**tensors, name: tensors[name].fill_(float("inf"))}, path)
    fails([f"model={base}"], path, name, "NaN or infinity")
    save_file({**tensors, name: torch.zeros_like(tensors[name], dtype=torch.bfloat16)}, path)
    fails([f"model={base}"], base, "BF16", "F32")


@pytest.mark.parametrize(
    "name",
    ["trunk.safetensors", "router.safetensors", "expert-math.safetensors", "tokenizer.json", "generation_config.json"],
)
def test_an_altered_or_missing_file_of_a_model_is_named(name: str, model: Path, fails: Fails) -> None:
    flip(model / name)
    fails([f"model={model}"], model / name, "altered")
    (model / name).unlink()
    fails([f"model={model}"], model / name if name.endswith("json") else model)


def test_a_config_or_index_that_does_not_fit_is_refused(model: Path, fails: Fails) -> None:
    path = model / "config.json"
    config = path.read_text()
    path.write_text(json.dumps(json.loads(config) | {"rms_norm_eps": 1e-6}))
    fails([f"model={model}"], path, "rms_norm_eps")
    path.write_text(config)
    path = model / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    files, name = index["weight_map"], "model.layers.1.mlp.experts.1.up_proj.weight"
    for changed in (files | {name: "expert-math.safetensors"}, {key: files[key] for key in files.keys() - {name}}):
        path.write_text(json.dumps(index | {"weight_map": changed}))
        fails([f"model={model}"], model, name)


def test_a_record_from_before_the_generation_config_was_listed_is_read_and_removal_lists_it(
    model: Path, shared_base: Path, contributions: dict[str, Path], tmp_path: Path
) -> None:
    record = json.loads((model / "assembly.json").read_text())
    del record["generation"]
    (model / "assembly.json").write_text(json.dumps(record))
    main(["verify", f"model={model}"])
    remove(model, ["news"], tmp_path / "removed")
    never = assemble(shared_base, [contributions["math"]], tmp_path / "never")
    assert never.generation is not None and read_assembly(tmp_path / "removed") == never


def test_an_altered_generation_config_is_not_copied(model: Path, tmp_path: Path, refused: Refused) -> None:
    path = model / "generation_config.json"
    flip(path)
    with refused(path, "altered"):
        remove(model, ["news"], tmp_path / "removed")
    assert not (tmp_path / "removed").exists()
