"""A data set prepared in shards is the same documents, read as one; a shard that is missing or unlike is named."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from corpus import content, json_lines, make_texts, make_tokenizer, manifest, prepare

from flexpert.data.dataset import TokenWindows, read_manifest
from flexpert.data.hashes import open_hashes
from flexpert.data.indexed import IndexedTokens
from flexpert.data.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

TEXTS = make_texts(210)
NUM_SHARDS = 3


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "bpe")


@pytest.fixture(scope="module")
def settings(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Seven files of thirty documents."""
    path = tmp_path_factory.mktemp("in")
    for index in range(7):
        (path / f"{index}.jsonl").write_bytes(json_lines(TEXTS[30 * index : 30 * (index + 1)], prompt="Go on: "))
    return [f"data.documents={path}/*.jsonl", f"tokenizer={tokenizer.directory}", "valid_fraction=0.2",
            "data.prompt_field=prompt"]  # fmt: skip


def prepare_shards(output: Path, settings: list[str], *parts: int) -> Path:
    for part in parts:
        prepare(output, *settings, f"shard={part}/{NUM_SHARDS}")
    return output


@pytest.fixture(scope="module")
def whole(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("whole") / "data", *settings)


@pytest.fixture(scope="module")
def merged(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = prepare_shards(tmp_path_factory.mktemp("merged") / "data", settings, 2, 0, 1)
    return prepare(output, "merge=true")


def test_the_shards_hold_the_documents_of_the_whole_dealt_out(merged: Path, whole: Path) -> None:
    for split in ("train", "valid"):
        assert sorted(content(merged, split)) == sorted(content(whole, split))
    files = [TEXTS[30 * index : 30 * (index + 1)] for index in range(7)]
    dealt = [f"Go on: {text}" for part in range(NUM_SHARDS) for file in files[part::NUM_SHARDS] for text in file]
    train = content(merged, "train")
    assert train == [text for text in dealt if text in set(train)]


def test_the_manifest_of_shards_counts_and_lists_them(merged: Path, whole: Path) -> None:
    ours, theirs = manifest(merged), manifest(whole)
    for split in ("train", "valid"):
        entry = ours["splits"][split]
        assert all(entry[key] == theirs["splits"][split][key] for key in ("documents", "tokens", "bytes"))
        assert [part["prefix"] for part in entry["parts"]] == [f"shards/{part}-of-3/{split}" for part in range(3)]
        assert set(entry["files"]) == {
            f"shards/{part}-of-3/{name}" for part in range(3) for name in theirs["splits"][split]["files"]
        }
    assert read_manifest(merged).tokenizer_digest == read_manifest(whole).tokenizer_digest
    assert not (merged / "train.bin").exists()


def test_hashes_of_shards_are_those_of_the_whole(merged: Path, whole: Path) -> None:
    for split in ("train", "valid"):
        ours, theirs = open_hashes(merged, split), open_hashes(whole, split)
        assert ours is not None
        assert theirs is not None
        assert (len(ours), len(theirs)) == (NUM_SHARDS, 1)
        assert np.array_equal(np.sort(np.concatenate(ours)), theirs[0])


def test_windows_of_shards_are_each_shards_windows_end_to_end(merged: Path) -> None:
    length = 16
    windows = TokenWindows(merged, "train", length, seed=3, loss_mask=True)
    parts = [TokenWindows(merged / f"shards/{part}-of-3", "train", length, 3, True) for part in range(3)]
    assert windows.num_sequences == sum(part.num_sequences for part in parts)
    expected = np.concatenate([[part.sequence(index) for index in range(part.num_sequences)] for part in parts])
    assert (expected < 0).any()
    assert np.array_equal([windows.sequence(index) for index in range(windows.num_sequences)], expected)
    epoch = windows.sequences(0, windows.num_sequences)
    assert torch.equal(epoch.sort(0).values, torch.from_numpy(expected).sort(0).values)


def test_one_shard_of_one_is_the_plain_data_set(settings: list[str], whole: Path, tmp_path: Path) -> None:
    output = prepare(tmp_path / "data", *settings, "shard=0/1")
    for name in ("train.bin", "train.idx", "valid.bin", "valid.idx", "train.mask.bin"):
        assert (output / "shards/0-of-1" / name).read_bytes() == (whole / name).read_bytes()
    prepare(output, "merge=true")
    assert content(output, "train") == content(whole, "train")


def test_a_merge_that_is_done_is_complete(merged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (merged / "manifest.json").stat().st_mtime_ns
    prepare(merged, "merge=true")
    assert capsys.readouterr().out == f"{merged} is complete\n"
    assert (merged / "manifest.json").stat().st_mtime_ns == before


def refused(capsys: pytest.CaptureFixture[str], output: Path, *overrides: str) -> str:
    with pytest.raises(SystemExit) as ended:
        prepare(output, *overrides)
    line = capsys.readouterr().err
    assert (ended.value.code, line.count("\n")) == (2, 1)
    return line


def test_a_missing_shard_is_named(settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"{tmp_path}/data/shards holds no shard" in refused(capsys, tmp_path / "data", "merge=true")
    output = prepare_shards(tmp_path / "data", settings, 0, 2)
    line = refused(capsys, output, "merge=true")
    assert f"{output}/shards/1-of-3 is missing: run `flexpert prepare shard=1/3`" in line
    assert sorted(path.name for path in output.iterdir()) == ["shards"]


def test_shards_of_other_settings_are_named(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = prepare_shards(tmp_path / "data", settings, 0, 1)
    prepare(output, *settings, "shard=2/3", "valid_fraction=0.3", "parallel.num_workers=0")
    line = refused(capsys, output, "merge=true")
    assert f"valid_fraction of {output}/shards/2-of-3 was 0.3, and of 0-of-3 0.2" in line
    assert not (output / "manifest.json").exists()
    prepare(output, *settings, "shard=0/2")
    assert "shards holds parts of 2 and of 3" in refused(capsys, output, "merge=true")


def test_a_shard_with_another_tokenizer_is_named(
    settings: list[str], tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same path, and something else in it."""
    shutil.copytree(tokenizer.directory, tmp_path / "bpe")
    own = [*settings, f"tokenizer={tmp_path}/bpe"]
    output = prepare_shards(tmp_path / "data", own, 0, 1)
    shutil.rmtree(tmp_path / "bpe")
    make_tokenizer(tmp_path / "bpe", 270)
    prepare_shards(output, own, 2)
    assert f"{output}/shards/2-of-3 has another tokenizer" in refused(capsys, output, "merge=true")


@pytest.mark.parametrize("deduplicate", [True, False])
def test_texts_in_several_shards_are_counted_where_copies_were_to_go(
    deduplicate: bool, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three files of twenty documents, of which five are in all of them and two more in two; one twice in its file."""
    for index in range(3):
        own = TEXTS[30 * index : 30 * index + 20 - 5]
        more = [*TEXTS[200:205], *(TEXTS[205:207] if index else []), own[0]]
        (tmp_path / f"{index}.jsonl").write_bytes(json_lines([*own, *more]))
    given = [f"data.documents={tmp_path}/*.jsonl", f"tokenizer={tokenizer.directory}", "valid_fraction=0.3"]
    output = prepare_shards(tmp_path / "data", [*given, f"data.deduplicate={deduplicate}"], 0, 1, 2)
    capsys.readouterr()
    prepare(output, "merge=true")
    note = "note: 7 texts are in more than one shard, apart from case and blanks, and stay: data.deduplicate compares"
    assert (note in capsys.readouterr().out) == deduplicate


def test_a_shard_that_was_dealt_from_other_files_is_named(
    tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that appears between two jobs moves those after it to other shards: some are there twice, some never."""
    (tmp_path / "secret").mkdir()
    for index in range(7):
        (tmp_path / f"secret/{index}.jsonl").write_bytes(json_lines(TEXTS[30 * index : 30 * (index + 1)]))
    given = [f"data.documents={tmp_path}/secret/*.jsonl", f"tokenizer={tokenizer.directory}", "valid_fraction=0.2"]
    output = prepare_shards(tmp_path / "data", given, 1, 2)
    late = tmp_path / "secret/00.jsonl"
    late.write_bytes(json_lines(["late"]))
    prepare_shards(output, given, 0)
    line = refused(capsys, output, "merge=true")
    assert f"{output}/shards/0-of-3 was dealt from other files than 1-of-3 (8 files matched data.documents" in line
    assert "remove 0-of-3 and prepare it again" in line
    assert not (output / "manifest.json").exists()
    assert "secret" not in (output / "shards/0-of-3/manifest.json").read_text()
    late.unlink()
    shutil.rmtree(output / "shards/0-of-3")
    (tmp_path / "secret/3.jsonl").write_bytes(json_lines(TEXTS[:1]))  # as many files, of which one is another
    prepare_shards(output, given, 0)
    assert "shards/0-of-3 was dealt from other files" in refused(capsys, output, "merge=true")
    (tmp_path / "secret/3.jsonl").write_bytes(json_lines(TEXTS[90:120]))
    shutil.rmtree(output / "shards/0-of-3")
    prepare(prepare_shards(output, given, 0), "merge=true")
    assert sorted(content(output, "train") + content(output, "valid")) == sorted(TEXTS)


def test_a_shard_with_another_end_of_text_is_named(
    settings: list[str], tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tokenizer.directory, tmp_path / "bpe")
    own = [*settings, f"tokenizer={tmp_path}/bpe"]
    output = prepare_shards(tmp_path / "data", own, 0, 1)
    settings_file = tmp_path / "bpe/tokenizer_config.json"
    settings_file.write_text(settings_file.read_text().replace("<|endoftext|>", "<|pad|>"))
    prepare_shards(output, own, 2)
    assert f"{output}/shards/2-of-3 has another tokenizer" in refused(capsys, output, "merge=true")


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["shard=3/3"], "shard=3/3 must be i/n with 0 ≤ i < n"),
        (["shard=1"], "shard=1 must be i/n"),
        (["shard=-1/3"], "shard=-1/3 must be i/n"),
        (["shard=0/8"], "matches 7 files, too few for 8 shards"),
        (["shard=0/2", "data.documents=demo:math"], "deals out files, and data.documents=demo:math has none"),
        (["shard=0/2", "tokenizer=null", "train_tokenizer.vocab_size=300"], "tokenizer=DIR"),
        (["shard=0/2", "merge=true"], "leave out shard"),
    ],
)
def test_a_shard_that_cannot_be_is_refused(
    overrides: list[str], part: str, settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert part in refused(capsys, tmp_path / "data", *settings, *overrides)


def test_a_shard_does_not_go_into_a_whole_data_set(
    settings: list[str], whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"{whole} is a complete data set" in refused(capsys, whole, *settings, "shard=0/3")


def test_a_shards_file_that_is_gone_is_named(merged: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(merged, tmp_path / "copy"))
    (copy / "shards/1-of-3/train.bin").unlink()
    with pytest.raises(ValueError, match=r"shards/1-of-3/train\.bin does not exist"):
        IndexedTokens(copy / "train")


def test_a_refused_shard_leaves_no_directory(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for wrong in ("shard=9/1000",):
        refused(capsys, tmp_path / "new/set", "shard=0/2", *settings, wrong)
        assert not list(tmp_path.iterdir())


def test_a_data_set_that_is_not_of_shards_is_not_merged(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "was not prepared in shards" in refused(capsys, whole, "merge=true")
