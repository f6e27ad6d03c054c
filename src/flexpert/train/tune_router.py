"""`flexpert tune_router`: train the router rows of an assembled model, and nothing else (FlexOlmo, router tuning).

Every row moves with the data of every domain in the mix, so an expert that is removed afterwards has left a trace in
the others' rows: `assembly.json` says `"tuned": true` from then on. For a removal without a trace, remove from the
model as it was assembled and tune again without the removed domain.
"""

from dataclasses import replace
from pathlib import Path

import torch

from flexpert.assembly.assemble import write_routers
from flexpert.assembly.record import read_assembly
from flexpert.assembly.remove import write_changed
from flexpert.assembly.tensors import FileRecord
from flexpert.assembly.verify import verify_model
from flexpert.checkpoint.digest import dtype_name, tensor_bytes
from flexpert.checkpoint.directory import ModelDirectory
from flexpert.checkpoint.huggingface import load_model
from flexpert.checkpoint.sharding import gather_to_first
from flexpert.config.accelerators import check_usable
from flexpert.config.stages import TuneRouterConfig
from flexpert.data.dataset import read_manifest
from flexpert.model.moe import set_backend
from flexpert.model.transformer import Transformer
from flexpert.parallel.apply import put_on_ranks
from flexpert.parallel.environment import num_ranks
from flexpert.parallel.process import on_first
from flexpert.parallel.ranks import Ranks
from flexpert.records import sha256_file
from flexpert.stage import check_directory, claim_directory, set_up_process
from flexpert.train.freeze import cast_frozen, train_only
from flexpert.train.loop import Trainer
from flexpert.train.pretrain import check_batch, check_lengths, check_tokenizer


def run(config: TuneRouterConfig, resolved: str) -> None:
    """Train on `data.dir`, a mix of public text and of text like each owner's, and write `output_dir/model`.

    Raises:
        UserError: the model is not one that `assemble` wrote, or was altered since, or data and model have different
            tokenizers.
    """
    source, output = Path(config.model), Path(config.output_dir)
    read_assembly(source)
    manifest = read_manifest(Path(config.data.dir))
    check_directory(output, resolved, config.resume)
    if (output / "model").exists():
        print(f"{output / 'model'} is complete")
        return
    check_batch(config, is_mixture=True)
    device = set_up_process(config.train.device, config.parallel)
    check_usable(config, device.type, num_ranks())
    on_first(lambda: verify_model(source))  # an altered model is not trained on, and not only not copied
    check_tokenizer(source, manifest)
    dtype = ModelDirectory.open(source).require_one_dtype()
    ranks = Ranks()

    def give_memory(model: Transformer) -> None:
        nonlocal ranks
        check_lengths(config.train.sequence_length, model.config.max_sequence_length)
        train_only(model, lambda name: ".router.weight." in name)
        if device.type == "cuda":
            cast_frozen(model, dtype)
        ranks = put_on_ranks(model, config.parallel, config.train.sequence_length, device)

    model, directory = load_model(source, active_experts=config.active_experts, give_memory=give_memory)
    set_backend(model, config.moe_backend, device)
    inputs = {"model": sha256_file(source / "assembly.json")}
    trainer = Trainer(model, config, "tune_router", manifest, device, resolved, inputs=inputs, ranks=ranks)
    on_first(lambda: claim_directory(output, resolved, config.resume))
    trainer.run()
    write_tuned(model, directory, output / "model", dtype)
    print(output / "model")


def write_tuned(model: Transformer, source: ModelDirectory, output: Path, dtype: torch.dtype) -> None:
    """Copy the model, with the routers that are in memory and the k that they were trained for."""
    parameters = dict(model.named_parameters())
    active = model.config.active_experts

    def rows(layer: int, part: str) -> list[bytes]:
        value = gather_to_first(parameters[f"blocks.{layer}.feed_forward.router.{part}.0"].detach())
        return [bytes(tensor_bytes(row)) for row in value.to("cpu", dtype)]

    layers = range(model.config.num_layers)
    weights = [rows(layer, "weight") for layer in layers]
    biases = [rows(layer, "bias") for layer in layers] if model.config.router_bias else None

    def write(directory: Path) -> FileRecord:
        return write_routers(directory, dtype_name(torch.empty(0, dtype=dtype)), weights, biases)

    record = replace(read_assembly(source.path), active_experts=active, tuned=True)
    config = {**source.raw, "num_experts_per_tok": active}
    on_first(lambda: write_changed(source.path, output, record, range(len(record.experts)), config, write))
