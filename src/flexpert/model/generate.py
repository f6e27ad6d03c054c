"""Continue token sequences with a key/value cache, several at a time.

The prompts run through the model's own modules. After them each step reads every weight for the sake of one token a
sequence, and on a CPU what is not a matrix product soon costs as much as the products: the `…_step` functions below
compute what the modules do, in fewer operations and with every weight looked up once.

Shapes: B sequences, R some of them, S positions, N new tokens, D residual width, H heads, G key/value heads, C = D / H,
V vocabulary, E experts (of a group), F FFN width.
"""

import hashlib
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexpert.model.attention import Attention, KeyValueCache, rotary_tables
from flexpert.model.moe import ExpertGroup, FeedForward, MixtureOfExperts
from flexpert.model.norm import RMSNorm
from flexpert.model.router import Router
from flexpert.model.transformer import Block, Transformer

#: A part of a block for one token of every sequence, [B, D] → [B, D].
Step = Callable[[Tensor], Tensor]
#: The same where attention is part of it: (x_BD, cosines, signed sines, mask) → [B, D].
AttentionStep = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def generate(
    model: Transformer,
    prompt_BS: Tensor,
    max_new_tokens: int,
    eos_id: int,
    *,
    lengths: Sequence[int] | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    first: int = 0,
    decoder: "type[Decoder] | None" = None,
) -> Tensor:
    """New tokens [B, N ≤ max_new_tokens]; behind its end a row is filled with `eos_id`.

    A row ends with `eos_id`, or where the model's longest context is full. What it says does not depend on the rows
    beside it, but for the rounding of products, which differs with the number of rows.

    Args:
        prompt_BS: prompts that leave room in the context; shorter ones stand behind padding, which may be any id.
        lengths: tokens of each prompt; None: all have S.
        temperature, top_k, top_p: as in `sample`.
        seed, first: the row with index b draws from a generator of its own, seeded with (seed, first + b).
        decoder: what runs the model; None: `Decoder`. `flexpert.parallel` has one of several processes.
    """
    batch, width = prompt_BS.shape
    make_decoder = decoder or Decoder
    lengths = [width] * batch if lengths is None else lengths
    room = [min(max_new_tokens, model.config.max_sequence_length - length) for length in lengths]
    assert min(room) > 0, "callers refuse prompts that fill the context"
    new_BN = torch.full((batch, max(room)), eos_id, device=prompt_BS.device)
    generators = [row_generator(seed, first + row, prompt_BS.device) for row in range(batch)]
    rows, end = list(range(batch)), 0  # the rows that have not ended
    with torch.inference_mode():
        running = make_decoder(model, lengths, width, width + max(room))
        logits_BV = running.read(prompt_BS)
        while rows:
            tokens_B = sample(logits_BV, temperature, top_k, top_p, [generators[row] for row in rows])
            new_BN[rows, end] = tokens_B
            end += 1
            kept = [
                place
                for place, (row, token) in enumerate(zip(rows, tokens_B.tolist(), strict=True))
                if token != eos_id and end < room[row]
            ]
            if len(kept) < len(rows):
                rows, tokens_B = [rows[place] for place in kept], tokens_B[kept]
                running.keep(kept)
            if rows:
                logits_BV = running.step(tokens_B)
    return new_BN[:, :end]


def row_generator(seed: int, index: int, device: torch.device) -> torch.Generator:
    # Hashed, because a CPU generator takes no more than 32 bits: sums of the two would give prompts the same draws.
    digest = hashlib.sha256(f"{seed}/{index}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:4], "big"))


def sample(
    logits_BV: Tensor, temperature: float, top_k: int | None, top_p: float, generators: Sequence[torch.Generator]
) -> Tensor:
    """Next tokens [B]: the likeliest where `temperature` is 0, else a draw from the truncated softmax.

    As in transformers: the temperature first, then the `top_k` likeliest tokens, then of these the fewest that hold
    `top_p` of their probability.
    """
    if temperature == 0:
        return logits_BV.argmax(-1)
    logits_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)).float() / temperature  # no overflow near 0
    if top_k is not None and top_k < logits_BV.shape[-1]:
        smallest = logits_BV.topk(top_k).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < smallest, float("-inf"))
    if top_p < 1:
        ordered, order = logits_BV.sort(descending=True)
        probs = ordered.softmax(-1)
        outside = probs.cumsum(-1) - probs >= top_p  # the likeliest token is never outside
        logits_BV = logits_BV.masked_fill(torch.empty_like(outside).scatter_(1, order, outside), float("-inf"))
    # One draw of `multinomial` is a race between tokens, each with its own noise, which rounding hardly ever decides.
    draws = [torch.multinomial(p_V, 1, generator=g) for p_V, g in zip(logits_BV.softmax(-1), generators, strict=True)]
    return torch.cat(draws)


def store_for_batches(model: Transformer) -> None:
    """Store the matrices column by column, in place; their values and shapes remain.

    On a CPU, a product of a few rows then takes a quarter to a half less time (measured for 8); that of one, the same.
    """
    for name, parameter in model.named_parameters():
        if name.endswith("gate_up"):  # [E, 2, F, D]: of an expert or of all, the rows of one product
            parameter.data = parameter.data.flatten(0, 2).mT.contiguous().mT.view(parameter.shape)
        elif parameter.ndim > 1 and not name.startswith("embedding"):
            parameter.data = parameter.data.mT.contiguous().mT


class Decoder:
    """A model, and the key/value caches of the sequences that it continues.

    Args:
        lengths: tokens of each prompt.
        width: S, the longest; the columns before a shorter prompt are padding, which none of its tokens sees.
        capacity: S and the longest continuation.
    """

    def __init__(self, model: Transformer, lengths: Sequence[int], width: int, capacity: int) -> None:
        device = model.head.weight.device
        self.model, self.width = model, width
        self.caches = model.new_caches(len(lengths), capacity)
        self.position_B = torch.tensor(lengths, device=device)  # of the next token
        self.cos_SC, self.sin_SC = rotary_tables(model.config, torch.arange(capacity, device=device))
        self.visible_BS = None
        if min(lengths) < width:
            self.visible_BS = torch.arange(capacity, device=device) >= (width - self.position_B)[:, None]
        self.steps = self.block_steps()

    def block_steps(self) -> list[AttentionStep]:
        return [block_step(block, cache) for block, cache in zip(self.model.blocks, self.caches, strict=True)]

    def read(self, prompt_BS: Tensor) -> Tensor:
        """Logits [B, V] behind the prompts."""
        columns = torch.arange(self.width, device=prompt_BS.device)
        mask_B1SS = None
        if self.visible_BS is not None:
            seen_BSS = self.visible_BS[:, None, : self.width] & (columns <= columns[:, None])
            # Padding sees itself: a softmax over nothing is not a number.
            mask_B1SS = (seen_BSS | torch.eye(self.width, dtype=torch.bool, device=columns.device))[:, None]
        positions_BS = (columns - self.width + self.position_B[:, None]).clamp(min=0)
        rotary = self.cos_SC[positions_BS][:, None], self.sin_SC[positions_BS][:, None]
        x_BSD = self.model.embedding(prompt_BS)
        for block, cache in zip(self.model.blocks, self.caches, strict=True):
            x_BSD, _ = block(x_BSD, rotary, mask_B1SS, cache)
        return self.logits(x_BSD[:, -1])

    def step(self, token_B: Tensor) -> Tensor:
        """Logits [B, V] behind one more token of every sequence."""
        cos_B1C, sin_B1C = self.cos_SC[self.position_B][:, None], self.sin_SC[self.position_B][:, None]
        first, second = sin_B1C.chunk(2, -1)
        signed_sin_B1C = torch.cat((-first, second), -1)
        end = self.caches[0].length + 1
        mask_B11S = None if self.visible_BS is None else self.visible_BS[:, None, None, :end]
        x_BD = self.model.embedding(token_B)
        for step in self.steps:
            x_BD = step(x_BD, cos_B1C, signed_sin_B1C, mask_B11S)
        self.position_B = self.position_B + 1
        return self.logits(x_BD)

    def logits(self, x_BD: Tensor) -> Tensor:
        return F.linear(self.model.norm(x_BD), self.model.head.weight)

    def keep(self, rows: list[int]) -> None:
        """Go on with these sequences only."""
        self.position_B = self.position_B[rows]
        self.visible_BS = None if self.visible_BS is None else self.visible_BS[rows]
        for cache in self.caches:
            cache.keep(rows)


def block_step(block: nn.Module, cache: KeyValueCache) -> AttentionStep:
    assert isinstance(block, Block)
    attend, attention_norm = attention_step(block.attention, cache), norm_step(block.attention_norm)
    feed_forward, feed_forward_norm = feed_forward_step(block.feed_forward), norm_step(block.feed_forward_norm)

    def step(x_BD: Tensor, cos_B1C: Tensor, signed_sin_B1C: Tensor, mask_B11S: Tensor | None) -> Tensor:
        h_BD = x_BD + attention_norm(attend(x_BD, cos_B1C, signed_sin_B1C, mask_B11S))
        return h_BD + feed_forward_norm(feed_forward(h_BD))

    return step


def attention_step(attention: Attention, cache: KeyValueCache) -> AttentionStep:
    """Takes the sines with the sign of `apply_rotary`'s first half; the mask is True for columns that are seen."""
    q_weight, k_weight, v_weight = attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight
    o_weight, head_dim = attention.o_proj.weight, attention.head_dim
    query_norm, key_norm = norm_step(attention.q_norm), norm_step(attention.k_norm)
    heads, kv_heads = len(q_weight) // head_dim, len(k_weight) // head_dim

    def step(x_BD: Tensor, cos_B1C: Tensor, signed_sin_B1C: Tensor, mask_B11S: Tensor | None) -> Tensor:
        batch = len(x_BD)
        query, key = query_norm(F.linear(x_BD, q_weight)), key_norm(F.linear(x_BD, k_weight))
        both_BHC = torch.cat((query, key), -1).view(batch, heads + kv_heads, head_dim)  # one rotation for both
        swapped_BHC = both_BHC.roll(head_dim // 2, -1)
        both_BHC = torch.addcmul(both_BHC * cos_B1C, swapped_BHC, signed_sin_B1C).to(x_BD.dtype)
        query_BH1C, key_BG1C = torch.split(both_BHC.unsqueeze(2), [heads, kv_heads], dim=1)
        value_BG1C = F.linear(x_BD, v_weight).view(batch, kv_heads, 1, head_dim)
        key_BGSC, value_BGSC = cache.append(key_BG1C, value_BG1C)
        out_BH1C = F.scaled_dot_product_attention(
            query_BH1C, key_BGSC, value_BGSC, attn_mask=mask_B11S, enable_gqa=heads != kv_heads
        )
        return F.linear(out_BH1C.reshape(batch, -1), o_weight)

    return step


def norm_step(norm: RMSNorm) -> Step:
    weight_D, shape, eps = norm.weight.float(), norm.weight.shape, norm.eps
    return lambda x_BD: F.rms_norm(x_BD.float(), shape, weight_D, eps).to(x_BD.dtype)


def feed_forward_step(feed_forward: nn.Module) -> Step:
    if isinstance(feed_forward, MixtureOfExperts):
        return (all_experts_step if feed_forward.all_active else chosen_experts_step)(feed_forward)
    assert isinstance(feed_forward, FeedForward)
    gate_FD, up_FD = feed_forward.gate_proj.weight, feed_forward.up_proj.weight
    down_DF = feed_forward.down_proj.weight
    return lambda x_BD: F.linear(F.silu(F.linear(x_BD, gate_FD)).mul_(F.linear(x_BD, up_FD)), down_DF)


def router_step(router: Router) -> Step:
    """[B, D] → the probabilities of all experts [B, E], fp32."""
    weight_ED = torch.cat([rows.float() for rows in router.weight])
    bias_E = torch.cat([bias.float() for bias in router.bias]).clamp(max=0) if len(router.bias) else None
    return lambda x_BD: F.linear(x_BD.float(), weight_ED, bias_E).softmax(-1)


def all_experts_step(mixture: MixtureOfExperts) -> Step:
    """One product for what all experts of a group do first."""
    route, groups = router_step(mixture.router), expert_groups(mixture)
    sizes = [len(group.down) for group in groups]
    weights = [(group.gate_up.flatten(0, 2), group.down.unbind()) for group in groups]
    ffn_width = groups[0].down.shape[2]

    def step(x_BD: Tensor) -> Tensor:
        probs = torch.split(route(x_BD).to(x_BD.dtype).unsqueeze(-1), sizes, dim=1)
        y_BD = torch.zeros_like(x_BD)
        for probs_BE1, (gate_up, downs) in zip(probs, weights, strict=True):
            gate_BEF, up_BEF = F.linear(x_BD, gate_up).view(len(x_BD), -1, 2, ffn_width).unbind(2)
            hidden_BEF = F.silu(gate_BEF).mul_(up_BEF).mul_(probs_BE1)
            for hidden_BF, down_DF in zip(hidden_BEF.unbind(1), downs, strict=True):
                y_BD += F.linear(hidden_BF, down_DF)
        return y_BD

    return step


def chosen_experts_step(mixture: MixtureOfExperts) -> Step:
    """An expert that no sequence chose is not read, and nothing is sorted."""
    route, num_active = router_step(mixture.router), mixture.router.top_k
    weights = [pair for g in expert_groups(mixture) for pair in zip(g.gate_up.flatten(1, 2), g.down, strict=True)]

    def step(x_BD: Tensor) -> Tensor:
        probs_BE = route(x_BD)
        chosen = probs_BE.topk(num_active).indices.tolist()
        probs_EB1 = probs_BE.to(x_BD.dtype).T.unsqueeze(-1).unbind()
        y_BD = torch.zeros_like(x_BD)
        for expert, (probs_B1, (gate_up, down_DF)) in enumerate(zip(probs_EB1, weights, strict=True)):
            rows = [row for row, active in enumerate(chosen) if expert in active]
            if rows:
                rows_R = slice(None) if len(rows) == len(chosen) else torch.tensor(rows, device=x_BD.device)
                gate_RF, up_RF = F.linear(x_BD[rows_R], gate_up).chunk(2, -1)
                y_BD[rows_R] += F.linear(F.silu(gate_RF).mul_(up_RF).mul_(probs_B1[rows_R]), down_DF)
        return y_BD

    return step


def expert_groups(mixture: MixtureOfExperts) -> list[ExpertGroup]:
    return [group for group in mixture.groups if isinstance(group, ExpertGroup)]
