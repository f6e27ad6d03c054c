"""Rows from sentence embeddings, by real sentence-transformers models with random weights; reference: transformers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from toy import write_data_sets

from flexpert.config.groups import ModelConfig, RouterConfig
from flexpert.data import embed
from flexpert.data.embed import load_embedder, random_projection, router_start
from flexpert.data.indexed import IndexedTokens
from flexpert.data.tokenizer import load_tokenizer
from flexpert.errors import UserError
from flexpert.model.transformer import Transformer

WIDTH, LAYERS = 24, 3
CPU = torch.device("cpu")
WORDS = ["seven", "plus", "eleven", "is", "18", "rain", "in", "the"]
Matrix = NDArray[np.float64]

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """own, public: 45 documents each."""
    root = tmp_path_factory.mktemp("data")
    write_data_sets(root, {"own": WORDS[:5], "public": WORDS[3:]})
    return root


@pytest.fixture(scope="module")
def shared_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BERT and mean pooling. Tests must not write here; those that change it take `sentence_model`."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    directory = tmp_path_factory.mktemp("sentence") / "model"
    transformer = directory / "0_Transformer"
    transformer.mkdir(parents=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    BertTokenizerFast(vocab={word: index for index, word in enumerate(words)}).save_pretrained(transformer)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        initializer_range=0.5,
    )
    BertModel(config).save_pretrained(transformer)
    (directory / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": WIDTH, "pooling_mode_mean_tokens": True}
    (directory / "1_Pooling/config.json").write_text(json.dumps(pooling))
    write_modules(directory, {"0_Transformer": "Transformer", "1_Pooling": "Pooling"})
    return directory


@pytest.fixture
def sentence_model(shared_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shared_model, tmp_path / "sentence"))


def write_modules(directory: Path, modules: dict[str, str]) -> None:
    """Folder → class of sentence_transformers.models, or a whole name."""
    entries = [
        {"idx": index, "name": str(index), "path": path, "type": name if "." in name else f"{MODELS}.{name}"}
        for index, (path, name) in enumerate(modules.items())
    ]
    (directory / "modules.json").write_text(json.dumps(entries))


MODELS = "sentence_transformers.models"


def add_dense(directory: Path, width: int) -> dict[str, torch.Tensor]:
    """A dense layer with tanh after the pooling; its weights."""
    generator = torch.Generator().manual_seed(1)
    weights = {
        "linear.weight": torch.randn(width, WIDTH, generator=generator),
        "linear.bias": torch.randn(width, generator=generator),
    }
    (directory / "2_Dense").mkdir()
    save_file(weights, directory / "2_Dense/model.safetensors")
    shape = {"in_features": WIDTH, "out_features": width, "bias": True}
    activation = {"activation_function": "torch.nn.modules.activation.Tanh"}
    (directory / "2_Dense/config.json").write_text(json.dumps(shape | activation))
    write_modules(directory, {"0_Transformer": "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense"})
    return weights


def rows(embedding: Path, data: Path, width: int = WIDTH, **settings: object) -> torch.Tensor:
    config = RouterConfig(init="mean", embedding=str(embedding), **settings)  # type: ignore[arg-type]
    config.check()
    shape = ModelConfig(hidden_size=width, num_layers=LAYERS, num_heads=4, intermediate_size=8, vocab_size=320)

    def load() -> Transformer:
        raise AssertionError("the public model was loaded")

    return router_start(config, shape, load, data / "own", data / "public", 13, 0, "a", CPU).rows


@torch.no_grad()
def embeddings(sentence_model: Path, directory: Path, max_length: int = 512) -> Matrix:
    """[documents, WIDTH]: one text at a time through transformers, mean over its tokens."""
    from transformers import BertModel, BertTokenizerFast

    bert = BertModel.from_pretrained(sentence_model / "0_Transformer").eval()
    words = BertTokenizerFast.from_pretrained(sentence_model / "0_Transformer")
    tokenizer, source = load_tokenizer(directory / "tokenizer"), IndexedTokens(directory / "train")
    texts = [tokenizer.decode(source.document(index)[:-1]) for index in range(len(source))]
    cut = {"truncation": True, "max_length": max_length, "return_tensors": "pt"}
    return np.stack([bert(**words(text, **cut)).last_hidden_state[0].double().mean(0).numpy() for text in texts])


def difference(sentence_model: Path, data: Path, max_length: int = 512) -> Matrix:
    own, public = (embeddings(sentence_model, data / name, max_length).mean(0) for name in ("own", "public"))
    return np.asarray(own - public)


def close(result: torch.Tensor, expected: Matrix) -> None:
    assert result.shape == (LAYERS, *expected.shape)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(result.numpy(), np.tile(expected, (LAYERS, 1)), rtol=1e-4, atol=1e-4 * scale)


def test_the_start_is_the_difference_of_the_mean_embeddings(shared_model: Path, data: Path) -> None:
    close(rows(shared_model, data), difference(shared_model, data))


def test_texts_go_through_in_batches(shared_model: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sentence_transformers import SentenceTransformer

    sizes, encode = [], SentenceTransformer.encode

    def counted(self: SentenceTransformer, texts: list[str], **options: object) -> NDArray[np.float32]:
        sizes.append(len(texts))
        return np.asarray(encode(self, texts, **options))

    monkeypatch.setattr(SentenceTransformer, "encode", counted)
    monkeypatch.setattr(embed, "ENCODED_TEXTS", 20)
    close(rows(shared_model, data), difference(shared_model, data))
    assert sizes == [20, 20, 5] * 2


def test_a_text_is_cut_at_the_length_that_the_model_was_made_for(sentence_model: Path, data: Path) -> None:
    settings = json.dumps({"max_seq_length": 6, "do_lower_case": False})
    (sentence_model / "0_Transformer/sentence_bert_config.json").write_text(settings)
    expected = difference(sentence_model, data, max_length=6)
    close(rows(sentence_model, data), expected)
    assert np.abs(expected - difference(sentence_model, data)).max() > 0.01


def test_a_plain_transformers_encoder_is_pooled_by_the_mean(shared_model: Path, data: Path) -> None:
    assert torch.equal(rows(shared_model / "0_Transformer", data), rows(shared_model, data))


def test_another_width_is_refused_or_projected(shared_model: Path, data: Path) -> None:
    wide = 2 * WIDTH
    with pytest.raises(UserError, match=rf"shape \[{WIDTH}\].*width {wide}.*router\.projection=random"):
        rows(shared_model, data, width=wide)
    expected = difference(shared_model, data) @ random_projection(WIDTH, wide).double().numpy()
    close(rows(shared_model, data, width=wide, projection="random"), expected)


def test_a_model_with_a_dense_layer_is_read_from_safetensors(sentence_model: Path, data: Path) -> None:
    weights = add_dense(sentence_model, 10)
    weight, bias = (weights[name].double().numpy() for name in ("linear.weight", "linear.bias"))
    own, public = (
        np.tanh(embeddings(sentence_model, data / name) @ weight.T + bias).mean(0) for name in ("own", "public")
    )
    projection = random_projection(10, WIDTH).double().numpy()
    close(rows(sentence_model, data, projection="random"), (own - public) @ projection)


def pickle_of_transformer(directory: Path) -> None:
    folder = directory / "0_Transformer"
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def pickle_of_dense(directory: Path) -> None:
    torch.save(add_dense(directory, WIDTH), directory / "2_Dense/pytorch_model.bin")
    (directory / "2_Dense/model.safetensors").unlink()


def linked_pickle_of_dense(directory: Path) -> None:
    pickle_of_dense(directory)
    elsewhere = directory.parent / "elsewhere"
    (directory / "2_Dense").rename(elsewhere)
    (directory / "2_Dense").symlink_to(elsewhere)


def pickle_in_parts(directory: Path) -> None:
    pickle_of_transformer(directory)
    folder, part = directory / "0_Transformer", "pytorch_model-00001-of-00001.bin"
    weights = torch.load(folder / "pytorch_model.bin")
    (folder / "pytorch_model.bin").rename(folder / part)
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(weights, part)}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def pickled_adapter(directory: Path) -> None:
    folder = directory / "0_Transformer"
    torch.save({}, folder / "adapter_model.bin")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": None}))


@pytest.mark.parametrize(
    "change", [pickle_of_transformer, pickle_of_dense, linked_pickle_of_dense, pickle_in_parts, pickled_adapter]
)
def test_a_pickle_is_not_opened(
    change: Callable[[Path], None], sentence_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_embedder(sentence_model, CPU)
    change(sentence_model)
    opened = []
    monkeypatch.setattr(torch, "load", lambda *args, **_: opened.append(args))
    with pytest.raises(UserError, match=r"pickle|no file named model\.safetensors") as caught:
        load_embedder(sentence_model, CPU)
    assert "\n" not in str(caught.value)
    assert opened == []


def test_a_pickle_beside_safetensors_is_left_alone(
    sentence_model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = rows(sentence_model, data)
    (sentence_model / "0_Transformer/pytorch_model.bin").write_bytes(b"no pickle")
    monkeypatch.setattr(torch, "load", None)
    assert torch.equal(rows(sentence_model, data), before)


def test_code_in_the_directory_is_not_run(sentence_model: Path, tmp_path: Path) -> None:
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\n"
    (sentence_model / "custom_pooling.py").write_text(code)
    write_modules(sentence_model, {"0_Transformer": "Transformer", "1_Pooling": "custom_pooling.Pooling"})
    with pytest.raises(UserError, match=r"sentence: .*custom_pooling\.Pooling|custom_pooling\.Pooling") as caught:
        load_embedder(sentence_model, CPU)
    assert "\n" not in str(caught.value)
    encoder = sentence_model / "0_Transformer"
    (encoder / "custom_model.py").write_text(code)
    config = json.loads((encoder / "config.json").read_text()) | {
        "model_type": "custom",
        "auto_map": {"AutoConfig": "custom_model.Config", "AutoModel": "custom_model.Model"},
    }
    (encoder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="cannot be loaded"):
        load_embedder(encoder, CPU)
    assert not (tmp_path / "ran").exists()


def test_what_is_no_model_is_refused(sentence_model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for missing in (tmp_path / "empty", tmp_path / "nowhere"):
        with pytest.raises(UserError, match="is not a sentence-transformers directory"):
            load_embedder(missing, CPU)
    for content in ("{", "[]", '[{"idx": 0}]'):
        (sentence_model / "modules.json").write_text(content)
        with pytest.raises(
            UserError, match=r"^router\.embedding=.*cannot be loaded by sentence-transformers: .+"
        ) as caught:
            load_embedder(sentence_model, CPU)
        assert "\n" not in str(caught.value)
