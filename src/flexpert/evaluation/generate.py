"""`flexpert generate`: continue a prompt, with any choice of experts."""

import sys
from pathlib import Path

import torch

from flexpert.checkpoint.huggingface import load_model
from flexpert.config.stages import GenerateConfig
from flexpert.data.tokenizer import load_tokenizer
from flexpert.errors import UserError
from flexpert.model.generate import generate
from flexpert.stage import set_up_process


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


def run(config: GenerateConfig, resolved: str) -> None:
    """Print prompt and continuation.

    Raises:
        UserError: an empty prompt, or one that leaves no room in the model's context.
    """
    device = set_up_process(config.device, config.parallel.threads)
    tokenizer = load_tokenizer(Path(config.model))
    prompt = read_prompt(config)
    ids = tokenizer.encode(prompt)
    if not ids:
        raise UserError("the prompt is empty: give prompt=TEXT, prompt_file=FILE, or text on standard input")
    model, _ = load_model(
        Path(config.model), exclude=config.exclude, active_experts=config.active_experts, device=device
    )
    if len(ids) >= model.config.max_sequence_length:
        raise UserError(f"the prompt has {len(ids)} tokens; the model's context is {model.config.max_sequence_length}")
    new = generate(
        model,
        torch.tensor([ids], device=device),
        config.max_new_tokens,
        tokenizer.eos_id,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        seed=config.seed,
    )[0].tolist()
    if new and new[-1] == tokenizer.eos_id:
        new.pop()
    print(prompt + tokenizer.decode(new))
