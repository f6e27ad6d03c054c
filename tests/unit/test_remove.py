"""Removal: the model that would have been assembled without the owner, and no trace of the owner."""

import itertools
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flexpert.assembly.assemble import assemble
from flexpert.assembly.record import read_assembly, select_experts
from flexpert.assembly.remove import remove

Refused = Callable[..., AbstractContextManager[None]]
Maker = Callable[..., Path]
IDS = ("news", "herald", "math")


@pytest.fixture
def model(shared_base: Path, contributions: dict[str, Path], tmp_path: Path) -> Path:
    assemble(shared_base, list(contributions.values()), tmp_path / "model")
    return tmp_path / "model"


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


SUBSETS = [subset for size in (1, 2, 3) for subset in itertools.combinations(IDS, size)]


@pytest.mark.parametrize("kind", ["contributions", "biased"])
@pytest.mark.parametrize("removed", SUBSETS, ids="+".join)
def test_removal_equals_assembly_without_them_byte_for_byte(
    removed: tuple[str, ...], kind: str, shared_base: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    contributions: dict[str, Path] = request.getfixturevalue(kind)
    for active in (None, 2):
        folder = tmp_path / str(active)
        assemble(shared_base, list(contributions.values()), folder / "model", active_experts=active)
        smaller = remove(folder / "model", list(removed), folder / "removed")
        rest = [path for name, path in contributions.items() if name not in removed]
        k = min(active or 4, 1 + len(rest))
        assert smaller == assemble(shared_base, rest, folder / "never", active_experts=k)
        assert content(folder / "removed") == content(folder / "never")


def test_removal_in_two_steps_equals_removal_in_one(model: Path, tmp_path: Path) -> None:
    remove(model, ["news"], tmp_path / "step")
    remove(tmp_path / "step", ["math"], tmp_path / "two")
    remove(model, ["math", "news"], tmp_path / "one")
    assert content(tmp_path / "two") == content(tmp_path / "one")


def test_removal_holds_where_indices_change_their_number_of_digits(
    shared_base: Path, make_contribution: Maker, tmp_path: Path
) -> None:
    many = [make_contribution(tmp_path / f"e{index}", shared_base, seed=index) for index in range(11)]
    assemble(shared_base, many, tmp_path / "model")
    remove(tmp_path / "model", ["e3"], tmp_path / "removed")
    assemble(shared_base, [path for path in many if path.name != "e3"], tmp_path / "never")
    assert content(tmp_path / "removed") == content(tmp_path / "never")


def traces(contribution: Path, expert_id: str, model: Path) -> dict[str, bytes]:
    """Byte strings that would give an expert away."""
    record = json.loads((contribution / "contribution.json").read_text())
    entry = next(expert for expert in read_assembly(model).experts if expert.id == expert_id)
    found = {
        "id": expert_id.encode(),
        "title": record["title"].encode(),
        "license": record["license"].encode(),
        "digest": record["digest"].removeprefix("sha256:").encode(),
        "file's hash": record["files"][0]["sha256"].encode(),
        "hash in the model": entry.files[0].sha256.encode(),
    }
    for name, tensor in load_file(contribution / "expert.safetensors").items():
        found[f"hash of {name}"] = record["tensors"][name]["sha256"].encode()
        for row, values in enumerate(tensor.reshape(-1, tensor.shape[-1])[:, :8]):
            found[f"{name} row {row}"] = values.contiguous().numpy().tobytes()
    return found


@pytest.mark.parametrize("kind", ["contributions", "biased"])
@pytest.mark.parametrize("record_removed", [False, True])
def test_no_trace_of_the_removed_expert_is_left(
    record_removed: bool, kind: str, shared_base: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    contributions: dict[str, Path] = request.getfixturevalue(kind)
    model, output = tmp_path / "model", tmp_path / "removed"
    assemble(shared_base, list(contributions.values()), model)
    remove(model, ["herald"], output, record_removed=record_removed)

    def everything(directory: Path) -> bytes:
        return b"".join(name.encode() + data for name, data in content(directory).items())

    wanted = traces(contributions["herald"], "herald", model)
    before, after = everything(model), everything(output)
    assert [name for name, data in wanted.items() if data in after] == []
    # The search finds what is there: everything but the hashes, of which a model holds only its own.
    missing = [name for name, data in wanted.items() if data not in before]
    assert all(name.startswith("hash of ") or name == "file's hash" for name in missing)
    still = traces(contributions["math"], "math", output)
    assert all(data in after for name, data in still.items() if " row " in name)


def test_the_number_of_removed_experts_is_kept_only_on_request(model: Path, tmp_path: Path) -> None:
    remove(model, ["news"], tmp_path / "silent")
    remove(model, ["news"], tmp_path / "told", record_removed=True)
    silent, told = content(tmp_path / "silent"), content(tmp_path / "told")
    plain, noted = json.loads(silent.pop("assembly.json")), json.loads(told.pop("assembly.json"))
    assert silent == told
    assert noted == plain | {"removed": 1}
    assert "removed" not in plain
    remove(tmp_path / "told", ["math"], tmp_path / "again", record_removed=True)
    assert read_assembly(tmp_path / "again").removed == 2


def test_the_public_expert_can_be_removed_too(model: Path, contributions: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    record = remove(model, ["public", "herald"], tmp_path / "removed")
    assert [expert.id for expert in record.experts] == ["news", "math"]
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "removed", output_loading_info=True)
    assert not any(info.values()), info
    for index, expert in enumerate(("news", "math")):
        own = load_file(contributions[expert] / "expert.safetensors")
        for layer in range(3):
            mlp = loaded.model.layers[layer].mlp
            gate, up = (own[f"layers.{layer}.{part}_proj.weight"] for part in ("gate", "up"))
            assert torch.equal(mlp.experts.gate_up_proj[index], torch.cat([gate, up]))
            assert torch.equal(mlp.experts.down_proj[index], own[f"layers.{layer}.down_proj.weight"])
            assert torch.equal(mlp.gate.weight[index], own[f"layers.{layer}.router.weight"])


def test_k_that_was_changed_by_hand_is_kept(model: Path, tmp_path: Path) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_experts_per_tok": 2}))
    assert remove(model, ["news"], tmp_path / "removed").active_experts == 2
    assert json.loads((tmp_path / "removed" / "config.json").read_text())["num_experts_per_tok"] == 2


def test_an_unknown_id_or_nothing_left_is_refused(model: Path, tmp_path: Path, refused: Refused) -> None:
    output = tmp_path / "removed"
    with refused("'sports'", "public, news, herald, math"):
        remove(model, ["news", "sports"], output)
    with refused("no expert would be left"):
        remove(model, ["public", *IDS], output)
    with refused("no expert to remove"):
        remove(model, [], output)
    with refused(tmp_path / "absent", "assembly.json"):
        remove(tmp_path / "absent", ["news"], output)
    assert not output.exists()


def test_select_experts_gives_the_indices_that_stay(refused: Refused) -> None:
    present = ["public", *IDS]
    assert select_experts(present, []) == [0, 1, 2, 3]
    assert select_experts(present, ["herald", "public", "herald"]) == [1, 3]
    with refused("'sports'", "public, news, herald, math"):
        select_experts(present, ["sports"])
    with refused("no expert would be left"):
        select_experts(present, present)


@pytest.mark.parametrize(
    "name",
    [
        "trunk.safetensors",
        "router.safetensors",
        "expert-public.safetensors",
        "expert-math.safetensors",
        "tokenizer.json",
    ],
)
def test_an_altered_or_missing_file_is_refused_and_nothing_is_left(
    name: str, model: Path, tmp_path: Path, refused: Refused
) -> None:
    path = model / name
    data = bytearray(path.read_bytes())
    data[-4] ^= 1
    path.write_bytes(data)
    with refused(path, "altered"):
        remove(model, ["news"], tmp_path / "removed")
    path.unlink()
    with refused(path):
        remove(model, ["news"], tmp_path / "removed")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_a_record_that_gives_an_expert_the_files_of_another_is_refused(
    model: Path, tmp_path: Path, refused: Refused
) -> None:
    """Herald's place, and so the names of its tensors, would become that of news, whose weights would stay."""
    path = model / "assembly.json"
    record = json.loads(path.read_text())
    _, news, herald, _ = record["experts"]
    news["files"], herald["files"] = herald["files"], news["files"]
    path.write_text(json.dumps(record))
    for expert, file in (("news", "expert-news.safetensors"), ("herald", "expert-herald.safetensors"), ("math", "")):
        with refused(model / file, "assemble the model again"):
            remove(model, [expert], tmp_path / "removed")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_a_tensor_in_two_files_of_the_model_is_refused(model: Path, tmp_path: Path, refused: Refused) -> None:
    path = model / "assembly.json"
    record = json.loads(path.read_text())
    record["trunk"].append(record["experts"][1]["files"][0] | {"name": "more.safetensors"})
    (model / "more.safetensors").write_bytes((model / "expert-news.safetensors").read_bytes())
    path.write_text(json.dumps(record))
    with refused(model, "more.safetensors", "expert-news.safetensors"):
        remove(model, ["math"], tmp_path / "removed")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_a_damaged_file_of_the_removed_expert_does_not_matter(model: Path, tmp_path: Path) -> None:
    (model / "expert-news.safetensors").unlink()
    assert len(remove(model, ["news"], tmp_path / "removed").experts) == 3


def test_a_config_that_disagrees_with_the_record_is_refused(model: Path, tmp_path: Path, refused: Refused) -> None:
    path = model / "config.json"
    config = json.loads(path.read_text())
    for change, part in (
        ({"num_experts": 3}, "disagree"),
        ({"model_type": "flex_olmo_biased"}, "disagree"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok=9"),
        ({"num_hidden_layers": 2}, "num_hidden_layers 3"),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps 3e-05"),
    ):
        path.write_text(json.dumps(config | change))
        with refused(model, part):
            remove(model, ["news"], tmp_path / "removed")


def test_a_record_that_points_outside_the_model_is_refused(model: Path, tmp_path: Path, refused: Refused) -> None:
    path = model / "assembly.json"
    record = json.loads(path.read_text())
    record["trunk"][0]["name"] = "../trunk.safetensors"
    path.write_text(json.dumps(record))
    with refused(path, "../trunk.safetensors"):
        remove(model, ["news"], tmp_path / "removed")
