"""`flexpert pretrain`: a dense public model, from random weights or onwards from an existing model."""

from dataclasses import replace
from pathlib import Path

import torch

from flexpert.checkpoint.digest import tokenizer_digest
from flexpert.checkpoint.directory import ModelDirectory
from flexpert.checkpoint.distributed import directory_of_all
from flexpert.checkpoint.huggingface import fill, save_model, tensor_map
from flexpert.checkpoint.sharding import assign
from flexpert.config.accelerators import check_usable
from flexpert.config.stages import PretrainConfig, TrainingStage
from flexpert.data.dataset import DataManifest, read_manifest
from flexpert.data.mixture import training_windows
from flexpert.data.tokenizer import load_tokenizer
from flexpert.errors import UserError
from flexpert.model.transformer import Transformer, build_on_meta, initialise
from flexpert.parallel.apply import layout_of, put_on_ranks
from flexpert.parallel.environment import num_ranks
from flexpert.parallel.process import on_first
from flexpert.parallel.ranks import Ranks
from flexpert.stage import check_directory, claim_directory, set_up_process
from flexpert.train.loop import Trainer

VOCAB_MULTIPLE = 128


def run(config: PretrainConfig, resolved: str) -> None:
    """Train, and write `output_dir/model` as an `Olmo2ForCausalLM` directory."""
    manifest = read_manifest(Path(config.data.dir))
    output = Path(config.output_dir)
    check_batch(config, is_mixture=False)
    device = set_up_process(config.train.device, config.parallel)
    check_usable(config, device.type, num_ranks())
    check_directory(output, resolved, config.resume)
    if (output / "model").exists():
        print(f"{output / 'model'} is complete")
        return
    num_sequences = config.train.num_steps * config.train.batch_sequences
    windows = training_windows(config.data, config.train.sequence_length, config.seed, num_sequences)
    build = build_model if config.base is None else load_base
    model, ranks = build(config, manifest, device)
    trainer = Trainer(model, config, "pretrain", manifest, device, resolved, windows, ranks=ranks)
    on_first(lambda: claim_directory(output, resolved, config.resume))
    trainer.run()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with directory_of_all(output / "model") as directory:
        save_model(trainer.model, directory, load_tokenizer(manifest.tokenizer_dir), dtype)
    print(output / "model")


def check_batch(config: TrainingStage, is_mixture: bool) -> None:
    """Raises `UserError` where the sequences of a step cannot be dealt out to the processes."""
    train, number = config.train, layout_of(config.parallel, is_mixture).data or 1
    share, rest = divmod(train.batch_sequences, number)
    if rest or (share > train.microbatch_sequences and share % train.microbatch_sequences):
        raise UserError(
            f"train.batch_tokens={train.batch_tokens} is {train.batch_sequences} sequences, which {number} processes "
            f"with microbatches of {train.microbatch_sequences} cannot share: change "
            "train.microbatch_sequences, or make it a multiple of "
            f"{number * train.microbatch_sequences * train.sequence_length} tokens"
        )


def build_model(config: PretrainConfig, manifest: DataManifest, device: torch.device) -> tuple[Transformer, Ranks]:
    """Random weights; the vocabulary is the tokenizer's where the model does not say."""
    check_lengths(config.train.sequence_length, config.model.max_sequence_length)
    vocab = config.model.vocab_size or -(-manifest.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    if vocab < manifest.vocab_size:
        raise UserError(
            f"model.vocab_size={vocab} is smaller than the {manifest.vocab_size} tokens of the tokenizer in "
            f"{manifest.directory}; set model.vocab_size=null to take the tokenizer's"
        )
    model = build_on_meta(replace(config.model, vocab_size=vocab))
    ranks = put_on_ranks(model, config.parallel, config.train.sequence_length, device)
    initialise(model, config.seed, assign)
    return model, ranks


def load_base(config: PretrainConfig, manifest: DataManifest, device: torch.device) -> tuple[Transformer, Ranks]:
    """An existing dense model, made trainable."""
    assert config.base is not None
    directory = ModelDirectory.open(Path(config.base))
    if directory.experts:
        raise UserError(f"base={config.base} is a mixture; pretrain goes on from dense models only")
    check_lengths(config.train.sequence_length, directory.config.max_sequence_length)
    check_tokenizer(Path(config.base), manifest)
    model = build_on_meta(replace(directory.config.computed_as(config.model), linear=config.model.linear))
    ranks = put_on_ranks(model, config.parallel, config.train.sequence_length, device)
    fill(model, tensor_map(directory.config), directory.files)
    return model, ranks


def check_lengths(sequence_length: int, longest: int) -> None:
    if sequence_length > longest:
        raise UserError(f"train.sequence_length={sequence_length} is more than the model's longest context, {longest}")


def check_tokenizer(model: Path, manifest: DataManifest) -> None:
    """Raises `UserError` when the data was prepared with another tokenizer than the model's, or does not fit it."""
    if ModelDirectory.open(model).config.vocab < manifest.vocab_size:
        raise UserError(f"{model} has fewer rows of embedding than the {manifest.vocab_size} tokens of its tokenizer")
    if tokenizer_digest(model) != manifest.tokenizer_digest:
        raise UserError(
            f"the data in {manifest.directory} was tokenised with another tokenizer than {model} has: "
            f"prepare it again with tokenizer={model}"
        )
    eos_id = load_tokenizer(model).eos_id
    if eos_id != manifest.eos_id:
        raise UserError(
            f"documents in {manifest.directory} end in {manifest.eos_id}, and the tokenizer of {model} has the "
            f"end-of-text id {eos_id}: prepare them again with tokenizer={model}"
        )
