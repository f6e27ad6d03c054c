"""A contribution says what it is, and anything that is wrong with one reads as one line."""

import json
import math
import os
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from toy import train

from flexpert.checkpoint.digest import base_digest
from flexpert.checkpoint.directory import ModelDirectory
from flexpert.contribution.pack import pack
from flexpert.contribution.record import ExpertIdentity, expert_shapes
from flexpert.contribution.verify import check_against_base, read_contribution, verify
from flexpert.records import sha256_file

Refused = Callable[..., AbstractContextManager[None]]
Maker = Callable[..., Path]
Tensors = dict[str, torch.Tensor]
UP = "layers.1.up_proj.weight"


def edit_record(directory: Path, **changes: Any) -> None:
    path = directory / "contribution.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_what_is_packed_is_what_is_read(
    bias: bool, dtype: torch.dtype, shared_base: Path, make_contribution: Maker, tmp_path: Path
) -> None:
    directory = make_contribution(tmp_path / "math", shared_base, bias=bias, dtype=dtype)
    record = verify(directory)
    file = directory / "expert.safetensors"
    assert sorted(path.name for path in directory.iterdir()) == ["contribution.json", "expert.safetensors"]
    assert record.identity == ExpertIdentity("math", "Owner of MATH", "LicenseRef-math")
    assert record.base_digest == base_digest(shared_base)
    assert record.has_bias is bias
    assert record.dtype == {torch.float32: "F32", torch.bfloat16: "BF16"}[dtype]
    assert record.files[0].to_json() == {
        "name": file.name,
        "bytes": file.stat().st_size,
        "sha256": sha256_file(file),
    }
    loaded = load_file(file)
    assert {name: tuple(tensor.shape) for name, tensor in loaded.items() if name.startswith("layers.2.")} == {
        "layers.2.gate_proj.weight": (40, 24),
        "layers.2.up_proj.weight": (40, 24),
        "layers.2.down_proj.weight": (24, 40),
        "layers.2.router.weight": (24,),
    } | ({"layers.2.router.bias": (1,)} if bias else {})
    assert len(loaded) == 3 * (5 if bias else 4)
    assert len({tensor.flatten()[0].item() for tensor in loaded.values()}) == len(loaded)


def test_the_same_expert_packs_to_the_same_bytes(shared_base: Path, make_contribution: Maker, tmp_path: Path) -> None:
    first = make_contribution(tmp_path / "a" / "math", shared_base)
    second = make_contribution(tmp_path / "b" / "math", shared_base)
    for name in ("contribution.json", "expert.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_the_digest_ignores_how_tensors_are_spread_over_files(
    contribution: Path, shared_base: Path, forge_contribution: Maker, tmp_path: Path
) -> None:
    tensors = load_file(contribution / "expert.safetensors")
    identity = {"id": "math", "title": "Owner of MATH", "license": "LicenseRef-math"}
    directory = forge_contribution(tmp_path / "spread", shared_base, tensors, **identity)
    files = []
    for index, names in enumerate((list(tensors)[:5], list(tensors)[5:])):
        path = directory / f"part-{index}.safetensors"
        save_file({name: tensors[name] for name in names}, path)
        files.append({"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_file(path)})
    edit_record(directory, files=files)
    (directory / "expert.safetensors").unlink()
    assert verify(directory).digest == read_contribution(contribution).digest


@pytest.mark.parametrize("bias", [False, True])
def test_every_number_that_leaves_the_owner_is_in_the_list(
    bias: bool, shared_base: Path, make_contribution: Maker, tmp_path: Path
) -> None:
    directory = make_contribution(tmp_path / "math", shared_base, bias=bias)
    contents = json.loads((directory / "contribution.json").read_text())["contents"]
    assert {line.split(":")[0] for line in contents} == {path.name for path in directory.iterdir()}
    listed = 0
    for line in contents:
        if factors := re.search(r"(\d+(?: x \d+)*) numbers", line):
            listed += math.prod(map(int, factors[1].split(" x ")))
    assert listed == sum(tensor.numel() for tensor in load_file(directory / "expert.safetensors").values())


STARTS = {
    "stream": (
        ["router.init=discriminant", "router.bias=true"],
        {"bias": True, "init": "discriminant", "embedding": "stream", "projection": "none", "documents": 8}
        | {"public_text": True},
        "started from means over 8 of the owner's documents",
    ),
    "file": (
        ["router.embedding=secret.npy", "router.public_embedding=secret.npy", "router.projection=random"],
        {"bias": False, "init": "mean", "embedding": "file", "projection": "random", "documents": None}
        | {"public_text": False},
        "started from a vector that the owner gave",
    ),
    "random": (
        ["router.init=random"],
        {"bias": False, "init": "random", "embedding": None, "projection": "none", "documents": None}
        | {"public_text": False},
        "started as: random",
    ),
}


@pytest.mark.parametrize("kind", STARTS)
def test_a_contribution_says_how_its_rows_started_and_names_no_path(
    kind: str, road: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, facts, words = STARTS[kind]
    monkeypatch.chdir(tmp_path)
    np.save("secret.npy", np.arange(7.0))
    data = [f"base={road}/public/model", f"data.dir={road}/data/letters", f"public_data={road}/data/public"]
    training = ["router.documents=8", "router.init=mean", "train.steps=2", "output_dir=run"]
    given = {setting.split("=")[0] for setting in settings}
    defaults = [setting for setting in training if setting.split("=")[0] not in given]
    train("expert", *data, *defaults, *settings, "name=letters")
    text = (tmp_path / "run/contribution/contribution.json").read_text()
    record = json.loads(text)
    assert record["router"] == facts
    assert any(words in line for line in record["contents"])
    assert record["contents"][-1].endswith("of the training: steps, tokens, public_share, calibration_steps")
    for private in ("secret", str(road), str(tmp_path), "letters_texts", "data/letters"):
        assert private not in text


@pytest.mark.parametrize("expert_id", ["public", "", "Math", "1math", "-math", "ma th", "../math", "math\n", "a" * 65])
def test_an_invalid_id_is_refused_when_packing_and_when_reading(
    expert_id: str,
    contribution: Path,
    shared_base: Path,
    forge_contribution: Maker,
    expert_tensors: Tensors,
    tmp_path: Path,
    refused: Refused,
) -> None:
    with refused("id", repr(expert_id)):
        pack(
            tmp_path / "packed",
            tensors=expert_tensors,
            identity=ExpertIdentity(expert_id, "Title"),
            base_digest=base_digest(shared_base),
            architecture=ModelDirectory.open(shared_base).architecture,
            router={"bias": False, "init": "zero"},
            training={},
        )
    assert not (tmp_path / "packed").exists()
    directory = forge_contribution(tmp_path / "forged", shared_base, expert_tensors, id=expert_id)
    with refused("id", repr(expert_id)):
        read_contribution(directory)


def test_a_title_of_two_lines_is_refused(
    shared_base: Path, forge_contribution: Maker, expert_tensors: Tensors, tmp_path: Path, refused: Refused
) -> None:
    directory = forge_contribution(tmp_path / "math", shared_base, expert_tensors, title="two\nlines \x1b[2J")
    with refused(directory, "title"):
        read_contribution(directory)


def test_an_expert_that_diverged_is_not_packed(
    shared_base: Path, make_contribution: Maker, expert_tensors: Tensors, tmp_path: Path, refused: Refused
) -> None:
    expert_tensors[UP][3, 4] = float("inf")
    with refused("math", UP, "NaN or infinity"):
        make_contribution(tmp_path / "math", shared_base, tensors=expert_tensors)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_directory_is_not_packed_into(
    contribution: Path, shared_base: Path, make_contribution: Maker, refused: Refused
) -> None:
    with refused(contribution, "exists"):
        make_contribution(contribution, shared_base)


def test_packing_asks_for_one_tensor_at_a_time(
    shared_base: Path, make_contribution: Maker, expert_tensors: Tensors, tmp_path: Path
) -> None:
    class Gathered(dict[str, torch.Tensor]):
        asked: list[str]

        def __getitem__(self, name: str) -> torch.Tensor:
            self.asked.append(name)
            return super().__getitem__(name)

    tensors = Gathered(expert_tensors)
    tensors.asked = []
    make_contribution(tmp_path / "math", shared_base, tensors=tensors)
    assert tensors.asked[1:] == list(expert_tensors)


def test_tensors_of_the_wrong_kind_fail_when_packing(
    shared_base: Path, make_contribution: Maker, expert_tensors: Tensors, tmp_path: Path
) -> None:
    up = expert_tensors[UP]
    for change in ({UP: up.T}, {UP: up.bfloat16()}, {"model.norm.weight": torch.ones(24)}):
        with pytest.raises(AssertionError):
            make_contribution(tmp_path / "math", shared_base, tensors=expert_tensors | change)
    assert list(tmp_path.iterdir()) == []


def without(tensors: Tensors, name: str) -> Tensors:
    return {key: tensor for key, tensor in tensors.items() if key != name}


FORGERIES: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "missing": (lambda tensors: without(tensors, UP), "is missing"),
    "extra": (lambda tensors: tensors | {"model.norm.weight": torch.ones(24)}, "not part of a contribution"),
    "extra layer": (lambda tensors: tensors | {"layers.3.up_proj.weight": tensors[UP] + 1}, "not part"),
    "misshapen": (lambda tensors: tensors | {UP: tensors[UP].T.contiguous()}, "[24, 40], not [40, 24]"),
    "wrong dtype": (lambda tensors: tensors | {UP: tensors[UP].bfloat16()}, "the dtype BF16, not F32"),
    "bias that is not declared": (lambda tensors: tensors | {"layers.0.router.bias": torch.ones(1)}, "not part"),
}


@pytest.mark.parametrize("fault", FORGERIES)
def test_a_wrong_tensor_is_refused_by_name(
    fault: str,
    shared_base: Path,
    forge_contribution: Maker,
    expert_tensors: Tensors,
    contribution: Path,
    tmp_path: Path,
    refused: Refused,
) -> None:
    forge, message = FORGERIES[fault]
    tensors = forge(expert_tensors)
    changed = [name for name in expert_tensors | tensors if tensors.get(name) is not expert_tensors.get(name)]
    directory = forge_contribution(tmp_path / "forged", shared_base, tensors)
    with refused(directory, repr(changed[0]), message):
        read_contribution(directory)
    # The record of a good contribution does not help.
    record = json.loads((contribution / "contribution.json").read_text())
    file = json.loads((directory / "contribution.json").read_text())["files"]
    edit_record(directory, **record | {"files": file})
    with refused(directory, repr(changed[0]), message):
        verify(directory)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_are_refused_by_name(
    value: float,
    shared_base: Path,
    forge_contribution: Maker,
    expert_tensors: Tensors,
    tmp_path: Path,
    refused: Refused,
) -> None:
    expert_tensors[UP][-1, -1] = value
    directory = forge_contribution(tmp_path / "math", shared_base, expert_tensors)
    with refused(directory, UP, "NaN or infinity"):
        verify(directory)


def test_every_flipped_byte_is_noticed(contribution: Path, refused: Refused) -> None:
    path = contribution / "expert.safetensors"
    data = path.read_bytes()
    header_bytes = 8 + int.from_bytes(data[:8], "little")
    for place in (header_bytes, header_bytes + 5000, len(data) - 4):  # the lowest byte of a value: it stays finite
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with refused(path, "altered", "layers."):
            verify(contribution)
    path.write_bytes(data)
    verify(contribution)


def test_an_altered_header_is_noticed(contribution: Path, refused: Refused) -> None:
    path = contribution / "expert.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"format":"pt"', b'"format":"xx"'))
    with refused(path, "altered"):
        verify(contribution)


def test_an_altered_record_is_noticed(contribution: Path, refused: Refused) -> None:
    record = json.loads((contribution / "contribution.json").read_text())
    other = "sha256:" + "0" * 64
    tensors = record["tensors"] | {UP: record["tensors"][UP] | {"sha256": "0" * 64}}
    changes: list[dict[str, Any]] = [
        {"id": "news"},
        {"title": "Another owner"},
        {"license": None},
        {"base_digest": other},
        {"architecture": record["architecture"] | {"rope_theta": 1.5}},
        {"tensors": tensors},
        {"digest": other},
    ]
    for change in changes:
        edit_record(contribution, **change)
        with refused(contribution / "contribution.json", "altered"):
            read_contribution(contribution)
        edit_record(contribution, **record)
    read_contribution(contribution)


SHAPE = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 3e-5,
    "rope_theta": 1234.0,
}
RECORD = json.loads('{"sha256": "%s", "name": "expert.safetensors", "bytes": 1}' % ("0" * 64))


@pytest.mark.parametrize(
    "change",
    [
        {"id": 7},
        {"title": None},
        {"license": 3},
        {"base_digest": "sha256:xyz"},
        {"architecture": {"hidden_size": 24, "num_hidden_layers": 3, "intermediate_size": 40}},
        {"architecture": SHAPE | {"num_hidden_layers": True}},
        {"architecture": SHAPE | {"num_hidden_layers": 10**12}},
        {"architecture": SHAPE | {"num_hidden_layers": 0}},
        {"architecture": SHAPE | {"rope_theta": "large"}},
        {"dtype": "I8"},
        {"router": {"bias": "no", "init": "zero"}},
        {"training": []},
        {"files": {}},
        {"files": ["expert.safetensors"]},
        {"files": [RECORD, RECORD]},
        {"files": [RECORD | {"sha256": "short"}]},
        {"tensors": []},
        {"tensors": {UP: 3}},
        {"tensors": {UP: {"dtype": "F32", "shape": [1], "sha256": None}}},
        {"digest": None},
        {"kind": "flexpert.assembly"},
        {"schema_version": 1},
        {"schema_version": 3},
    ],
    ids=lambda change: re.sub(r"\W+", "-", str(change))[:50],
)
def test_a_malformed_record_is_refused(change: dict[str, Any], contribution: Path, refused: Refused) -> None:
    edit_record(contribution, **change)
    with refused(contribution / "contribution.json"):
        read_contribution(contribution)


@pytest.mark.parametrize(
    "name", ["../expert.safetensors", "/etc/passwd", "sub/expert.safetensors", "..", "", "a\\b", "a\nb"]
)
def test_a_file_outside_the_directory_is_refused(name: str, contribution: Path, refused: Refused) -> None:
    edit_record(contribution, files=[RECORD | {"name": name}])
    with refused(contribution / "contribution.json", repr(name)):
        read_contribution(contribution)


@pytest.mark.parametrize("name", ["expert.safetensors", "contribution.json"])
def test_a_link_is_refused(name: str, contribution: Path, tmp_path: Path, refused: Refused) -> None:
    os.rename(contribution / name, tmp_path / name)
    (contribution / name).symlink_to(tmp_path / name)
    with refused(contribution / name, "link"):
        read_contribution(contribution)


def test_a_missing_or_shorter_file_is_refused(contribution: Path, tmp_path: Path, refused: Refused) -> None:
    path = contribution / "expert.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with refused(path, "bytes"):
        read_contribution(contribution)
    path.unlink()
    with refused(path, "missing"):
        read_contribution(contribution)
    with refused(tmp_path / "absent", "does not exist"):
        read_contribution(tmp_path / "absent")


def test_a_contribution_for_another_base_is_refused(
    contribution: Path, base: Path, make_base: Maker, make_contribution: Maker, tmp_path: Path, refused: Refused
) -> None:
    record = read_contribution(contribution)
    model = ModelDirectory.open(base)
    check_against_base(record, model, base_digest(base))
    with refused(contribution, "expert math", "another base"):
        check_against_base(record, model, "sha256:" + "0" * 64)
    half = ModelDirectory.open(make_base(tmp_path / "half", dtype=torch.bfloat16))
    with refused(contribution, "is F32", "is BF16"):
        check_against_base(record, half)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", 8),
        ("num_hidden_layers", 1),
        ("intermediate_size", 16),
        ("num_attention_heads", 2),
        ("num_key_value_heads", 1),
        ("rms_norm_eps", 1e-6),
        ("rope_theta", 1e6),
    ],
)
def test_a_contribution_of_another_architecture_is_refused(
    field: str, value: float, shared_base: Path, tmp_path: Path, refused: Refused
) -> None:
    model = ModelDirectory.open(shared_base)
    architecture = replace(model.architecture, **{field: value})
    directory = pack(
        tmp_path / "math",
        tensors={name: torch.ones(shape) for name, shape in expert_shapes(architecture, bias=False).items()},
        identity=ExpertIdentity("math", "Mathematics"),
        base_digest=base_digest(shared_base),
        architecture=architecture,
        router={"bias": False, "init": "zero"},
        training={},
    )
    with refused(directory, f"{field} {value}", shared_base, str(SHAPE[field])):
        check_against_base(verify(directory), model)
