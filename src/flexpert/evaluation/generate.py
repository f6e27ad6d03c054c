"""`flexpert generate`: continue one prompt, or many in batches, with any choice of experts."""

import json
import sys
from pathlib import Path

import torch

from flexpert.checkpoint.directory import ModelDirectory
from flexpert.checkpoint.huggingface import load_model
from flexpert.config.stages import GenerateConfig
from flexpert.data.tokenizer import Tokenizer, load_tokenizer
from flexpert.errors import UserError
from flexpert.model.generate import Decoder, generate, store_for_batches
from flexpert.model.moe import set_backend
from flexpert.model.transformer import Transformer
from flexpert.parallel.apply import put_for_inference, ranks_for_inference
from flexpert.parallel.generate import ParallelDecoder
from flexpert.parallel.process import on_first
from flexpert.parallel.ranks import ALONE
from flexpert.parallel.tensor import local
from flexpert.stage import set_up_process


def run(config: GenerateConfig, resolved: str) -> None:
    """Print prompt and continuation; of `prompts_file`, a JSON line for each prompt, in their order.

    Raises:
        UserError: prompts that cannot be read, an empty one, or one that leaves no room in the model's context.
    """
    device = set_up_process(config.device, config.parallel)
    tokenizer = load_tokenizer(Path(config.model))
    many = config.prompts_file is not None
    prompts = on_first(lambda: read_prompts(config))
    encoded = tokenizer.encode_batch(prompts)
    ranks = ranks_for_inference(config.parallel, device, ModelDirectory.open(Path(config.model)).config)

    def give_memory(model: Transformer) -> None:
        put_for_inference(model, ranks, device, one_batch=True)
        set_backend(model, config.moe_backend, device)

    model, _ = load_model(
        Path(config.model),
        exclude=config.exclude,
        active_experts=config.active_experts,
        device=device,
        dtype=None,
        give_memory=give_memory,
    )
    for number, ids in enumerate(encoded, start=1):
        name = f"prompt {number} of {config.prompts_file}" if many else "the prompt"
        if not ids:
            remedy = "" if many else ": give prompt=TEXT, prompt_file=FILE, or text on standard input"
            raise UserError(f"{name} is empty{remedy}")
        if len(ids) >= model.config.max_sequence_length:
            raise UserError(f"{name} has {len(ids)} tokens; the model's context is {model.config.max_sequence_length}")
    batch_size = min(config.batch_size, len(prompts))
    takes_columns = config.moe_backend not in ("grouped_mm", "triton")  # which ask for rows
    if batch_size > 1 and device.type == "cpu" and ranks == ALONE and takes_columns:
        store_for_batches(model)
    for first in range(0, len(prompts), batch_size):
        batch = slice(first, first + batch_size)
        decoder = Decoder if ranks == ALONE else ParallelDecoder
        texts = continuations(model, tokenizer, encoded[batch], first, config, decoder)
        for prompt, text in zip(prompts[batch], texts, strict=True):
            row = {"prompt": prompt, "text": text}
            print(json.dumps(row, ensure_ascii=False) if many else prompt + text, flush=True)


def continuations(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    first: int,
    config: GenerateConfig,
    decoder: type[Decoder],
) -> list[str]:
    """What the model says after a batch of prompts, of which the first has the number `first` among all."""
    width = max(map(len, prompts))
    padded = [[tokenizer.eos_id] * (width - len(ids)) + ids for ids in prompts]
    new_BN = generate(
        model,
        torch.tensor(padded, device=local(model.head.weight).device),
        config.max_new_tokens,
        tokenizer.eos_id,
        lengths=[len(ids) for ids in prompts],
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        seed=config.seed,
        first=first,
        decoder=decoder,
    )
    rows = [[*row, tokenizer.eos_id] for row in new_BN.tolist()]
    return [tokenizer.decode(row[: row.index(tokenizer.eos_id)]) for row in rows]


def read_prompt(config: GenerateConfig) -> str:
    """The prompt from the command line, a file or standard input."""
    if config.prompt_file is not None:
        try:
            return Path(config.prompt_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"prompt_file={config.prompt_file} cannot be read: {error}") from None
    if config.prompt != "-":
        return config.prompt
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not UTF-8 text: {error.reason}") from None


def read_prompts(config: GenerateConfig) -> list[str]:
    """The prompts of a file of JSON lines, of which blank ones hold none; without such a file, the only one."""
    if config.prompts_file is None:
        return [read_prompt(config)]
    path = Path(config.prompts_file)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompts_file={path} cannot be read: {error}") from None
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} line {number} is not JSON: {error}") from None
        prompt = row.get("prompt") if isinstance(row, dict) else None
        # JSON can spell half of a surrogate pair, which is no text.
        if not isinstance(prompt, str) or any("\ud800" <= char <= "\udfff" for char in prompt):
            raise UserError(f"{path} line {number} has no text field 'prompt'")
        prompts.append(prompt)
    if not prompts:
        raise UserError(f"prompts_file={path} holds no prompt")
    return prompts
