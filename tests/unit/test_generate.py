"""Generation: with a cache as without, in a batch as alone, and every draw as its settings say."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flexpert_kernels.moe import dispatch

from flexpert.checkpoint.huggingface import save_model
from flexpert.cli import run_stage
from flexpert.config.groups import ModelConfig
from flexpert.config.stages import MOE_BACKENDS
from flexpert.data.tokenizer import load_tokenizer
from flexpert.errors import UserError
from flexpert.model.generate import Decoder, generate, sample, store_for_batches
from flexpert.model.transformer import Transformer, build_on_meta, initialise

VOCABULARY, CONTEXT = 101, 48
SHAPE = ModelConfig(
    hidden_size=24,
    num_layers=3,
    num_heads=4,
    intermediate_size=36,
    vocab_size=VOCABULARY,
    max_sequence_length=CONTEXT,
    initializer_range=0.2,
)
KINDS = {
    "dense": replace(SHAPE),
    "dense, grouped queries": replace(SHAPE, num_kv_heads=2),
    "all of 3": replace(SHAPE, num_experts=3, active_experts=3),
    "2 of 5": replace(SHAPE, num_experts=5, active_experts=2),
    "1 of 3, with a bias": replace(SHAPE, num_experts=3, active_experts=1, router_bias=True),
}
LENGTHS = [9, 1, 14, 9, 5]


def make(kind: str, groups: tuple[int, ...] | None = None, **shape: int) -> Transformer:
    model = build_on_meta(replace(KINDS[kind], **shape), groups).to_empty(device="cpu")
    initialise(model, seed=7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "router.bias" in name:  # at 1 and 0 they would do nothing
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.2)
    return model.requires_grad_(False)


def random_prompts(lengths: list[int], seed: int = 3) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def padded(prompts: list[list[int]]) -> torch.Tensor:
    width = max(map(len, prompts))
    return torch.tensor([[50] * (width - len(prompt)) + prompt for prompt in prompts])


def recomputed(model: Transformer, prompt: list[int], count: int) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens and their logits [count, V], the whole text run through the model for each."""
    tokens, rows = list(prompt), []
    for _ in range(count):
        rows.append(model.logits(torch.tensor([tokens]))[0, -1])
        tokens.append(int(rows[-1].argmax()))
    return tokens[len(prompt) :], torch.stack(rows)


@pytest.mark.parametrize(
    ("kind", "groups"), [*((kind, None) for kind in KINDS), ("all of 3", (1, 2)), ("2 of 5", (2, 3))]
)
def test_the_cache_changes_nothing(kind: str, groups: tuple[int, ...] | None) -> None:
    """Tokens exactly, logits to 1e-5, for prompts of several lengths in one batch; also where columns are stored first
    and where experts are held in groups."""
    model, prompts = make(kind, groups), random_prompts(LENGTHS)
    wanted = [recomputed(model, prompt, 12) for prompt in prompts]
    for _ in range(2):
        new = generate(model, padded(prompts), 12, -1, lengths=LENGTHS)
        assert new.tolist() == [tokens for tokens, _ in wanted]
        with torch.inference_mode():
            decoder = Decoder(model, LENGTHS, max(LENGTHS), max(LENGTHS) + 12)
            logits = [decoder.read(padded(prompts)), *(decoder.step(column) for column in new[:, :-1].T)]
        expected = torch.stack([rows for _, rows in wanted], dim=1)
        assert (torch.stack(logits) - expected).abs().max() <= 1e-5
        store_for_batches(model)


def test_storing_columns_first_changes_no_value() -> None:
    for kind in KINDS:
        model, stored = make(kind), make(kind)
        store_for_batches(stored)
        for (name, before), after in zip(model.named_parameters(), stored.parameters(), strict=True):
            assert torch.equal(before, after) and before.shape == after.shape, name
        assert not stored.head.weight.is_contiguous() and stored.head.weight.T.is_contiguous()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_in_a_batch_is_continued_as_alone(kind: str, temperature: float) -> None:
    """Rows have other lengths, end at other steps, and are at other places of other batches."""
    model, prompts = make(kind), random_prompts(LENGTHS)
    settings = {"temperature": temperature, "top_k": 30, "top_p": 0.95, "seed": 5}
    free = [generate(model, torch.tensor([p]), 20, -1, first=i, **settings)[0].tolist() for i, p in enumerate(prompts)]
    eos_id = free[2][4]  # a token that ends the third row, and others where they happen to say it
    alone = [row[: row.index(eos_id)] if eos_id in row else row for row in free]
    assert len({len(row) for row in alone}) > 1
    for size in (2, 5):
        for first in range(0, len(prompts), size):
            part = prompts[first : first + size]
            new = generate(model, padded(part), 20, eos_id, lengths=list(map(len, part)), first=first, **settings)
            for row, wanted in zip(new.tolist(), alone[first:], strict=False):
                assert row[: len(wanted)] == wanted
                assert set(row[len(wanted) :]) <= {eos_id}


def test_a_full_context_ends_a_row() -> None:
    model = make("2 of 5")
    lengths = [CONTEXT - 1, CONTEXT - 6, 7]
    prompts = random_prompts(lengths)
    new = generate(model, padded(prompts), 10, -1, lengths=lengths).tolist()
    for row, prompt, count in zip(new, prompts, (1, 6, 10), strict=True):
        assert row == recomputed(model, prompt, count)[0] + [-1] * (10 - count)
    assert generate(model, torch.tensor(prompts[:1]), 10, -1).shape == (1, 1)


def draws(logits: list[float], count: int, **settings: float | int | None) -> torch.Tensor:
    """Relative frequencies of `count` tokens."""
    rows = torch.tensor(logits).expand(count, -1)
    generators = [torch.Generator().manual_seed(index) for index in range(count)]
    chosen = sample(rows, **({"temperature": 1.0, "top_k": None, "top_p": 1.0} | settings), generators=generators)  # type: ignore[arg-type]
    return torch.bincount(chosen, minlength=len(logits)) / count


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, [0.4, 0.1, 0.3, 0.2]),
        ({"temperature": 0.5}, [16 / 30, 1 / 30, 9 / 30, 4 / 30]),
        ({"top_k": 2}, [4 / 7, 0, 3 / 7, 0]),
        ({"top_p": 0.75}, [4 / 9, 0, 3 / 9, 2 / 9]),
        ({"top_k": 3, "top_p": 0.5}, [4 / 7, 0, 3 / 7, 0]),
        ({"top_k": 9}, [0.4, 0.1, 0.3, 0.2]),
        ({"top_k": 1}, [1, 0, 0, 0]),
        ({"top_p": 1e-9}, [1, 0, 0, 0]),
        ({"temperature": 1e-30}, [1, 0, 0, 0]),
        ({"temperature": 0.0}, [1, 0, 0, 0]),
    ],
)
def test_tokens_are_drawn_from_the_distribution_that_the_settings_name(
    settings: dict[str, float], wanted: list[float]
) -> None:
    """Over 4000 draws a frequency is within four standard deviations; what is truncated never occurs."""
    found = draws([math.log(p) for p in (0.4, 0.1, 0.3, 0.2)], 4000, **settings)
    for frequency, p in zip(found.tolist(), wanted, strict=True):
        assert abs(frequency - p) <= 4 * (p * (1 - p) / 4000) ** 0.5 + 1e-6


def test_sampling_is_reproducible_and_greedy_at_its_limits() -> None:
    model, prompts = make("2 of 5"), torch.tensor(random_prompts([8, 8, 8]))
    drawn = [generate(model, prompts, 20, -1, temperature=1.0, seed=seed) for seed in (0, 0, 1, 2**32 - 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert len({tuple(new.flatten().tolist()) for new in drawn}) == 3
    same = prompts[:1].expand(3, -1)  # rows with one prompt have draws of their own
    assert len({tuple(row) for row in generate(model, same, 20, -1, temperature=1.0).tolist()}) == 3
    greedy = generate(model, prompts, 20, -1)
    for limit in ({"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-6}):
        assert torch.equal(generate(model, prompts, 20, -1, **({"temperature": 1.0} | limit)), greedy)


@pytest.mark.parametrize("settings", [[], ["temperature=1", "top_k=50", "seed=3"]])
def test_a_file_of_prompts(settings: list[str], road: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One JSON line for each, in order, the same for every batch size, and what each prompt alone would get."""
    model, prompts = f"model={road}/public/model", ["the cat", "nine birds sat on a mat and saw", 'ä "b"\n', "a"] * 2
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n\n".join(json.dumps({"prompt": prompt}) for prompt in prompts) + "\n")
    capsys.readouterr()
    found = []
    for size in (1, 3, 100):
        run_stage("generate", [model, f"prompts_file={file}", "max_new_tokens=9", f"batch_size={size}", *settings])
        found.append([json.loads(line) for line in capsys.readouterr().out.splitlines()])
    assert found[0] == found[1] == found[2]
    assert [row["prompt"] for row in found[0]] == prompts
    run_stage("generate", [model, f"prompt={prompts[0]}", "max_new_tokens=9", *settings])
    assert capsys.readouterr().out == prompts[0] + found[0][0]["text"] + "\n"
    repeated = [row["text"] for row in found[0][4:]] == [row["text"] for row in found[0][:4]]
    assert repeated == (not settings)


def test_every_backend_of_the_experts_gives_the_same_text(
    road: Path,
    tmp_path: Path,
    refused: Callable[..., object],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And standard output is text alone: which one was chosen is told elsewhere."""
    monkeypatch.setattr(dispatch, "told", set())
    (tmp_path / "mixture").mkdir()
    tokenizer = load_tokenizer(road / "public/model")
    save_model(make("2 of 5", vocab_size=300), tmp_path / "mixture", tokenizer, torch.float32)
    file = tmp_path / "prompts.jsonl"
    prompts = ["the cat", "nine", "a mat and"]
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    settings = [f"model={tmp_path}/mixture", f"prompts_file={file}", "max_new_tokens=9", "device=cpu"]
    capsys.readouterr()
    found, notes = set(), []
    for backend in MOE_BACKENDS[:-1]:
        run_stage("generate", [*settings, f"moe_backend={backend}"])
        printed = capsys.readouterr()
        found.add(printed.out)
        notes.append(printed.err)
    assert len(found) == 1 and [json.loads(line)["prompt"] for line in found.pop().splitlines()] == prompts
    assert notes == ["note: expert layers are computed by the backend loop: there is no GPU\n", *[""] * 4]
    with refused("moe_backend=triton cannot be used: there is no GPU"):  # type: ignore[attr-defined]
        run_stage("generate", [*settings, "moe_backend=triton"])
    with refused("moe_backend=fast"):  # type: ignore[attr-defined]
        run_stage("generate", [*settings, "moe_backend=fast"])
    assert capsys.readouterr().out == ""


def test_files_of_prompts_that_cannot_be_used(
    road: Path, tmp_path: Path, refused: Callable[..., object], capsys: pytest.CaptureFixture[str]
) -> None:
    file, model = tmp_path / "prompts.jsonl", f"model={road}/public/model"
    first = '{"prompt": "the cat"}\n'
    capsys.readouterr()
    for content, *parts in (
        ("\n", "holds no prompt"),
        (first + "the cat\n", "line 2", "not JSON"),
        (first + '["the cat"]\n', "line 2", "no text field 'prompt'"),
        (first + '{"prompt": 3}\n', "line 2", "no text field 'prompt'"),
        (first + '{"prompt": "\\ud800"}\n', "line 2", "no text field 'prompt'"),
        (first + '{"prompt": ""}\n', "prompt 2 of", "is empty"),
        (first + json.dumps({"prompt": "cat " * 600}), "prompt 2 of", "context is 512"),
    ):
        file.write_text(content)
        with refused(*parts):  # type: ignore[attr-defined]
            run_stage("generate", [model, f"prompts_file={file}"])
    with refused("is not a file"):  # type: ignore[attr-defined]
        run_stage("generate", [model, f"prompts_file={tmp_path}/nothing"])
    with pytest.raises(UserError, match="give one of prompt, prompt_file and prompts_file"):
        run_stage("generate", [model, f"prompts_file={file}", "prompt=the"])
    assert capsys.readouterr().out == ""
