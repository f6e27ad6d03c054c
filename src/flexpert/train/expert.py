"""`flexpert expert`: one owner's expert, trained beside the frozen public model (FlexOlmo, expert training).

The model is a two-expert mixture whose parts are held apart: the public FFN, trunk and router row are frozen by
construction (no gradient, no optimiser state, no copy in another type), the owner's FFN, row and bias are trained. Both
experts run on every token; the router sets only the mixture.
"""

import gc
import math
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from flexpert.checkpoint.digest import base_digest, tokenizer_digest
from flexpert.checkpoint.directory import ModelDirectory
from flexpert.checkpoint.huggingface import fill, job_tensor_map, tensor_map
from flexpert.checkpoint.local_copy import read_locally
from flexpert.checkpoint.sharding import assign, gather_to_first, local_part
from flexpert.config.accelerators import check_usable
from flexpert.config.groups import ModelConfig
from flexpert.config.stages import ExpertConfig
from flexpert.contribution.pack import pack
from flexpert.contribution.record import ExpertIdentity, check_identity
from flexpert.data.dataset import TokenWindows, read_manifest
from flexpert.data.embed import RouterStart, router_start, sample_size
from flexpert.data.mixture import MixedWindows, training_windows
from flexpert.errors import UserError
from flexpert.model.transformer import Transformer, build_on_meta
from flexpert.parallel.apply import put_beside, put_on_ranks
from flexpert.parallel.environment import is_first, num_ranks
from flexpert.parallel.process import on_first
from flexpert.parallel.ranks import Ranks
from flexpert.stage import check_directory, claim_directory, set_up_process
from flexpert.train.freeze import cast_frozen, frozen_digest, train_only
from flexpert.train.loop import Trainer
from flexpert.train.pretrain import check_batch, check_lengths, check_tokenizer

#: Part of a parameter's name that says it is the owner's.
OWN = (".groups.1.", ".router.weight.1", ".router.bias.1")


def run(config: ExpertConfig, resolved: str) -> None:
    """Train, prove that nothing frozen moved, and write `output_dir/contribution`.

    Raises:
        UserError: the base is no dense model, or data and base have different tokenizers.
    """
    base = ModelDirectory.open(Path(config.base))
    if base.experts:
        raise UserError(f"base={config.base} is a mixture; an expert is trained against a dense public model")
    dtype = base.require_one_dtype()
    identity = ExpertIdentity(config.name, config.title or config.name, config.license)
    check_identity(identity, "expert")
    check_lengths(config.train.sequence_length, base.config.max_sequence_length)
    manifest = read_manifest(Path(config.data.dir))
    check_tokenizer(base.path, manifest)
    output = Path(config.output_dir)
    check_directory(output, resolved, config.resume)
    contribution = output / "contribution"
    if contribution.exists():
        print(f"{contribution} is complete")
        return

    check_batch(config, is_mixture=True)
    device = set_up_process(config.train.device, config.parallel)
    check_usable(config, device.type, num_ranks())
    inputs = {"base": on_first(lambda: base_digest(base.path))}
    if config.public_data is not None:
        public = read_manifest(Path(config.public_data))
        if public.digest == manifest.digest:
            raise UserError(f"public_data={config.public_data} is the data set of data.dir: give public text")
        check_tokenizer(base.path, public)
        inputs["public_data"] = public.digest
    windows = mixed_windows(config, config.public_share)
    steps = config.router.calibration_steps
    calibration = mixed_windows(config, config.router.calibration_public_share) if steps else None
    # $TMPDIR is another on every node.
    local_copy = os.path.expandvars(config.local_copy) if config.local_copy is not None else None
    if local_copy is not None and "$" in local_copy:
        raise UserError(f"local_copy={config.local_copy}: {os.uname().nodename} has not set that variable")
    with read_locally(base, local_copy) as readable:
        model, ranks = build_job(readable, config, device)
    if local_copy is not None:
        check_copied(model, base, inputs["base"], local_copy)
    trainer = Trainer(model, config, "expert", manifest, device, resolved, windows, inputs, ranks)
    on_first(lambda: claim_directory(output, resolved, config.resume))
    trainer.run()
    if calibration is not None:
        del trainer  # its optimiser's state
        model = for_calibration(model, ranks, device)
        gc.collect()
        short = calibration_config(config)
        Path(short.output_dir).mkdir(exist_ok=True)
        recorded = yaml.safe_dump(asdict(short))  # for W&B, where it is a run of its own
        Trainer(model, short, "calibrate", manifest, device, recorded, calibration, inputs, ranks).run()
    frozen = job_tensor_map(model.config, expert=False)
    digest = frozen_digest(model, frozen, dtype, tokenizer_digest(base.path))
    tensors = expert_tensors(model, dtype)

    def write() -> None:
        if digest != inputs["base"]:
            raise AssertionError("a frozen tensor changed during training: the contribution is not written")
        pack(
            contribution,
            tensors=tensors,
            identity=identity,
            base_digest=inputs["base"],
            architecture=base.architecture,
            router=router_facts(config),
            training={
                "steps": config.train.num_steps,
                "tokens": config.train.num_steps * config.train.batch_tokens,
                "public_share": config.public_share,
                "calibration_steps": steps,
            },
        )

    on_first(write)
    print(contribution)


def check_copied(model: Transformer, base: ModelDirectory, digest: str, directory: str) -> None:
    """Raises `UserError` where what was read from copies is not the base, as after a disk's silent error."""
    frozen = job_tensor_map(model.config, expert=False)
    found = frozen_digest(model, frozen, base.require_one_dtype(), tokenizer_digest(base.path))

    def compare() -> None:
        if found != digest:
            raise UserError(
                f"a copy of {base.path} in local_copy={directory} holds other weights: delete it there on every node"
            )

    on_first(compare)


def for_calibration(model: Transformer, ranks: Ranks, device: torch.device) -> Transformer:
    """The model with nothing but the owner's rows and biases to train.

    Sharded data parallelism takes what is trained from when it is put on, so there it is another model of the same
    parts.
    """
    if ranks.meshes is None:
        train_only(model, is_row)
        return model
    fresh = build_on_meta(model.config, (1, 1))
    train_only(fresh, is_row)
    for parameter, held in zip(fresh.parameters(), model.parameters(), strict=True):
        parameter.data = parameter.data.to(held.dtype)
    put_beside(fresh, ranks, device)
    with torch.no_grad():
        for parameter, held in zip(fresh.parameters(), model.parameters(), strict=True):
            local_part(parameter)[0].copy_(local_part(held)[0])
    return fresh


def is_row(name: str) -> bool:
    """Whether a parameter is a router row or bias of the owner's."""
    return name.endswith((".router.weight.1", ".router.bias.1"))


def router_facts(config: ExpertConfig) -> dict[str, Any]:
    """What a contribution tells of how its rows came about; no path."""
    router = config.router
    return {
        "bias": router.bias,
        "init": router.init,
        "embedding": router.source,
        "projection": router.projection,
        "documents": sample_size(Path(config.data.dir), router.documents) if router.needs_public_text else None,
        "public_text": router.needs_public_text,
    }


def mixed_windows(config: ExpertConfig, public_share: float) -> TokenWindows | MixedWindows:
    """Own sequences, and public ones among them.

    Trained on own text only, a row learns to claim everything, and the FFN to harm what it claims. Public text among
    the owner's needs nobody else's data and takes most of that away.
    """
    steps = max(config.train.num_steps, config.router.calibration_steps)
    num_own = math.ceil(steps * config.train.batch_sequences * (1 - public_share))
    own = training_windows(config.data, config.train.sequence_length, config.seed, num_own)
    if not public_share:
        return own
    assert config.public_data is not None
    public = TokenWindows(Path(config.public_data), "train", config.train.sequence_length, config.seed, loss_mask=True)
    return MixedWindows(own, public, public_share)


def calibration_config(config: ExpertConfig) -> ExpertConfig:
    """The config of the steps that fit the row and bias alone."""
    train = replace(
        config.train, steps=config.router.calibration_steps, tokens=None, evaluation_interval=None, compile="false"
    )
    optim = replace(
        config.optim, lr=config.router.calibration_lr, router_lr=None, schedule="linear", warmup_steps=0,
        final_lr_ratio=0.0, horizon_steps=None,
    )  # fmt: skip
    return replace(config, train=train, optim=optim, output_dir=str(Path(config.output_dir) / "calibration"))


def job_config(base: ModelConfig, bias: bool) -> ModelConfig:
    return replace(base, num_experts=2, active_experts=2, router_bias=bias)


def build_job(base: ModelDirectory, config: ExpertConfig, device: torch.device) -> tuple[Transformer, Ranks]:
    """The two-expert model: all of the public model, the second FFN a copy of the first, rows as configured."""
    model = build_on_meta(job_config(base.config, config.router.bias).computed_as(config.model), (1, 1))
    train_only(model, lambda name: any(part in name for part in OWN))
    if device.type == "cuda":
        cast_frozen(model, base.require_one_dtype())  # before there is memory behind it: no fp32 copy at any time
    ranks = put_on_ranks(model, config.parallel, config.train.sequence_length, device, (1, 1))
    for expert in (False, True):
        fill(model, job_tensor_map(model.config, expert), base.files)
    start = router_start(
        config.router,
        base.config,
        lambda: load_public(base, ranks, device),
        Path(config.data.dir),
        Path(config.public_data) if config.public_data is not None else None,
        config.train.sequence_length,
        config.seed,
        config.name,
        device,
    )
    rows, biases = on_first(lambda: (start.rows.cpu(), start.biases.cpu()))  # the same to the bit on every rank
    set_rows(model, RouterStart(rows, biases))
    gc.collect()  # the public model, which `fully_shard` has made a cycle of
    return model, ranks


def load_public(base: ModelDirectory, ranks: Ranks, device: torch.device) -> Transformer:
    """The public model, whole streams of which every process sees: all read the same documents."""
    model = build_on_meta(base.config).requires_grad_(False)
    put_beside(model, ranks.without_sequence(), device, torch.float32)  # as in one process
    fill(model, tensor_map(base.config), base.files)
    return model.eval()


@torch.no_grad()
def set_rows(model: Transformer, start: RouterStart) -> None:
    """Public row and bias 0, own row and bias as `start` says."""
    parameters = dict(model.named_parameters())
    for layer in range(model.config.num_layers):
        router = f"blocks.{layer}.feed_forward.router"
        assign(parameters[f"{router}.weight.0"], torch.zeros_like(start.rows[layer][None]))
        assign(parameters[f"{router}.weight.1"], start.rows[layer][None])
        if model.config.router_bias:
            assign(parameters[f"{router}.bias.0"], torch.zeros_like(start.biases[layer][None]))
            assign(parameters[f"{router}.bias.1"], start.biases[layer][None])


def expert_tensors(model: Transformer, dtype: torch.dtype) -> dict[str, Tensor]:
    """The trained part under a contribution's names, in the base's type, on the host; on rank 0 alone it is meant."""
    parameters = dict(model.named_parameters())
    places: dict[str, tuple[str, tuple[int, ...]]] = {}
    for layer in range(model.config.num_layers):
        group = f"blocks.{layer}.feed_forward.groups.1"
        router = f"blocks.{layer}.feed_forward.router"
        places[f"layers.{layer}.gate_proj.weight"] = f"{group}.gate_up", (0, 0)
        places[f"layers.{layer}.up_proj.weight"] = f"{group}.gate_up", (0, 1)
        places[f"layers.{layer}.down_proj.weight"] = f"{group}.down", (0,)
        places[f"layers.{layer}.router.weight"] = f"{router}.weight.1", (0,)
        if model.config.router_bias:
            places[f"layers.{layer}.router.bias"] = f"{router}.bias.1", ()
    tensors = {}
    for name, (parameter, index) in places.items():
        whole = gather_to_first(parameters[parameter], index)
        tensors[name] = whole.detach().to("cpu", dtype) if is_first() else torch.empty(0)
    return tensors
