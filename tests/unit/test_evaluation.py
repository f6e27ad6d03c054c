"""What an evaluation says: likelihood, answers, ensembles and removals, each against its definition."""

import json
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy import write_texts

from flexpert.baselines.btm import btm_nll
from flexpert.checkpoint.directory import ModelDirectory
from flexpert.checkpoint.huggingface import inference_dtype, load_model, save_model
from flexpert.cli import run_stage
from flexpert.data.tokenizer import load_tokenizer
from flexpert.evaluation.documents import Document, EvaluationSet, document_windows, load_set
from flexpert.evaluation.gates import check_gates
from flexpert.evaluation.score import CHUNK_TOKENS, score, summary
from flexpert.evaluation.table import print_bits
from flexpert.model.generate import generate
from flexpert.model.loss import Vocabulary
from flexpert.model.transformer import Transformer, build_on_meta, initialise

Refused = Callable[..., AbstractContextManager[None]]
LENGTH = 12


def write_model(road: Path, directory: Path, seed: int, **shape: int) -> Path:
    """A model of random weights, large enough that every part of it counts, with the road's tokenizer."""
    public = load_model(road / "public/model")[0]
    model = build_on_meta(replace(public.config, initializer_range=0.5, **shape)).to_empty(device="cpu")
    initialise(model, seed)
    directory.mkdir()
    save_model(model, directory, load_tokenizer(road / "public/model"), torch.float32)
    return directory


@pytest.fixture(scope="module")
def models(road: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """mixture: public, expert-1, expert-2, two active; dense and other: dense; questions: data with answers."""
    root = tmp_path_factory.mktemp("models")
    write_model(road, root / "mixture", 1, num_experts=3, active_experts=2)
    write_model(road, root / "dense", 2)
    write_model(road, root / "other", 3)
    (root / "texts").mkdir()
    for number in range(12):
        answer = f"{number} birds" + " and nine cats" * (20 if number % 3 == 0 else 0)
        text = f"{'the cat saw ' * number}how many? Answer: {answer}" if number % 4 else f"no question {number}"
        (root / "texts" / f"{number:02d}.txt").write_text(text)
    run_stage(
        "prepare",
        [f"data.documents={root}/texts/*.txt", "data.answer_marker=Answer:", f"tokenizer={road}/data/public/tokenizer",
         "valid_fraction=0.1", f"output_dir={root}/questions"],
    )  # fmt: skip
    return root


def evaluate(road: Path, model: Path, output: Path, *overrides: str) -> dict[str, Any]:
    given = {override.partition("=")[0] for override in overrides}
    defaults = [
        f"model={model}", f"data.dirs={{public:{road}/data/public,letters:{road}/data/letters}}",
        f"sequence_length={LENGTH}", "data.max_documents=3", f"output_dir={output}",
    ]  # fmt: skip
    run_stage("evaluate", [*(d for d in defaults if d.partition("=")[0] not in given), *overrides])
    return json.loads((output / "evaluation.json").read_text())  # type: ignore[no-any-return]


def token_by_token(directory: Path, data: EvaluationSet) -> list[list[float]]:
    """Each token's negative log-likelihood in fp64: one forward pass over all that comes before it in its window."""
    model = load_model(directory, dtype=torch.float64)[0]
    result = []
    for document in data.documents:
        nll = []
        for place, token in enumerate(document.tokens):
            begin = place // LENGTH * LENGTH
            context = [data.manifest.eos_id, *document.tokens][begin : place + 1]
            probs = model.logits(torch.tensor([context]))[0, -1].softmax(0)
            nll.append(-math.log(probs[token]))
        result.append(nll)
    return result


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense", "mixture"])
def test_bits_per_byte_is_what_each_token_costs_after_those_before_it(
    name: str, road: Path, models: Path, tmp_path: Path
) -> None:
    record = evaluate(road, models / name, tmp_path / "out", "batch_sequences=3")
    for domain in ("public", "letters"):
        data = load_set(domain, road / "data" / domain, "valid", 3)
        num_bytes = sum(len(load_tokenizer(road / "public/model").decode(d.tokens).encode()) for d in data.documents)
        bits = sum(map(sum, token_by_token(models / name, data))) / math.log(2) / num_bytes
        assert any(len(document.tokens) > LENGTH for document in data.documents)
        assert record["methods"]["model"]["domains"][domain]["bits_per_byte"] == pytest.approx(bits, rel=1e-6)
        assert record["domains"][domain] == {"documents": 3, "bytes": num_bytes}


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_ensemble_averages_probabilities_by_what_came_before(
    temperature: float, road: Path, models: Path, tmp_path: Path
) -> None:
    data = load_set("letters", road / "data/letters", "valid", 3)
    members = [score(load_model(models / name)[0], data, LENGTH, 4).nll for name in ("dense", "other")]
    ensemble = btm_nll(members, temperature)
    total = 0.0
    for index, document in enumerate(data.documents):
        evidence = [1.0, 1.0]  # each member's probability of the text so far
        for place in range(len(document.tokens)):
            probs = [math.exp(-member[index][place]) for member in members]
            weights = [value ** (1 / temperature) for value in evidence]
            mixed = sum(w * p for w, p in zip(weights, probs, strict=True)) / sum(weights)
            assert ensemble[index][place] == pytest.approx(-math.log(mixed), rel=1e-9)
            evidence = [e * p for e, p in zip(evidence, probs, strict=True)]
            evidence = [value / max(evidence) for value in evidence]
            total -= math.log2(mixed)
    baselines = [f"baselines.public={models}/dense", f"baselines.dense={{letters:{models}/other}}"]
    record = evaluate(
        road, models / "mixture", tmp_path / "out", *baselines, f"baselines.btm_temperature={temperature}"
    )
    bits = record["methods"]["btm"]["domains"]["letters"]["bits_per_byte"]
    assert bits == pytest.approx(total / data.num_bytes, rel=1e-9)


def decoded(model: Transformer, document: Document, eos_id: int) -> bool:
    """Whether greedy decoding gives the answer after as much of the text before it as a window holds."""
    sequence = [eos_id, *document.tokens][-(LENGTH + 1) :]
    count = document.num_answer_tokens
    new = generate(model, torch.tensor([sequence[:-count]]), count, eos_id)
    return new[0].tolist() == sequence[-count:]


@pytest.mark.parametrize("name", ["dense", "mixture"])
def test_answer_accuracy_is_that_of_greedy_decoding(name: str, road: Path, models: Path) -> None:
    """Answers are the model's own, half of them with one token changed; questions are shorter and longer than a
    window, so that answers begin anywhere in the windows of the likelihood."""
    model = load_model(models / name)[0]
    source = load_set("letters", road / "data/letters", "valid", 1)
    eos_id = source.manifest.eos_id
    generator = torch.Generator().manual_seed(0)
    documents = []
    for number in range(24):
        question = torch.randint(2, 256, (1 + 2 * number,), generator=generator).tolist()
        count = 1 + number % 5
        context = [eos_id, *question][-(LENGTH + 1 - count) :]
        answer = generate(model, torch.tensor([context]), count, eos_id)[0].tolist()
        if number % 2:
            answer[number % len(answer)] ^= 1
        documents.append(Document([*question, *answer], 50, len(question)))
    too_long = Document(list(range(40, 80)), 40, 40 - LENGTH - 1)
    unanswered = Document(list(range(40, 80)), 40, None)
    data = EvaluationSet("letters", source.manifest, [*documents, too_long, unanswered])
    found = summary(score(model, data, LENGTH, 5), data, [f"expert-{i}" for i in range(model.config.num_experts)])
    verdicts = [decoded(model, document, eos_id) for document in documents]
    assert 0 < sum(verdicts) < len(verdicts)
    assert found["answers"] == len(documents)
    assert found["answer_accuracy"] == sum(verdicts) / len(verdicts)


def test_windows_for_answers_are_no_part_of_the_likelihood(road: Path, models: Path) -> None:
    model = load_model(models / "mixture")[0]
    source = load_set("letters", road / "data/letters", "valid", 3)
    asked = [replace(document, answer_start=len(document.tokens) - 2) for document in source.documents]
    plain = score(model, source, LENGTH, 1)
    with_answers = score(model, replace(source, documents=asked), LENGTH, 1)
    for one, other in zip(plain.nll, with_answers.nll, strict=True):
        assert np.array_equal(one, other)
    assert plain.routing is not None and with_answers.routing is not None
    assert np.array_equal(plain.routing, with_answers.routing)
    assert plain.answers == [] and len(with_answers.answers) == 3


@pytest.mark.parametrize("tokens", [1, 5, 6, 7, 12, 13])
@pytest.mark.parametrize("answer", [0, 1, 6, 7])
def test_windows_hold_every_token_once_and_an_answer_at_most_once(tokens: int, answer: int) -> None:
    document = Document(list(range(100, 100 + tokens)), tokens, tokens - answer if 0 < answer <= tokens else None)
    rows = document_windows(0, document, 7, 6)
    assert [token for row in rows if row.counted for token in row.tokens[1:]] == document.tokens
    judging = [row for row in rows if row.num_answer_tokens]
    assert len(judging) == (0 < document.num_answer_tokens <= 6)
    for row in judging:
        assert row.num_answer_tokens == document.num_answer_tokens
        assert row.tokens == [7, *document.tokens][-7:]


def test_the_record_counts_documents_with_an_answer_that_fits(road: Path, models: Path, tmp_path: Path) -> None:
    dirs = f"data.dirs={{questions:{models}/questions,letters:{road}/data/letters}}"
    output = tmp_path / "out"
    record = evaluate(road, models / "dense", output, dirs, "data.split=train", "data.max_documents=null")
    found = record["methods"]["model"]["domains"]
    data = load_set("questions", models / "questions", "train", None)
    eos_id, model = data.manifest.eos_id, load_model(models / "dense")[0]
    answers = [document for document in data.documents if document.answer_start is not None]
    fitting = [document for document in answers if document.num_answer_tokens <= LENGTH]
    assert 0 < len(fitting) < len(answers) < len(data.documents)
    verdicts = [decoded(model, document, eos_id) for document in fitting]
    assert found["questions"]["answers"] == len(fitting)
    assert found["questions"]["answer_accuracy"] == sum(verdicts) / len(verdicts)
    assert found["letters"].keys() == {"bits_per_byte"}


def test_no_more_logits_than_a_chunk_are_held(road: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(models / "dense")[0]
    source = load_set("letters", road / "data/letters", "valid", 1)
    data = replace(source, documents=[Document([5, 6, 7, 8] * 80, 320, None)] * 7)
    whole = score(model, data, 64, 1)
    rows: list[int] = []
    argmax = Vocabulary.argmax
    monkeypatch.setattr(Vocabulary, "argmax", lambda v, logits_TV: rows.append(len(logits_TV)) or argmax(v, logits_TV))
    chunked = score(model, data, 64, 100)
    assert sum(rows) == 7 * 320 and max(rows) == CHUNK_TOKENS
    for one, other in zip(whole.nll, chunked.nll, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_leaving_one_out_changes_nothing_but_that_expert(road: Path, models: Path, tmp_path: Path) -> None:
    methods = evaluate(road, models / "mixture", tmp_path / "a", "leave_one_out=true", "active_experts=1")["methods"]
    assert list(methods) == ["model", "without expert-1", "without expert-2"]
    assert [method["active_experts"] for method in methods.values()] == [1, 1, 1]
    alone = evaluate(road, models / "mixture", tmp_path / "b", "exclude=[expert-1]", "active_experts=1")["methods"]
    assert methods["without expert-1"] == alone["model"]
    methods = evaluate(road, models / "mixture", tmp_path / "c", "leave_one_out=true", "active_experts=3")["methods"]
    assert [method["active_experts"] for method in methods.values()] == [3, 2, 2]


@pytest.mark.slow
def test_leaving_one_out_where_the_public_expert_is_excluded(road: Path, models: Path, tmp_path: Path) -> None:
    options = ["leave_one_out=true", "exclude=[public]"]
    methods = evaluate(road, models / "mixture", tmp_path / "a", *options)["methods"]
    assert {name: method["experts"] for name, method in methods.items()} == {
        "model": ["expert-1", "expert-2"],
        "without expert-1": ["expert-2"],
        "without expert-2": ["expert-1"],
    }
    assert [method["active_experts"] for method in methods.values()] == [2, 1, 1]
    options = ["leave_one_out=true", "exclude=[public,expert-2]"]
    methods = evaluate(road, models / "mixture", tmp_path / "b", *options)["methods"]
    assert list(methods) == ["model"], "nothing would be left without expert-1"


@pytest.mark.parametrize(
    ("model", "overrides", "parts"),
    [
        ("mixture", ["exclude=[nobody]"], ["nobody", "expert-1"]),
        ("mixture", ["exclude=[public,expert-1,expert-2]"], ["no expert would be left"]),
        ("mixture", ["active_experts=4"], ["active_experts: 4", "3 experts"]),
        ("mixture", ["exclude=[expert-1]", "active_experts=3"], ["active_experts: 3", "2 experts"]),
        ("mixture", ["exclude=[expert-1]", "sweep_active_experts=[1,3]"], ["sweep_active_experts: 3", "2 experts"]),
        ("dense", ["active_experts=1"], ["active_experts=1", "dense model"]),
        ("dense", ["sweep_active_experts=[1]"], ["sweep_active_experts=[1]", "dense model"]),
        ("dense", ["exclude=[public]"], ["exclude=['public']", "dense model"]),
        ("mixture", ["baselines.public={models}/mixture"], ["baselines.public", "mixture"]),
        ("mixture", ["baselines.dense={{math:{models}/nowhere}}"], ["nowhere"]),
        ("mixture", ["moe_backend=triton", "device=cpu"], ["moe_backend=triton cannot be used: there is no GPU"]),
        ("mixture", ["output_dir={models}/texts/01.txt"], ["01.txt"]),
        ("mixture", ["output_dir={models}/texts/01.txt/out"], ["01.txt/out", "cannot be written"]),
        ("mixture", ["output_dir={models}/texts"], ["texts", "choose another output_dir"]),
    ],
)
def test_a_mistake_is_found_before_anything_is_scored(
    model: str,
    overrides: list[str],
    parts: list[str],
    road: Path,
    models: Path,
    tmp_path: Path,
    refused: Refused,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("flexpert.evaluation.evaluate.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    given = [override.format(models=models) if "{models}" in override else override for override in overrides]
    with refused(*parts):
        evaluate(road, models / model, tmp_path / "out", *given)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_baseline_of_another_tokenizer_vocabulary_or_shape(
    road: Path, models: Path, tmp_path: Path, refused: Refused
) -> None:
    write_texts(tmp_path / "texts", ["other", "words", "here"], 10, seed=3)
    run_stage(
        "prepare",
        [f"data.documents={tmp_path}/texts/*.txt", "train_tokenizer.vocab_size=310", "valid_fraction=0.3",
         f"output_dir={tmp_path}/data"],
    )  # fmt: skip
    foreign = write_model(road, tmp_path / "foreign", 4)
    load_tokenizer(tmp_path / "data/tokenizer").copy_to(foreign)
    small = write_model(road, tmp_path / "small", 4, vocab_size=128)
    wide = write_model(road, tmp_path / "wide", 4, intermediate_size=56)
    out, public = tmp_path / "out", f"baselines.public={models}/dense"
    with refused("baselines.dense.math", "another tokenizer"):
        evaluate(road, models / "mixture", out, public, f"baselines.dense={{math:{foreign}}}")
    with refused("baselines.public", "another tokenizer"):
        evaluate(road, models / "mixture", out, f"baselines.public={foreign}")
    with refused("baselines.dense.math", "embeds 128 tokens"):
        evaluate(road, models / "mixture", out, f"baselines.dense={{math:{small}}}")
    with refused("model=", "embeds 128 tokens", "data.dirs.public"):
        evaluate(road, small, out)
    with refused("another shape", "baselines.soup=false"):
        evaluate(road, models / "mixture", out, public, f"baselines.dense={{math:{wide}}}")
    assert not out.exists()
    methods = evaluate(
        road, models / "mixture", out, public, f"baselines.dense={{math:{wide}}}", "baselines.soup=false"
    )["methods"]
    assert list(methods) == ["model", "public", "dense math", "btm"]


@pytest.mark.slow
def test_the_table_says_what_was_left_out(
    road: Path, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["sweep_active_experts=[1]", f"baselines.public={models}/dense", "leave_one_out=true"]

    def labels(output: Path, *overrides: str) -> list[str]:
        capsys.readouterr()
        evaluate(road, models / "mixture", output, *options, *overrides)
        rows = [line.split("│") for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
        return [row[1].strip() for row in rows]

    assert labels(tmp_path / "a") == ["model", "without expert-1", "without expert-2", "active 1", "public"]
    assert labels(tmp_path / "b", "exclude=expert-1") == [
        "model without expert-1",
        "without expert-1, expert-2",
        "active 1 without expert-1",
        "public",
    ]
    methods = json.loads((tmp_path / "b/evaluation.json").read_text())["methods"]
    assert list(methods) == ["model", "without expert-2", "active 1", "public"]


@pytest.mark.parametrize("damaged", ["mixture", "dense"])
def test_a_damaged_weight_file_leaves_nothing_written(
    damaged: str, road: Path, models: Path, tmp_path: Path, refused: Refused
) -> None:
    for name in ("mixture", "dense"):
        (tmp_path / "models" / name).mkdir(parents=True)
        model = load_model(models / name)[0]
        save_model(model, tmp_path / "models" / name, load_tokenizer(road / "public/model"), torch.float32, 20_000)
    weights = sorted((tmp_path / "models" / damaged).glob("*.safetensors"))
    assert len(weights) > 1, "several files, as `assemble` writes them"
    weights[-1].write_bytes(weights[-1].read_bytes()[:-1])
    with refused(weights[-1]):
        evaluate(road, tmp_path / "models/mixture", tmp_path / "out", f"baselines.public={tmp_path}/models/dense")
    assert not (tmp_path / "out").exists()


def test_a_directory_keeps_its_configuration(road: Path, models: Path, tmp_path: Path, refused: Refused) -> None:
    first = evaluate(road, models / "mixture", tmp_path / "out")
    assert evaluate(road, models / "mixture", tmp_path / "out") == first
    with refused("holds another configuration", "active_experts"):
        evaluate(road, models / "mixture", tmp_path / "out", "active_experts=1")
    assert json.loads((tmp_path / "out/evaluation.json").read_text()) == first


def test_names_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    domains = {"[news]": {"bits_per_byte": 1.0}, "[/x]": {"bits_per_byte": 2.0}}
    methods = {"model": {"domains": domains, "experts": []}}
    print_bits({"exclude": [], "domains": domains, "methods": methods})
    shown = capsys.readouterr().out
    assert "[news]" in shown and "[/x]" in shown


@pytest.mark.parametrize("kind", ["mixture", "dense"])
@pytest.mark.parametrize("active", [None, 3])
def test_a_model_stored_in_bf16_is_held_so_on_cuda_alone_and_computes_in_it(
    kind: str, active: int | None, road: Path, models: Path, tmp_path: Path
) -> None:
    """The modules take the type on every device: scores and continuations agree with those in fp32 but for rounding."""
    whole, directory = load_model(models / kind)
    (tmp_path / "half").mkdir()
    save_model(whole, tmp_path / "half", load_tokenizer(road / "public/model"), torch.bfloat16)
    stored = ModelDirectory.open(tmp_path / "half")
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [inference_dtype(stored, device) for device in (cpu, cuda)] == [torch.float32, torch.bfloat16]
    assert [inference_dtype(directory, device) for device in (cpu, cuda)] == [torch.float32, torch.float32]
    model = load_model(tmp_path / "half", active_experts=active, dtype=None)[0]
    half = load_model(tmp_path / "half", active_experts=active, dtype=torch.bfloat16)[0]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    data = load_set("letters", road / "data/letters", "valid", 4)
    exact, rounded = score(model, data, LENGTH, 4), score(half, data, LENGTH, 4)
    # bf16 keeps 8 bits: a relative error of 2^-8 in every product, of logits of a few units
    assert summary(rounded, data, ["a", "b", "c"])["bits_per_byte"] == pytest.approx(
        summary(exact, data, ["a", "b", "c"])["bits_per_byte"], rel=0.02
    )
    prompt = torch.arange(5, 11)[None]
    new = [int(generate(one, prompt, 1, eos_id=1)[0, 0]) for one in (model, half)]
    logits_V = model.logits(prompt)[0, -1]
    assert logits_V[new[1]] > logits_V[new[0]] - 0.05 * logits_V.abs().max(), "as likely, but for the rounding"
    assert generate(half, prompt.repeat(2, 1), 3, eos_id=1).shape == (2, 3)


def losses(**bits: float) -> dict[str, Any]:
    return {"domains": {name: {"bits_per_byte": value} for name, value in bits.items()}, "experts": list(bits)}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["code", "math", "news"])
def test_no_claim_holds_over_a_value_that_is_not_finite(bad: float, place: str) -> None:
    model = {"code": 1.0, "math": 1.0, "news": 1.0}
    methods = {
        "model": losses(**model),
        "public": losses(**{"code": 3.0, "math": 2.0, "news": 4.0} | {place: bad}),
        "soup": losses(**model),
        **{f"without {name}": losses(**model | {place: bad}) for name in model},
    }
    content = {"domains": {name: {} for name in model}, "methods": methods}
    for name, threshold in {"gain_over_public": 0.5, "removal_on_others": 0.5, "removal_on_own": -1.0}.items():
        (gate,) = check_gates(content, {name: threshold})
        assert not gate.holds and not math.isfinite(gate.value) and place in gate.where, name


def test_a_gate_reports_the_worst_value() -> None:
    methods = {
        "model": losses(math=1.0, news=1.0),
        "public": losses(math=1.5, news=1.25),
        "without math": losses(math=2.0, news=1.0625),
        "without news": losses(math=1.125, news=2.0),
    }
    content = {"domains": {"math": {}, "news": {}}, "methods": methods}
    gates = check_gates(content, {"gain_over_public": 0.2, "removal_on_others": 0.125})
    assert [(gate.value, gate.where, gate.holds) for gate in gates] == [
        (0.25, "news", True),
        (0.125, "math without news", False),
    ]
