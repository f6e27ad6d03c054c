"""Digests of models: over what the tensors hold, never over files.

The base digest says which public model an expert was trained against. It covers every tensor's name, dtype, shape and
bytes, and the tokenizer; how the tensors are spread over files does not matter, so resharding keeps it.
"""

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from flexpert.assembly.files import FILES_AT_A_TIME
from flexpert.assembly.tensors import TensorDigest, TensorSet, open_model
from flexpert.records import canonical_json, read_json, sha256_hex

if TYPE_CHECKING:
    import torch

#: Files of a tokenizer in a Hugging Face directory; all but the first may be absent.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


def digest_of(tensors: Mapping[str, TensorDigest], tokenizer: str) -> str:
    """The base digest of tensors and a tokenizer.

    Args:
        tensors: Hugging Face name → digest of the tensor; the order does not matter.
        tokenizer: as `tokenizer_digest` gives it.

    Returns:
        "sha256:" and 64 hexadecimal digits.
    """
    entries = {name: digest.to_json() for name, digest in tensors.items()}
    return "sha256:" + sha256_hex(canonical_json({"tensors": entries, "tokenizer": tokenizer}))


def base_digest(model_dir: Path) -> str:
    """The base digest of a Hugging Face directory; reads every weight once.

    Raises:
        UserError: as `tensor_digests` and `tokenizer_digest`.
    """
    tokenizer = tokenizer_digest(model_dir)
    return digest_of(tensor_digests(model_dir), tokenizer)


def tensor_digests(model_dir: Path) -> dict[str, TensorDigest]:
    """Digest every tensor of a Hugging Face directory, in pieces, several at a time.

    Raises:
        UserError: weights are missing or malformed, or the index and the shards disagree.
    """
    with open_model(model_dir) as model, ThreadPoolExecutor(FILES_AT_A_TIME) as pool:
        digests = pool.map(lambda name: _digest_in_file(model, name), model.tensors)
        return dict(zip(model.tensors, digests, strict=True))


def _digest_in_file(model: TensorSet, name: str) -> TensorDigest:
    info, content = model.tensors[name], hashlib.sha256()
    for piece in model.read_pieces(name):
        content.update(piece)
    return TensorDigest(info.dtype, info.shape, content.hexdigest())


def tokenizer_digest(model_dir: Path) -> str:
    """SHA-256, in hexadecimal, of what in `tokenizer.json` decides the ids of a text.

    Left out are truncation and padding, which are settings of a call, and the post-processor, which adds tokens that
    Flexpert does not ask for. Merges count as pairs, also where they are written as "a b", as before tokenizers 0.20.
    Which of the tokens ends a document is said in another file, and does not count here: data sets have it as `eos_id`.

    Raises:
        UserError: `tokenizer.json` is missing or is not a JSON object.
    """
    tokenizer = read_json(model_dir / "tokenizer.json")
    content = {key: tokenizer[key] for key in tokenizer.keys() - {"truncation", "padding"}}
    content["post_processor"] = None
    model = content.get("model")
    if isinstance(model, dict) and isinstance(model.get("merges"), list):
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        content["model"] = model | {"merges": pairs}
    return sha256_hex(canonical_json(content))


def digest_tensor(tensor: "torch.Tensor") -> TensorDigest:
    """Digest a floating-point tensor in memory; equals the digest of the same tensor in a file."""
    return TensorDigest(dtype_name(tensor), tuple(tensor.shape), hashlib.sha256(tensor_bytes(tensor)).hexdigest())


def dtype_name(tensor: "torch.Tensor") -> str:
    """Safetensors' name of a tensor's floating-point dtype."""
    import torch

    return {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64"}[tensor.dtype]


def tensor_bytes(tensor: "torch.Tensor") -> memoryview:
    """The raw bytes of a tensor, without a copy if it is contiguous and in host memory."""
    import torch

    # NumPy has no bfloat16, so the bytes are what it is given.
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
