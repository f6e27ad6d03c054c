"""What a run may compute with instead of PyTorch's own: each name that a key takes, and where its implementation is.

The packages are optional, compute on CUDA devices alone, and are imported when a stage that names one starts. Their
signatures are those of transformer-engine 2.18 (docs.nvidia.com/deeplearning/transformer-engine/user-guide/api/) and of
apex (nvidia.github.io/apex); no test of ours has run them. What is put in place of what: `model/accelerate.py`, and
`train/optimizer.py` for Adam.
"""

import importlib
from importlib.util import find_spec
from typing import Any, NamedTuple

from flexpert.config.options import require
from flexpert.errors import UserError

#: What the sides of a matrix product in fp8 must divide by.
FP8_MULTIPLE = 16


class Package(NamedTuple):
    module: str
    title: str
    remedy: str


class Implementation(NamedTuple):
    package: Package
    module: str
    name: str

    def load(self) -> Any:
        return getattr(importlib.import_module(self.module), self.name)


TE = Package(
    "transformer_engine", "transformer-engine", "pip install --no-build-isolation 'transformer-engine[pytorch]'"
)
APEX = Package("apex", "NVIDIA's apex", "build it with its CUDA extensions from https://github.com/NVIDIA/apex")

#: Key → the names it takes, the first of which is the default, PyTorch's.
IMPLEMENTATIONS: dict[str, dict[str, Implementation | None]] = {
    "model.norm": {
        "torch": None,
        "te": Implementation(TE, "transformer_engine.pytorch", "RMSNorm"),
        "apex": Implementation(APEX, "apex.normalization", "FusedRMSNorm"),
    },
    "model.attention": {
        "sdpa": None,
        "te": Implementation(TE, "transformer_engine.pytorch", "DotProductAttention"),
    },
    "model.linear": {
        "torch": None,
        "te_fp8": Implementation(TE, "transformer_engine.pytorch", "Linear"),
    },
    "optim.adam": {
        "torch": None,
        "te": Implementation(TE, "transformer_engine.pytorch.optimizers", "FusedAdam"),
        "apex": Implementation(APEX, "apex.optimizers", "FusedAdam"),
    },
}


def names(key: str) -> tuple[str, ...]:
    return tuple(IMPLEMENTATIONS[key])


def load(key: str, name: str) -> Any:
    """The class that a key's value names, which is not PyTorch's."""
    implementation = IMPLEMENTATIONS[key][name]
    assert implementation is not None
    return implementation.load()


def chosen(config: Any) -> dict[str, tuple[str, Implementation]]:
    """Name and implementation of every key of a stage's config that takes another than PyTorch's."""
    found = {}
    for key, known in IMPLEMENTATIONS.items():
        group, _, field = key.partition(".")
        name = getattr(getattr(config, group, None), field, "")  # no stage has all keys
        if implementation := known.get(name):
            found[key] = name, implementation
    return found


def check_chosen(config: Any) -> None:
    """Raises `UserError` where what a training stage names is not installed, or does not go with other settings."""
    found = chosen(config)
    settings = [f"{key}={name}" for key, (name, _) in found.items() if key.startswith("model.")]
    if settings:
        tensor, compiled = config.parallel.tensor, config.train.compile
        require(tensor == 1, f"{settings[0]} needs parallel.tensor=1, and it is {tensor}: nothing of it is split")
        require(compiled != "true", f"{settings[0]} is not compiled: leave train.compile=auto, or set it to false")
    if "model.attention" in found:
        documents = config.data.intra_document_attention
        require(
            not documents,
            f"model.attention={found['model.attention'][0]} attends over whole windows, and "
            "data.intra_document_attention=true within documents: leave one of them out",
        )
    if "model.linear" in found:
        length, recompute = config.train.sequence_length, config.train.recompute
        require(recompute == "none", f"{settings[-1]} does not go with train.recompute={recompute}")
        require(
            length % FP8_MULTIPLE == 0,
            f"{settings[-1]} needs a train.sequence_length that divides by {FP8_MULTIPLE}, not {length}",
        )
    for key, (name, implementation) in found.items():
        _, title, remedy = implementation.package
        require(
            find_spec(implementation.package.module) is not None,
            f"{key}={name} needs {title}, which is not installed: {remedy}, or leave {key}={names(key)[0]}",
        )


def check_usable(config: Any, device: str, num_ranks: int) -> None:
    """Raises `UserError` where what a training stage names cannot be imported, or cannot compute here.

    Args:
        device: the kind that the stage computes on.
        num_ranks: processes that train together.
    """
    for key, (name, implementation) in chosen(config).items():
        setting, default = f"{key}={name}", f"{key}={names(key)[0]}"
        require(device == "cuda", f"{setting} computes on CUDA devices alone, and this run on the CPU: leave {default}")
        require(
            num_ranks == 1 or (key, name) != ("optim.adam", "apex"),
            f"{setting} knows no sharded parameters: run it in one process, or leave {default}",
        )
        try:
            implementation.load()
        except (ImportError, OSError) as error:  # built for another PyTorch, without extensions, another's of that name
            title = implementation.package.title
            raise UserError(f"{setting}: {title} cannot be imported: {error}; or leave {default}") from None
        if key == "model.linear":
            engine = importlib.import_module(implementation.module)
            available, reason = engine.is_fp8_available(return_reason=True)
            require(available, f"{setting} cannot compute on this GPU: {reason}")
