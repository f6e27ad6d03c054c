"""Windows over tokens: content, order, and that the order is a function of (seed, step) alone."""

import itertools
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from flexpert.data.dataset import TokenWindows, document_ids, permuted, read_manifest
from flexpert.data.indexed import IndexedWriter
from flexpert.errors import UserError

LENGTH = 8
NUM_TOKENS = 37 * LENGTH + 5  # 37 whole sequences and a rest


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set whose token i has the id i, in documents of uneven length."""
    path = tmp_path_factory.mktemp("data")
    with IndexedWriter(path / "train", np.uint16) as writer:
        start = 0
        for size in itertools.cycle([1, 17, 3, 50]):
            writer.add(list(range(start, min(start + size, NUM_TOKENS))))
            start += size
            if start >= NUM_TOKENS:
                break
    return path


def windows(directory: Path, seed: int = 0, length: int = LENGTH) -> TokenWindows:
    return TokenWindows(directory, "train", length, seed)


def order(directory: Path, start: int, count: int, seed: int = 0) -> list[int]:
    """Index of the sequence at each position of the stream."""
    first = windows(directory, seed).sequences(start, count)[:, 0]
    assert not (first % LENGTH).any()
    return (first // LENGTH).tolist()


@pytest.mark.parametrize("size", [*range(1, 70), 127, 128, 129, 255, 256, 257, 1000, 4095, 4096, 4097, 100_003])
def test_permuted_is_a_permutation_of_every_size(size: int) -> None:
    result = permuted(np.arange(size), size, seed=3, epoch=1)
    assert np.array_equal(np.sort(result), np.arange(size))


def test_a_permutation_of_a_billion_is_evaluated_in_little_memory() -> None:
    size = 10**9
    positions = np.concatenate([np.arange(100_000), np.arange(size - 100_000, size)])
    tracemalloc.start()
    result = permuted(positions, size, seed=0, epoch=0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100 * positions.nbytes
    assert len(np.unique(result)) == len(positions)
    assert result.min() >= 0
    assert result.max() < size
    assert abs(result.mean() / size - 0.5) < 0.01
    tenths = np.bincount(result * 10 // size, minlength=10)
    assert (abs(tenths - len(result) / 10) < 1000).all()  # seven standard deviations


def test_a_permutation_can_be_asked_for_in_any_pieces() -> None:
    whole = permuted(np.arange(1000), 1000, seed=1, epoch=2)
    for position in (0, 1, 500, 999):
        assert permuted(np.array([position]), 1000, seed=1, epoch=2).tolist() == [whole[position]]
    assert permuted(np.arange(0), 1000, seed=1, epoch=2).tolist() == []


def test_neighbours_do_not_stay_neighbours() -> None:
    result = permuted(np.arange(10_000), 10_000, seed=0, epoch=0)
    assert abs(np.corrcoef(result, np.arange(10_000))[0, 1]) < 0.05
    assert abs(np.corrcoef(result[:-1], result[1:])[0, 1]) < 0.05
    assert (result == np.arange(10_000)).sum() < 10


def test_each_epoch_visits_every_sequence_once(directory: Path) -> None:
    for epoch in range(4):
        assert sorted(order(directory, epoch * 37, 37)) == list(range(37))


def test_epochs_and_seeds_differ_in_their_order(directory: Path) -> None:
    orders = [order(directory, epoch * 37, 37, seed) for epoch in range(3) for seed in range(3)]
    assert len({tuple(one) for one in orders}) == 9


def test_the_order_is_a_function_of_seed_and_position_alone(directory: Path, tmp_path: Path) -> None:
    """Neither what was read before nor the global random state nor where the files are counts."""
    expected = windows(directory, seed=5).sequences(20, 30)
    source = windows(directory, seed=5)
    source.sequences(0, 13)
    torch.manual_seed(1)
    np.random.seed(1)
    assert torch.equal(source.sequences(20, 30), expected)
    copy = Path(shutil.copytree(directory, tmp_path / "copy"))
    assert torch.equal(windows(copy, seed=5).sequences(20, 30), expected)


def test_the_order_does_not_change_between_versions() -> None:
    """Runs that were begun must go on in the same order: these values may not change."""
    assert permuted(np.arange(8), 37, seed=0, epoch=0).tolist() == [7, 15, 28, 32, 35, 20, 6, 33]


@pytest.mark.parametrize("pieces", [[1] * 90, [7, 30, 3, 50], [37, 37, 16], [90]])
def test_reading_in_pieces_is_reading_at_once(pieces: list[int], directory: Path) -> None:
    source = windows(directory)
    starts = np.concatenate([[0], np.cumsum(pieces)[:-1]])
    parts = [source.sequences(int(start), size) for start, size in zip(starts, pieces, strict=True)]
    assert torch.equal(torch.cat(parts), source.sequences(0, 90))


def test_a_sequence_is_a_piece_of_the_stream_and_its_targets_are_one_later(directory: Path) -> None:
    rows = windows(directory).sequences(0, 37)
    assert rows.shape == (37, LENGTH + 1)
    assert rows.dtype == torch.int64
    assert torch.equal(rows, rows[:, :1] + torch.arange(LENGTH + 1))
    assert torch.equal(rows[:, 1:], rows[:, :-1] + 1)


def test_every_token_but_the_rest_is_an_input_once_an_epoch(directory: Path) -> None:
    inputs = windows(directory).sequences(0, 37)[:, :-1].flatten().sort().values
    assert torch.equal(inputs, torch.arange(37 * LENGTH))


@pytest.mark.parametrize(("tokens", "sequences"), [(LENGTH + 1, 1), (2 * LENGTH, 1), (2 * LENGTH + 1, 2)])
def test_a_sequence_needs_one_token_more_than_its_length(tokens: int, sequences: int, tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "train", np.uint16) as writer:
        writer.add(list(range(tokens)))
    source = windows(tmp_path)
    assert source.num_sequences == sequences
    assert source.sequences(0, sequences).max() == sequences * LENGTH


@pytest.mark.parametrize("tokens", [0, 1, LENGTH])
def test_too_little_data_is_the_users_to_know(tokens: int, tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "train", np.uint16) as writer:
        if tokens:
            writer.add(list(range(tokens)))
    with pytest.raises(UserError, match=rf"train\.bin holds {tokens} tokens.*train\.sequence_length={LENGTH}"):
        windows(tmp_path)


def test_documents_are_numbered_from_their_first_token() -> None:
    eos = 9
    tokens = torch.tensor([[1, 2, eos, 3, eos, eos, 4], [eos, 1, 1, 1, 1, 1, eos], [1, 1, 1, 1, 1, 1, 1]])
    assert document_ids(tokens, eos).tolist() == [[0, 0, 0, 1, 1, 2, 3], [0, 1, 1, 1, 1, 1, 1], [0] * 7]


def test_a_directory_that_is_no_data_set_is_the_users_to_know(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a data set.*flexpert prepare"):
        read_manifest(tmp_path)
