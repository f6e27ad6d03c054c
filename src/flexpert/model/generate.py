"""Continue token sequences with a key/value cache."""

import torch
from torch import Tensor

from flexpert.model.transformer import Transformer


def sample(
    logits_BV: Tensor, temperature: float, top_k: int | None, top_p: float, generator: torch.Generator
) -> Tensor:
    """Next tokens [B, 1]: the likeliest where `temperature` is 0, else a draw from the truncated distribution."""
    if temperature == 0:
        return logits_BV.argmax(-1, keepdim=True)
    logits_BV = logits_BV.float() / temperature
    if top_k is not None and top_k < logits_BV.shape[-1]:
        smallest = logits_BV.topk(top_k).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < smallest, float("-inf"))
    if top_p < 1:
        ordered, order = logits_BV.sort(descending=True)
        probs = ordered.softmax(-1)
        outside = probs.cumsum(-1) - probs >= top_p  # the likeliest token is never outside
        logits_BV = logits_BV.masked_fill(outside.gather(1, order.argsort(1)), float("-inf"))
    return torch.multinomial(logits_BV.softmax(-1), 1, generator=generator)


@torch.no_grad()
def generate(
    model: Transformer,
    prompt_BS: Tensor,
    max_new_tokens: int,
    eos_id: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
) -> Tensor:
    """New tokens [B, ≤ max_new_tokens] after prompts of equal length; after its end-of-text a row repeats it.

    The context is the model's longest: generation stops there.
    """
    batch, length = prompt_BS.shape
    capacity = min(length + max_new_tokens, model.config.max_sequence_length)
    caches = model.new_caches(batch, capacity)
    generator = torch.Generator(prompt_BS.device).manual_seed(seed)
    finished = torch.zeros(batch, 1, dtype=torch.bool, device=prompt_BS.device)
    new, tokens = [], prompt_BS
    for _ in range(capacity - length):
        stream = model(tokens, caches=caches).stream_BSD[:, -1]
        tokens = sample(model.head(stream), temperature, top_k, top_p, generator)
        tokens = tokens.masked_fill(finished, eos_id)
        new.append(tokens)
        finished |= tokens == eos_id
        if finished.all():
            break
    return torch.cat(new, 1) if new else prompt_BS[:, :0]
