"""How a router row starts, against independent computations: a loop over documents in fp64, NumPy."""

import copy
import json
import weakref
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from toy import write_data_sets

from flexpert.config.groups import ModelConfig, RouterConfig
from flexpert.data import embed, indexed
from flexpert.data.embed import RANDOM_STD, RIDGE, RouterStart, random_projection, router_start
from flexpert.data.indexed import IndexedTokens
from flexpert.data.tokenizer import train_tokenizer
from flexpert.errors import UserError
from flexpert.model.attention import rotary_tables
from flexpert.model.transformer import Transformer, build_on_meta, initialise
from flexpert.records import write_record

LAYERS, WIDTH, MAX_TOKENS = 3, 24, 13
Matrix = NDArray[np.float64]


class DataSets(NamedTuple):
    own: Path
    public: Path


@pytest.fixture(scope="module")
def model() -> Transformer:
    config = ModelConfig(
        hidden_size=WIDTH,
        num_layers=LAYERS,
        num_heads=4,
        num_kv_heads=2,
        intermediate_size=40,
        vocab_size=320,
        initializer_range=0.3,
    )
    model = build_on_meta(config).to_empty(device="cpu")
    initialise(model, seed=3)
    return model.eval()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataSets:
    """Texts of many lengths, some longer than `MAX_TOKENS` tokens, more than one batch; own and public differ."""
    root = tmp_path_factory.mktemp("data")
    words = {"own": ["seven", "plus", "eleven", "is", "18"], "public": ["rain", "in", "the", "is"]}
    write_data_sets(root, words)
    return DataSets(root / "own", root / "public")


def documents(directory: Path) -> list[NDArray[np.int64]]:
    source = IndexedTokens(directory / "train")
    return [source.document(index) for index in range(len(source))]


@torch.no_grad()
def streams(model: Transformer, document: NDArray[np.int64]) -> Matrix:
    """What every feed-forward layer reads, [L, S, D], of one document alone, without padding, in fp64."""
    exact = copy.deepcopy(model).double()
    tokens = torch.from_numpy(document[:MAX_TOKENS])[None]
    rotary = rotary_tables(model.config, torch.arange(tokens.shape[1]))
    x, read = exact.embedding(tokens), []
    for block in exact.blocks:
        stream = x + block.attention_norm(block.attention(x, rotary, None, None))  # type: ignore[operator,union-attr]
        read.append(stream[0].numpy())
        x = stream + block.feed_forward_norm(block.feed_forward(stream)[0])  # type: ignore[operator,union-attr]
    return np.stack(read)


@pytest.fixture(scope="module")
def read_streams(model: Transformer, data: DataSets) -> dict[str, list[Matrix]]:
    """Streams of every document of both data sets."""
    return {
        name: [streams(model, document) for document in documents(directory)]
        for name, directory in data._asdict().items()
    }


def start(
    model: Transformer, data: DataSets, seed: int = 0, name: str = "a", public: Path | None = None, **settings: object
) -> RouterStart:
    config = RouterConfig(**settings)  # type: ignore[arg-type]
    config.check()
    device = torch.device("cpu")
    public = public or data.public
    return router_start(config, model.config, lambda: model, data.own, public, MAX_TOKENS, seed, name, device)


def close(result: torch.Tensor, expected: Matrix, relative: float = 1e-4) -> None:
    assert result.dtype == torch.float32
    assert result.shape == expected.shape
    np.testing.assert_allclose(result.numpy(), expected, rtol=relative, atol=relative * np.abs(expected).max())


def document_mean(read: list[Matrix]) -> Matrix:
    """Mean over documents of each document's mean, [L, D]."""
    return np.mean([one.mean(1) for one in read], axis=0)


def test_mean_is_the_difference_of_the_mean_document_streams(
    model: Transformer, data: DataSets, read_streams: dict[str, list[Matrix]]
) -> None:
    result = start(model, data, init="mean")
    close(result.rows, document_mean(read_streams["own"]) - document_mean(read_streams["public"]))
    assert result.biases.tolist() == [0.0] * LAYERS


def test_unit_mean_is_the_difference_of_the_directions(
    model: Transformer, data: DataSets, read_streams: dict[str, list[Matrix]]
) -> None:
    means = [document_mean(read_streams[name]) for name in ("own", "public")]
    own, public = (mean / np.linalg.norm(mean, axis=1, keepdims=True) for mean in means)
    close(start(model, data, init="unit_mean").rows, own - public)


def test_a_sample_is_spread_over_the_data_set(
    model: Transformer, data: DataSets, read_streams: dict[str, list[Matrix]]
) -> None:
    chosen = [0, 11, 22, 33, 44]
    expected = [document_mean([read_streams[name][index] for index in chosen]) for name in ("own", "public")]
    close(start(model, data, init="mean", documents=5).rows, expected[0] - expected[1])


def test_asking_for_more_documents_than_there_are_takes_them_all(model: Transformer, data: DataSets) -> None:
    rows = [start(model, data, init="mean", documents=count).rows for count in (45, 1000)]
    assert torch.equal(rows[0], rows[1])


class Moments(NamedTuple):
    """Of one layer: both means [D], the public covariance with its ridge [D, D]."""

    own: Matrix
    public: Matrix
    scatter: Matrix


def moments_of(own: list[Matrix], public: list[Matrix]) -> list[Moments]:
    """Over all tokens, of every layer."""
    result = []
    for own_tokens, public_tokens in zip(np.concatenate(own, 1), np.concatenate(public, 1), strict=True):
        covariance = np.cov(public_tokens.T, bias=True)
        scatter = covariance + RIDGE * np.trace(covariance) / WIDTH * np.eye(WIDTH)
        result.append(Moments(own_tokens.mean(0), public_tokens.mean(0), scatter))
    return result


@pytest.fixture(scope="module")
def moments(read_streams: dict[str, list[Matrix]]) -> list[Moments]:
    return moments_of(read_streams["own"], read_streams["public"])


def test_discriminant_with_a_bias_is_the_classic_one_with_its_threshold_at_most_0(
    model: Transformer, data: DataSets, read_streams: dict[str, list[Matrix]]
) -> None:
    """Also with the roles changed, which changes the sign of every threshold."""
    own, public = read_streams["own"], read_streams["public"]
    signs = set()
    for sets, moments in (
        (data, moments_of(own, public)),
        (DataSets(data.public, data.own), moments_of(public, own)),
    ):
        result = start(model, sets, init="discriminant", bias=True)
        rows = np.stack([np.linalg.solve(one.scatter, one.own - one.public) for one in moments])
        close(result.rows, rows, relative=1e-3)
        thresholds = [-row @ (one.own + one.public) / 2 for row, one in zip(rows, moments, strict=True)]
        close(result.biases, np.minimum(thresholds, 0), relative=1e-3)
        signs |= {bool(threshold > 0) for threshold in thresholds}
    assert signs == {True, False}


def test_discriminant_without_a_bias_has_its_boundary_at_the_midpoint(
    model: Transformer, data: DataSets, moments: list[Moments]
) -> None:
    result = start(model, data, init="discriminant")
    assert result.biases.tolist() == [0.0] * LAYERS
    for row, one in zip(result.rows.double().numpy(), moments, strict=True):
        middle = (one.own + one.public) / 2
        assert abs(row @ middle) < 1e-4 * np.linalg.norm(row) * np.linalg.norm(middle)
        assert row @ one.own > 0 > row @ one.public


def test_discriminant_without_a_bias_separates_best_among_rows_through_the_midpoint(
    model: Transformer, data: DataSets, moments: list[Moments]
) -> None:
    """Fisher's ratio (r·δ)² / r'Sr of no other row with r·m = 0 is larger."""
    generator = np.random.default_rng(1)
    for row, one in zip(start(model, data, init="discriminant").rows.double().numpy(), moments, strict=True):
        delta, middle = one.own - one.public, (one.own + one.public) / 2

        def fisher(vector: Matrix, delta: Matrix = delta, scatter: Matrix = one.scatter) -> float:
            return float((vector @ delta) ** 2 / (vector @ scatter @ vector))

        for scale in (1e-2, 1e-1, 1.0, 10.0):
            for _ in range(50):
                other = row + scale * np.linalg.norm(row) * generator.normal(size=WIDTH)
                other -= (other @ middle) / (middle @ middle) * middle
                assert fisher(other) <= fisher(row) * (1 + 1e-4)


def test_a_data_set_against_itself_gives_a_row_of_zeros(model: Transformer, data: DataSets) -> None:
    for init in ("mean", "unit_mean", "discriminant"):
        rows = start(model, data, init=init, public=data.own).rows
        assert rows.abs().max() < 1e-5


def test_the_model_is_left_as_it_was(model: Transformer, data: DataSets) -> None:
    before = copy.deepcopy(model.state_dict())
    start(model, data, init="mean")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(block.feed_forward._forward_pre_hooks for block in model.blocks)  # type: ignore[union-attr]


def test_one_stream_is_held_at_a_time(model: Transformer, data: DataSets) -> None:
    """Watched by weak references, from hooks that run before those of the statistics."""
    held: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def count(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        nonlocal most
        held.append(weakref.ref(inputs[0]))
        most = max(most, sum(stream() is not None for stream in held))

    handles = [block.feed_forward.register_forward_pre_hook(count) for block in model.blocks]  # type: ignore[union-attr]
    start(model, data, init="mean")
    for handle in handles:
        handle.remove()
    assert len(held) == 2 * LAYERS * 3  # own and public, 45 documents in batches of 16
    assert most == 1


@pytest.mark.parametrize("init", ["random", "mean"])
def test_the_public_model_is_not_loaded_where_its_stream_is_not_read(
    init: str, model: Transformer, data: DataSets, tmp_path: Path
) -> None:
    np.save(tmp_path / "v.npy", np.ones(WIDTH))
    config = RouterConfig(init=init, embedding=str(tmp_path / "v.npy"), public_embedding=str(tmp_path / "v.npy"))

    def load() -> Transformer:
        raise AssertionError("the public model was loaded")

    device = torch.device("cpu")
    result = router_start(config, model.config, load, data.own, None, MAX_TOKENS, 0, "a", device)
    assert result.rows.shape == (LAYERS, WIDTH)
    with pytest.raises(AssertionError, match="was loaded"):
        router_start(RouterConfig(), model.config, load, data.own, data.public, MAX_TOKENS, 0, "a", device)


def test_random_differs_between_owners_of_one_seed(model: Transformer, data: DataSets) -> None:
    first, other = (start(model, data, 1, name, init="random").rows for name in ("a", "b"))
    assert not torch.equal(first, other)


def test_random_depends_on_the_seed_and_name_alone(model: Transformer, data: DataSets) -> None:
    first, again, other = (start(model, data, seed, init="random").rows for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.std().item() == pytest.approx(RANDOM_STD, rel=0.2)


@pytest.mark.parametrize("shape", [(WIDTH,), (LAYERS, WIDTH)])
@pytest.mark.parametrize("init", ["mean", "unit_mean"])
def test_vectors_from_files_are_subtracted(
    shape: tuple[int, ...], init: str, model: Transformer, data: DataSets, tmp_path: Path
) -> None:
    own, public = np.random.default_rng(2).normal(size=(2, *shape))
    np.save(tmp_path / "own.npy", own)
    np.save(tmp_path / "public.npy", public)
    vectors = {"embedding": str(tmp_path / "own.npy"), "public_embedding": str(tmp_path / "public.npy")}
    result = start(model, data, init=init, **vectors)
    if init == "unit_mean":
        own, public = (vector / np.linalg.norm(vector, axis=-1, keepdims=True) for vector in (own, public))
    close(result.rows, np.broadcast_to(own - public, (LAYERS, WIDTH)), relative=1e-6)


@pytest.mark.parametrize("shape", [(WIDTH + 1,), (LAYERS + 1, WIDTH), (1, 1, WIDTH), ()])
def test_a_vector_of_another_shape_is_refused(
    shape: tuple[int, ...], model: Transformer, data: DataSets, tmp_path: Path
) -> None:
    path = tmp_path / "v.npy"
    np.save(path, np.ones(shape))
    vectors = {"embedding": str(path), "public_embedding": str(path)}
    with pytest.raises(UserError, match=rf"v\.npy: .* shape .*width {WIDTH}.* or set router\.projection=random"):
        start(model, data, init="mean", **vectors)
    if shape != (WIDTH + 1,):
        with pytest.raises(UserError, match=rf"v\.npy: .* shape .*width {WIDTH}"):
            start(model, data, init="mean", projection="random", **vectors)


@pytest.mark.parametrize("source", [1, WIDTH - 7, WIDTH, 5 * WIDTH])
@pytest.mark.parametrize("init", ["mean", "unit_mean"])
@pytest.mark.parametrize("layers", [(), (LAYERS,)])
def test_vectors_of_another_width_are_projected(
    source: int, init: str, layers: tuple[int, ...], model: Transformer, data: DataSets, tmp_path: Path
) -> None:
    matrix = np.random.RandomState(0).normal(0, WIDTH**-0.5, (source, WIDTH))
    own, public = np.random.default_rng(2).normal(size=(2, *layers, source))
    np.save(tmp_path / "own.npy", own)
    np.save(tmp_path / "public.npy", public)
    vectors = {"embedding": str(tmp_path / "own.npy"), "public_embedding": str(tmp_path / "public.npy")}
    result = start(model, data, init=init, projection="random", **vectors)
    own, public = own @ matrix, public @ matrix
    if init == "unit_mean":
        own, public = (vector / np.linalg.norm(vector, axis=-1, keepdims=True) for vector in (own, public))
    close(result.rows, np.broadcast_to(own - public, (LAYERS, WIDTH)), relative=1e-5)


def test_vectors_of_two_widths_are_not_projected(model: Transformer, data: DataSets, tmp_path: Path) -> None:
    for name, width in (("own", 7), ("public", 9)):
        np.save(tmp_path / f"{name}.npy", np.ones(width))
    vectors = {"embedding": str(tmp_path / "own.npy"), "public_embedding": str(tmp_path / "public.npy")}
    with pytest.raises(UserError, match=r"own\.npy: a vector has shape \[9\].*give vectors \[7\] or \[3, 7\]$"):
        start(model, data, init="mean", projection="random", **vectors)


def test_the_projection_is_the_same_for_all_and_for_good() -> None:
    """Another matrix would make the rows of owners with different versions incomparable."""
    matrix = random_projection(3, 4)
    assert matrix.shape == (3, 4)
    assert (2 * matrix).flatten()[[0, 1, 5, 11]].tolist() == pytest.approx([1.764052, 0.400157, -0.977278, 1.454274])
    state = torch.get_rng_state()
    assert torch.equal(matrix, random_projection(3, 4))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(("source", "target"), [(384, 1024), (1024, 384), (30, 500)])
def test_a_projection_keeps_lengths_and_inner_products(source: int, target: int) -> None:
    """Johnson–Lindenstrauss: the squared length's relative error has mean 0 and deviation √(2/target)."""
    vectors = torch.randn(300, source, generator=torch.Generator().manual_seed(0))
    vectors /= vectors.norm(dim=1, keepdim=True)
    errors = (vectors @ random_projection(source, target)) @ (vectors @ random_projection(source, target)).T
    errors -= vectors @ vectors.T
    deviation = (2 / target) ** 0.5
    assert errors.diagonal().abs().mean() < 1.5 * deviation
    assert errors.abs().max() < 5 * deviation


def test_a_projection_goes_with_vectors_from_elsewhere() -> None:
    for settings in ({}, {"init": "random", "embedding": "folder"}):
        with pytest.raises(UserError, match=r"router\.projection=random goes with"):
            RouterConfig(projection="random", **settings).check()  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"router\.projection=other is not one of none, random"):
        RouterConfig(projection="other").check()
    RouterConfig(projection="random", embedding="folder").check()


def test_a_file_that_is_no_vector_is_refused(model: Transformer, data: DataSets, tmp_path: Path) -> None:
    path = tmp_path / "v.npy"

    def refused() -> None:
        with pytest.raises(UserError, match=r"v\.npy is not a \.npy vector"):
            start(model, data, init="mean", embedding=str(path), public_embedding=str(path))

    refused()
    path.write_bytes(b"no array")
    refused()
    np.save(path, np.array([{"code": "pickled"}]), allow_pickle=True)
    refused()
    np.save(path, np.full(WIDTH, "text"))
    refused()


@pytest.mark.parametrize("init", ["mean", "unit_mean", "discriminant"])
def test_public_data_that_is_not_there_is_refused(
    init: str, model: Transformer, data: DataSets, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"train\.idx does not exist: write it with `flexpert prepare`"):
        start(model, data, init=init, public=tmp_path)


@pytest.mark.parametrize(("init", "computed"), [("mean", []), ("unit_mean", []), ("discriminant", ["public"])])
def test_a_covariance_is_computed_where_it_is_used(
    init: str, computed: list[str], model: Transformer, data: DataSets, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}

    def statistics(model: Transformer, directory: Path, *arguments: Any, **options: Any) -> embed.StreamStatistics:
        found[directory.name] = original(model, directory, *arguments, **options)
        return found[directory.name]

    original = embed.stream_statistics
    monkeypatch.setattr(embed, "stream_statistics", statistics)
    start(model, data, init=init)
    assert [name for name, statistics in found.items() if statistics.token_covariance is not None] == computed


@pytest.fixture
def raw_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[list[int]]]:
    """A data set of three raw token files and their documents; the files count as too long to be searched."""
    monkeypatch.setattr(indexed, "SEARCH_TOKENS", 1 << 10)
    generator = np.random.default_rng(5)
    tokenizer = train_tokenizer(["a few words"] * 3, 300, tmp_path / "tokenizer")
    texts = [generator.integers(2, 200, size).tolist() for size in generator.integers(1, 90, 600)]
    documents = [[*text, tokenizer.eos_id] for text in texts]
    parts = []
    for number in range(3):
        flat = [token for document in documents[200 * number : 200 * (number + 1)] for token in document]
        path = tmp_path / f"{number}.npy"
        np.asarray(flat, np.uint16).tofile(path)
        parts.append({"file": str(path), "dtype": "uint16", "offset": 0, "bytes": path.stat().st_size})
    content = {"eos_id": tokenizer.eos_id, "splits": {"train": {"parts": parts}}}
    write_record(tmp_path / "manifest.json", "flexpert.data", content)
    return tmp_path, documents


def test_raw_files_are_sampled_without_a_search_through_them(
    raw_data: tuple[Path, list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, documents = raw_data

    def search(part: Any) -> None:
        raise AssertionError("all tokens were read")

    monkeypatch.setattr(indexed.RawFile, "ends", property(search))
    for count in (1, 7, 40, 100_000):
        found = [document.tolist() for document in embed.sample_documents(directory, count, 1000)]
        assert len(found) == embed.sample_size(directory, count) <= count
        places = [documents.index(document) for document in found]  # whole documents, all of them different
        assert places == sorted(set(places))
        if count == 40:
            assert len(found) >= 35
            assert np.diff(places).max() < 40  # evenly spread: 15 apart on average
    assert len(found) == len(documents)
    short = list(embed.sample_documents(directory, 40, 5))
    assert [document.tolist() for document in short] == [
        document[:5].tolist() for document in embed.sample_documents(directory, 40, 1000)
    ]


def test_raw_files_without_further_documents_are_read_once(raw_data: tuple[Path, list[list[int]]]) -> None:
    """One document that is longer than the others together: positions in it lead to the same place."""
    directory, documents = raw_data
    eos_id = documents[0][-1]
    tokens = np.asarray([5, eos_id, *[7] * 20_000], np.uint16)
    tokens.tofile(directory / "0.npy")
    record = json.loads((directory / "manifest.json").read_text())
    record["splits"]["train"]["parts"] = [record["splits"]["train"]["parts"][0] | {"bytes": tokens.nbytes}]
    (directory / "manifest.json").write_text(json.dumps(record))
    assert embed.sample_size(directory, 50) == 1
    assert [document.tolist() for document in embed.sample_documents(directory, 50, 9)] == [[5, eos_id]]
    assert [len(document) for document in embed.sample_documents(directory, 30_000, 9)] == [2, 9]


def test_a_sample_of_indexed_documents_is_cut(data: DataSets) -> None:
    expected = documents(data.own)
    assert embed.sample_size(data.own, 1000) == len(expected)
    for found, document in zip(embed.sample_documents(data.own, 1000, 3), expected, strict=True):
        assert found.tolist() == document[:3].tolist()
