"""How an expert's router row starts: from statistics of public and own documents, nothing else (FlexOlmo, router rows).

The softmax does not change when one vector is subtracted from every row, so rows are kept relative to the public
expert's, which is therefore the zero vector in every contribution and every assembled model. Owners need not agree on
a sample of public documents for that.

Shapes: L layers, D residual width.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flexpert.config.groups import ModelConfig, RouterConfig
from flexpert.data.indexed import IndexedTokens
from flexpert.data.tokenizer import load_tokenizer
from flexpert.errors import UserError
from flexpert.model.transformer import Transformer

BATCH_DOCUMENTS = 16
#: Texts that are held at a time; the embedder sorts them by length before it makes batches of them.
ENCODED_TEXTS = 16 * BATCH_DOCUMENTS
#: Tokens of a document that are given to an embedder, which cuts it at a few thousand of its own.
TEXT_TOKENS = 1 << 16
RANDOM_STD = 0.02
PROJECTION_SEED = 0
#: Ridge of the discriminant, as a share of the mean variance: chosen on development text of the demo.
RIDGE = 0.1


@dataclass(frozen=True)
class RouterStart:
    """Rows [L, D] relative to the public row, and biases [L] (0 where the start has none)."""

    rows: Tensor
    biases: Tensor


@dataclass(frozen=True)
class StreamStatistics:
    """Of the stream that each layer's router reads.

    Attributes:
        document_mean: mean over documents of a document's mean, [L, D].
        token_mean: mean over tokens, [L, D].
        token_covariance: over tokens, [L, D, D]; None where it was not asked for.
    """

    document_mean: Tensor
    token_mean: Tensor
    token_covariance: Tensor | None


def sample_size(directory: Path, count: int) -> int:
    """How many documents `sample_documents` yields."""
    source = IndexedTokens(directory / "train")
    starts = source.sample_starts(count)
    return min(count, len(source)) if starts is None else len(starts)


def sample_documents(directory: Path, count: int, max_tokens: int) -> Iterator[NDArray[np.int64]]:
    """The first `max_tokens` ids of up to `count` training documents, evenly spread over the data set.

    Raw token files too long to be searched for their documents are sampled as `IndexedTokens.sample_starts` says.
    """
    source = IndexedTokens(directory / "train")
    starts = source.sample_starts(count)
    if starts is not None:
        for number, start in starts:
            yield source.document_from(number, start, max_tokens)
        return
    for index in np.linspace(0, len(source) - 1, num=min(count, len(source))).astype(int):
        yield source.document(int(index), max_tokens)


@torch.no_grad()
def stream_statistics(
    model: Transformer, directory: Path, count: int, max_tokens: int, covariance: bool
) -> StreamStatistics:
    """Run the public model over documents and collect what its feed-forward layers read.

    Args:
        model: the dense public model.
        directory: data set.
        count: documents.
        max_tokens: tokens of each document, from its start.
        covariance: whether to compute it: at 7B it takes 4 GB and most of the time.
    """
    config = model.config
    device = model.head.weight.device
    document_sum = torch.zeros(config.num_layers, config.hidden_size, dtype=torch.double, device=device)
    token_sum = torch.zeros_like(document_sum)
    square_sum = document_sum.new_zeros(*document_sum.shape, config.hidden_size) if covariance else None
    num_documents = num_tokens = 0

    def sum_over(layer: int) -> torch.utils.hooks.RemovableHandle:
        def hook(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            # Summed here and not after the pass, so that one layer's stream is held at a time.
            stream = (inputs[0] * valid[..., None]).double()
            document_sum[layer] += (stream.sum(1) / lengths[:, None]).sum(0)
            token_sum[layer] += stream.sum((0, 1))
            if square_sum is not None:
                flat = stream.flatten(0, 1)
                square_sum[layer] += flat.T @ flat

        return model.blocks[layer].feed_forward.register_forward_pre_hook(hook)  # type: ignore[union-attr]

    documents = list(sample_documents(directory, count, max_tokens))
    documents.sort(key=len)  # batches of about equal length
    handles = [sum_over(layer) for layer in range(config.num_layers)]
    for start in range(0, len(documents), BATCH_DOCUMENTS):
        batch = documents[start : start + BATCH_DOCUMENTS]
        tokens = torch.zeros(len(batch), max(map(len, batch)), dtype=torch.long)
        for row, document in enumerate(batch):
            tokens[row, : len(document)] = torch.from_numpy(document)
        lengths = torch.tensor([len(document) for document in batch], device=device)
        valid = torch.arange(tokens.shape[1], device=device) < lengths[:, None]
        model(tokens.to(device))  # causal: the padding on the right does not reach what is summed
        num_documents += len(batch)
        num_tokens += int(lengths.sum())
    for handle in handles:
        handle.remove()
    mean = token_sum / num_tokens
    centred = None if square_sum is None else square_sum / num_tokens - mean[:, :, None] * mean[:, None, :]
    return StreamStatistics(document_sum / num_documents, mean, centred)


def discriminant(own: StreamStatistics, public: StreamStatistics, bias: bool) -> RouterStart:
    """Linear discriminant between own and public tokens, from statistics that an owner may compute alone.

    With S = Σ_pub + λI, λ = RIDGE · mean diag Σ_pub, δ = μ_own − μ_pub and m = (μ_own + μ_pub) / 2, per layer:

    - with a bias: r = S⁻¹ δ and b = −r·m, at most 0;
    - without: r = S⁻¹ (δ − a m) with a such that r·m = 0, the best separating plane that goes through the origin.
    """
    assert public.token_covariance is not None
    rows, biases = [], []
    for layer in range(len(own.token_mean)):
        mean_own, mean_public = own.token_mean[layer], public.token_mean[layer]
        covariance = public.token_covariance[layer]
        ridge = RIDGE * covariance.diagonal().mean()
        inverse = torch.linalg.inv(covariance + ridge * torch.eye(len(covariance), dtype=torch.double).to(covariance))
        delta, middle = mean_own - mean_public, (mean_own + mean_public) / 2
        row, shift = inverse @ delta, inverse @ middle
        if bias:
            biases.append((-(row @ middle)).clamp(max=0))
        else:
            row = row - (row @ middle) / (shift @ middle) * shift
            biases.append(torch.zeros((), dtype=torch.double, device=row.device))
        rows.append(row)
    return RouterStart(torch.stack(rows).float(), torch.stack(biases).float())


def load_embedder(directory: Path, device: torch.device) -> Any:
    """A sentence-transformers model; a plain transformers encoder is pooled as sentence-transformers does by default.

    No code and no pickle of the directory is run.

    Raises:
        UserError: the extra is not installed, or the directory is no such model or holds weights in pickles alone.
    """
    key = f"router.embedding={directory}"
    if not any((directory / name).is_file() for name in ("modules.json", "config.json")):
        raise UserError(f"{key} is not a sentence-transformers directory: it has neither modules.json nor config.json")
    # transformers is told to read safetensors alone; sentence-transformers' own modules cannot be told.
    for folder, _, names in os.walk(directory, followlinks=True):
        if "adapter_model.bin" in names or ("pytorch_model.bin" in names and "model.safetensors" not in names):
            raise UserError(
                f"{key}: the weights in {folder} are a pickle, which is not opened; save them as safetensors"
            )
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise UserError("router.embedding=DIR needs the embed extra: pip install flexpert[embed]") from None
    try:
        return SentenceTransformer(
            str(directory),
            device=str(device),
            trust_remote_code=False,
            local_files_only=True,
            model_kwargs={"use_safetensors": True},
        )
    except Exception as error:  # whatever two libraries raise over files that someone else wrote
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{key} cannot be loaded by sentence-transformers: {reason}") from None


def sentence_embedding(embedder: Any, directory: Path, count: int) -> Tensor:
    """Mean embedding [width] of a data set's documents, each cut at the embedder's `max_seq_length`."""
    tokenizer = load_tokenizer(directory / "tokenizer")
    documents = sample_documents(directory, count, TEXT_TOKENS)
    texts = (tokenizer.decode(document[document != tokenizer.eos_id]) for document in documents)
    total, num_texts = np.zeros(()), 0
    while some := list(islice(texts, ENCODED_TEXTS)):
        vectors = embedder.encode(some, batch_size=BATCH_DOCUMENTS, convert_to_numpy=True, show_progress_bar=False)
        total = total + vectors.sum(0, dtype=np.float64)
        num_texts += len(some)
    return torch.from_numpy(total / num_texts).float()


def load_vector(path: Path) -> Tensor:
    try:
        return torch.from_numpy(np.load(path, allow_pickle=False)).float()
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is not a .npy vector: {error}") from None


def random_projection(source: int, target: int) -> Tensor:
    """[source, target] of N(0, 1/target), which keeps squared lengths in expectation, with a relative deviation of
    √(2/target), and so distances and inner products (Johnson–Lindenstrauss; Dasgupta and Gupta 2003).

    It depends on the two widths alone, so that the rows of owners with one embedder can be compared. Not orthogonal:
    that is exact only where target ≥ source, and LAPACKs differ in how they factorise. `RandomState`, because its
    stream is the one that NumPy keeps for good (NEP 19).
    """
    matrix = np.random.RandomState(PROJECTION_SEED).standard_normal((source, target))
    return torch.from_numpy(matrix / np.sqrt(target)).float()


def of_width(vectors: list[Tensor], config: RouterConfig, layers: int, width: int) -> list[Tensor]:
    """Vectors [width] or [layers, width], projected where the config says so.

    Raises:
        UserError: they have other shapes, or are to be projected and have not both the same width.
    """
    is_projected = config.projection == "random"
    source = vectors[0].shape[-1:].numel() if is_projected else width
    for vector in vectors:
        if vector.shape not in ((source,), (layers, source)):
            raise UserError(
                f"router.embedding={config.embedding}: a vector has shape {list(vector.shape)}; the model's stream has "
                f"width {width}: give vectors [{source}] or [{layers}, {source}]"
                + ("" if is_projected else ", or set router.projection=random")
            )
    if not is_projected:
        return vectors
    matrix = random_projection(source, width)
    return [vector @ matrix for vector in vectors]


def router_start(
    config: RouterConfig,
    shape: ModelConfig,
    load_public: Callable[[], Transformer],
    own: Path,
    public: Path | None,
    sequence_length: int,
    seed: int,
    name: str,
    device: torch.device,
) -> RouterStart:
    """The start that `config.init` names.

    - mean: mean embedding of own documents less that of public ones (the paper's start, relative to the public row);
    - unit_mean: the same with each of the two means scaled to length 1;
    - discriminant: see there;  random: N(0, 0.02²).

    Args:
        shape: the dense public model's.
        load_public: loads it; called where the stream is read, and nowhere else.
        own, public: data set directories of the owner and of public text; the second where config needs public text.
        sequence_length: tokens of each document that the stream is read over.
        seed, name: of a random start; the name is the expert's.
        device: where a sentence-transformers model runs.

    Raises:
        UserError: an embedding of another width than the model's, or of a source that cannot be read.
    """
    layers, width = shape.num_layers, shape.hidden_size
    zeros = torch.zeros(layers)
    if config.source is None:
        # The name too: with the same seed everywhere, all owners' rows would start as the same vector.
        mixed = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "big")
        generator = torch.Generator().manual_seed(mixed)
        return RouterStart(torch.randn(layers, width, generator=generator) * RANDOM_STD, zeros)
    if config.source == "stream":
        assert public is not None
        model, is_discriminant = load_public(), config.init == "discriminant"
        of_own = stream_statistics(model, own, config.documents, sequence_length, covariance=False)
        of_public = stream_statistics(model, public, config.documents, sequence_length, covariance=is_discriminant)
        if is_discriminant:
            return discriminant(of_own, of_public, config.bias)
        vectors = [statistics.document_mean.float() for statistics in (of_own, of_public)]
    elif config.source == "file":
        assert config.public_embedding is not None
        vectors = [load_vector(Path(path)) for path in (config.embedding, config.public_embedding)]
    else:
        assert public is not None
        embedder = load_embedder(Path(config.embedding), device)
        vectors = [sentence_embedding(embedder, source, config.documents) for source in (own, public)]
    vectors = of_width(vectors, config, layers, width)
    if config.init == "unit_mean":
        vectors = [vector / vector.norm(dim=-1, keepdim=True) for vector in vectors]
    return RouterStart((vectors[0] - vectors[1]).expand(layers, width).contiguous(), zeros)
