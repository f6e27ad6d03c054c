"""How an expert's router row starts: from statistics of public and own documents, nothing else (FlexOlmo, router rows).

The softmax does not change when one vector is subtracted from every row, so rows are kept relative to the public
expert's, which is therefore the zero vector in every contribution and every assembled model. Owners need not agree on
a sample of public documents for that.

Shapes: L layers, D residual width.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flexpert.config.groups import RouterConfig
from flexpert.data.indexed import IndexedTokens
from flexpert.data.tokenizer import load_tokenizer
from flexpert.errors import UserError
from flexpert.model.transformer import Transformer

BATCH_DOCUMENTS = 16
RANDOM_STD = 0.02
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


def sample_documents(directory: Path, count: int) -> Iterator[np.ndarray]:
    """Up to `count` training documents, evenly spread over the data set."""
    source = IndexedTokens(directory / "train")
    for index in np.unique(np.linspace(0, len(source) - 1, num=min(count, len(source))).astype(int)):
        yield source.document(int(index))


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
    streams: dict[int, Tensor] = {}

    def keep(layer: int) -> torch.utils.hooks.RemovableHandle:
        def hook(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            streams[layer] = inputs[0]

        return model.blocks[layer].feed_forward.register_forward_pre_hook(hook)  # type: ignore[union-attr]

    handles = [keep(layer) for layer in range(config.num_layers)]
    documents = [document[:max_tokens] for document in sample_documents(directory, count)]
    documents.sort(key=len)  # batches of about equal length
    for start in range(0, len(documents), BATCH_DOCUMENTS):
        batch = documents[start : start + BATCH_DOCUMENTS]
        tokens = torch.zeros(len(batch), max(map(len, batch)), dtype=torch.long)
        for row, document in enumerate(batch):
            tokens[row, : len(document)] = torch.from_numpy(document)
        lengths = torch.tensor([len(document) for document in batch], device=device)
        model(tokens.to(device))  # causal: the padding on the right does not reach what is kept
        valid = torch.arange(tokens.shape[1], device=device) < lengths[:, None]
        for layer, stream in streams.items():
            masked = stream.double() * valid[..., None]
            document_sum[layer] += (masked.sum(1) / lengths[:, None]).sum(0)
            token_sum[layer] += masked.sum((0, 1))
            if square_sum is not None:
                flat = masked.flatten(0, 1)
                square_sum[layer] += flat.T @ flat
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


def sentence_embedding(model_dir: Path, directory: Path, count: int) -> Tensor:
    """Mean embedding [D] of a data set's documents by a sentence-transformers model directory."""
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise UserError("router.embedding=DIR needs the embed extra: pip install flexpert[embed]") from None
    tokenizer = load_tokenizer(directory / "tokenizer")
    texts = [tokenizer.decode(document[:-1]) for document in sample_documents(directory, count)]
    model = SentenceTransformer(str(model_dir), device="cpu", trust_remote_code=False, local_files_only=True)
    vectors = model.encode(texts, convert_to_numpy=True, show_progress_bar=False)
    return torch.from_numpy(np.asarray(vectors, dtype=np.float32)).mean(0)


def load_vector(path: Path) -> Tensor:
    try:
        return torch.from_numpy(np.load(path, allow_pickle=False)).float()
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is not a .npy vector: {error}") from None


def router_start(
    model: Transformer, config: RouterConfig, own: Path, public: Path | None, sequence_length: int, seed: int, name: str
) -> RouterStart:
    """The start that `config.init` names.

    - mean: mean embedding of own documents less that of public ones (the paper's start, relative to the public row);
    - unit_mean: the same with each of the two means scaled to length 1;
    - discriminant: see there;  random: N(0, 0.02²).

    Args:
        model: the dense public model.
        own, public: data set directories of the owner and of public text; the second where config needs public text.
        sequence_length: tokens of each document that the stream is read over.
        seed, name: of a random start; the name is the expert's.

    Raises:
        UserError: an embedding of another width than the model's, or of a source that cannot be read.
    """
    layers, width = model.config.num_layers, model.config.hidden_size
    zeros = torch.zeros(layers)
    if config.init == "random":
        # The name too: with the same seed everywhere, all owners' rows would start as the same vector.
        mixed = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "big")
        generator = torch.Generator().manual_seed(mixed)
        return RouterStart(torch.randn(layers, width, generator=generator) * RANDOM_STD, zeros)
    if config.embedding == "stream":
        assert public is not None
        is_discriminant = config.init == "discriminant"
        of_own = stream_statistics(model, own, config.documents, sequence_length, covariance=False)
        of_public = stream_statistics(model, public, config.documents, sequence_length, covariance=is_discriminant)
        if is_discriminant:
            return discriminant(of_own, of_public, config.bias)
        vectors = [statistics.document_mean.float() for statistics in (of_own, of_public)]
    elif config.embedding.endswith(".npy"):
        assert config.public_embedding is not None
        vectors = [load_vector(Path(path)) for path in (config.embedding, config.public_embedding)]
    else:
        assert public is not None
        if not (Path(config.embedding) / "modules.json").is_file():
            raise UserError(f"router.embedding={config.embedding} is not a sentence-transformers directory")
        vectors = [sentence_embedding(Path(config.embedding), source, config.documents) for source in (own, public)]
    for vector in vectors:
        if vector.shape not in ((width,), (layers, width)):
            raise UserError(
                f"router.embedding={config.embedding} has shape {list(vector.shape)}; the model's stream has width "
                f"{width}: give a vector of that width, one a layer or one for all"
            )
    if config.init == "unit_mean":
        vectors = [vector / vector.norm(dim=-1, keepdim=True) for vector in vectors]
    return RouterStart((vectors[0] - vectors[1]).expand(layers, width).contiguous(), zeros)
