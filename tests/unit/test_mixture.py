"""Mixtures of data sets are in the stated proportions everywhere; tokens that carry no loss teach nothing."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from corpus import make_texts, make_tokenizer, prepare
from toy import SHAPE, train

from flexpert.checkpoint.directory import ModelDirectory
from flexpert.config.compose import compose
from flexpert.config.groups import TrainDataConfig
from flexpert.data.dataset import TokenWindows, read_manifest, targets_of
from flexpert.data.mixture import MixedWindows, training_windows
from flexpert.data.tokenizer import Tokenizer
from flexpert.errors import UserError
from flexpert.train.loop import Trainer
from flexpert.train.pretrain import build_model, check_tokenizer

NAMES = ("web", "code", "math", "news")
LENGTH = 16


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "bpe")


@pytest.fixture(scope="module")
def dirs(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Four data sets of different text and size."""
    root = tmp_path_factory.mktemp("data")
    for seed, name in enumerate(NAMES):
        texts = make_texts(40 * (seed + 1), seed)
        (root / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        given = [f"data.documents={root}/{name}.jsonl", f"tokenizer={tokenizer.directory}", "valid_fraction=0.1"]
        prepare(root / name, *given)
    return {name: str(root / name) for name in NAMES}


def mixture(dirs: dict[str, str], weights: dict[str, float], num_sequences: int = 1) -> TokenWindows | MixedWindows:
    chosen = {name: dirs[name] for name in weights}
    return training_windows(TrainDataConfig(dirs=chosen, weights=weights), LENGTH, 7, num_sequences)


def source_of(rows: torch.Tensor, dirs: dict[str, str]) -> list[str]:
    """The data set that each sequence is from; the text of each begins with its own number."""
    known = {}
    for name, path in dirs.items():
        windows = TokenWindows(Path(path), "train", LENGTH, 7)
        for row in windows.sequences(0, windows.num_sequences).tolist():
            known[tuple(row)] = name
    return [known[tuple(row)] for row in rows.tolist()]


@pytest.mark.parametrize(
    "weights",
    [
        {"web": 3.0, "code": 1.0},
        {"web": 1.0, "code": 1.0, "math": 1.0},
        {"web": 5.0, "code": 0.3, "math": 2.0, "news": 1.1},
    ],
)
def test_the_first_sequences_are_in_the_stated_proportions_however_many_they_are(
    weights: dict[str, float], dirs: dict[str, str]
) -> None:
    windows = mixture(dirs, weights)
    assert isinstance(windows, MixedWindows)
    found = source_of(windows.sequences(0, 400), dirs)
    total = sum(weights.values())
    for count in range(1, 401):
        taken = [found[:count].count(name) for name in weights]
        assert taken == windows.num_taken(count)
        for number, weight in zip(taken, weights.values(), strict=True):
            assert abs(number - count * weight / total) < len(weights) - 0.5


def test_each_source_is_read_in_its_own_order(dirs: dict[str, str]) -> None:
    rows = mixture(dirs, dict.fromkeys(NAMES, 1.0)).sequences(0, 400)
    found = np.asarray(source_of(rows, dirs))
    for name in NAMES:
        own = rows[torch.from_numpy(found == name)]
        assert torch.equal(own, TokenWindows(Path(dirs[name]), "train", LENGTH, 7).sequences(0, len(own)))


def test_a_mixture_read_in_pieces_is_the_mixture(dirs: dict[str, str]) -> None:
    weights = {"web": 2.0, "code": 0.7, "news": 1.3}
    whole = mixture(dirs, weights).sequences(0, 200)
    pieces = [mixture(dirs, weights).sequences(start, 25) for start in range(0, 200, 25)]
    assert torch.equal(torch.cat(pieces), whole)


def test_the_order_of_a_mixture_does_not_change_between_versions(dirs: dict[str, str]) -> None:
    """Runs that were begun must go on in the same order."""
    found = source_of(mixture(dirs, {"web": 2.0, "code": 1.0, "news": 1.0}).sequences(0, 12), dirs)
    assert "".join(name[0] for name in found) == "wwcnwwcnwwcn"


def test_a_mixture_of_one_is_the_data_set(dirs: dict[str, str]) -> None:
    plain = training_windows(TrainDataConfig(dir=dirs["web"]), LENGTH, 7, 10**9)
    assert torch.equal(mixture(dirs, {"web": 0.1}).sequences(0, 100), plain.sequences(0, 100))


def test_a_source_that_would_be_read_too_often_is_refused_before_training(dirs: dict[str, str]) -> None:
    size = TokenWindows(Path(dirs["web"]), "train", LENGTH, 7).num_sequences
    weights = {"web": 1.0, "news": 1.0}
    mixture(dirs, weights, 8 * size)
    with pytest.raises(
        UserError, match=r"data\.dirs\.web=.* would be read 4\.\d+ times and data\.max_epochs\.web is 4"
    ):
        mixture(dirs, weights, 8 * size + 2)
    data = TrainDataConfig(dirs=dirs, weights=dict.fromkeys(NAMES, 1.0), max_epochs={"web": 0.5, "code": 100})
    training_windows(data, LENGTH, 7, 2 * size - 4)
    with pytest.raises(UserError, match=r"data\.max_epochs\.web is 0\.5: lower data\.weights\.web"):
        training_windows(data, LENGTH, 7, 2 * size + 4)


def test_data_sets_of_two_tokenizers_are_not_mixed(dirs: dict[str, str], tmp_path: Path) -> None:
    other = make_tokenizer(tmp_path / "bpe", 270)
    given = [f"data.documents={Path(dirs['code']).parent}/code.jsonl", f"tokenizer={other.directory}"]
    code = str(prepare(tmp_path / "code", *given))
    with pytest.raises(UserError, match=r"data\.dirs\.code=.* another tokenizer than data\.dirs\.web="):
        mixture({**dirs, "code": code}, {"web": 1.0, "code": 1.0})


def with_another_end(tokenizer: Tokenizer, root: Path, documents: Path) -> str:
    """A data set of the same tokenizer, with another of its tokens at the end of documents."""
    tokenizer.copy_to(root / "bpe")
    settings = root / "bpe/tokenizer_config.json"
    settings.write_text(settings.read_text().replace("<|endoftext|>", "<|pad|>"))
    return str(prepare(root / "other", f"data.documents={documents}", f"tokenizer={root}/bpe"))


def test_data_sets_whose_documents_end_in_two_tokens_are_not_mixed(
    dirs: dict[str, str], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    code = with_another_end(tokenizer, tmp_path, Path(dirs["code"]).parent / "code.jsonl")
    with pytest.raises(UserError, match=r"data\.dirs\.code=.* another tokenizer than data\.dirs\.web="):
        mixture({**dirs, "code": code}, {"web": 1.0, "code": 1.0})


def test_data_whose_documents_end_in_another_token_than_the_models_is_refused(
    dirs: dict[str, str], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    train("pretrain", *SHAPE, f"data.dir={dirs['web']}", f"output_dir={tmp_path}/run")
    check_tokenizer(tmp_path / "run/model", read_manifest(Path(dirs["web"])))
    other = with_another_end(tokenizer, tmp_path, Path(dirs["code"]).parent / "code.jsonl")
    with pytest.raises(UserError, match=r"end in 1, and the tokenizer of .*/run/model has the end-of-text id 0"):
        check_tokenizer(tmp_path / "run/model", read_manifest(Path(other)))


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        ([], "needs data.dir=DIR or data.dirs={NAME:DIR,…}"),
        (["data.dir=/a", "data.dirs.web=/b", "data.weights.web=1"], "data.dir=DIR or data.dirs={NAME:DIR,…}, not both"),
        (["data.dirs={web:/a,code:/b}", "data.weights.web=1"], "data.dirs needs data.weights.code=…"),
        (["data.dir=/a", "data.weights.web=1"], "data.weights.web is of none of data.dirs=[]"),
        (["data.dirs.web=/a", "data.weights={web:1,cod:1}"], "data.weights.cod is of none of data.dirs=['web']"),
        (["data.dirs.web=/a", "data.weights.web=0"], "data.weights.web=0.0 must be positive"),
        (["data.dirs.web=/a", "data.weights.web=1", "data.max_epochs.web=-1"], "data.max_epochs.web=-1.0 must be"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused(overrides: list[str], part: str) -> None:
    with pytest.raises(UserError) as caught:
        compose("pretrain", ["train.steps=1", *overrides])
    assert part in str(caught.value)


def mixture_overrides(dirs: dict[str, str]) -> list[str]:
    return [f"data.dirs={{web:{dirs['web']},news:{dirs['news']}}}", "data.weights={web:1,news:3}"]


def test_a_model_trains_on_a_mixture_and_goes_on_with_it(dirs: dict[str, str], tmp_path: Path) -> None:
    overrides = [*SHAPE, *mixture_overrides(dirs), "train.evaluation_interval=3"]
    train("pretrain", *overrides, f"output_dir={tmp_path}/run")
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    assert "valid_loss" in rows[-1]
    record = next(tmp_path.glob("run/checkpoints/step-*/*.json")).read_text()
    for name in ("web", "news"):
        assert read_manifest(Path(dirs[name])).digest in record
    assert ModelDirectory.open(tmp_path / "run/model")
    train("expert", *mixture_overrides(dirs), f"base={tmp_path}/run/model", "name=a", "router.init=random",
          f"public_data={dirs['code']}", "public_share=0.25", f"output_dir={tmp_path}/expert")  # fmt: skip
    assert (tmp_path / "expert/contribution/contribution.json").is_file()


@pytest.fixture(scope="module")
def with_prompts(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("prompts")
    rows = [{"prompt": f"{index}? ", "text": text} for index, text in enumerate(make_texts(80))]
    (root / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = [f"data.documents={root}/a.jsonl", f"tokenizer={tokenizer.directory}", "valid_fraction=0.1"]
    return prepare(root / "data", *given, "data.prompt_field=prompt")


def toy_trainer(data: Path, output: Path, *overrides: str) -> Trainer:
    words = [*SHAPE, f"data.dir={data}", "train.steps=2", "train.sequence_length=16", "train.batch_tokens=128",
             "optim.warmup_steps=1", "monitor.wandb=off", f"output_dir={output}", *overrides]  # fmt: skip
    config, resolved = compose("pretrain", words)
    manifest = read_manifest(data)
    model, _ = build_model(config, manifest, torch.device("cpu"))
    return Trainer(model, config, "pretrain", manifest, torch.device("cpu"), resolved)


def test_windows_mark_what_carries_no_loss_and_lose_no_token(with_prompts: Path) -> None:
    plain = TokenWindows(with_prompts, "train", LENGTH, 0)
    rows = TokenWindows(with_prompts, "train", LENGTH, 0, loss_mask=True).sequences(0, plain.num_sequences)
    assert torch.equal(torch.where(rows < 0, ~rows, rows), plain.sequences(0, plain.num_sequences))
    mask = np.fromfile(with_prompts / "train.mask.bin", np.uint8)
    parts = [mask[index * LENGTH : (index + 1) * LENGTH + 1] for index in range(plain.num_sequences)]
    assert sorted((~(rows < 0)).long().tolist()) == sorted(part.tolist() for part in parts)
    tokens, targets = targets_of(rows)
    assert tokens.min() >= 0
    assert 0 < (targets < 0).sum() < (targets >= 0).sum()


@pytest.mark.parametrize("microbatch", [1, 4])
def test_a_step_is_the_mean_over_the_targets_that_carry_loss(
    microbatch: int, with_prompts: Path, tmp_path: Path
) -> None:
    """Against the loss of the whole step written out, gradient included."""
    trainer = toy_trainer(with_prompts, tmp_path, f"train.microbatch_sequences={microbatch}", "optim.grad_clip=null")
    tokens, targets = targets_of(trainer.windows.sequences(0, 8))
    logits = trainer.model(tokens).stream_BSD @ trainer.model.head.weight.T
    counted = targets >= 0
    nll = torch.nn.functional.cross_entropy(logits[counted], targets[counted])
    z = logits[counted].logsumexp(-1).square().mean()
    (nll + trainer.config.train.z_loss * z).backward()
    squares = [p.grad.square().sum() for p in trainer.model.parameters() if p.grad is not None]
    expected = torch.stack(squares).sum().sqrt().item()
    trainer.model.zero_grad(set_to_none=True)
    row = trainer.optimizer_step()
    assert row["loss"] == pytest.approx(nll.item(), rel=1e-5)
    assert row["z_loss"] == pytest.approx(z.item(), rel=1e-5)
    assert row["grad_norm"] == pytest.approx(expected, rel=1e-4)


def test_what_the_prompts_say_next_changes_no_loss(with_prompts: Path, tmp_path: Path) -> None:
    """The target of a marked position may be any token: neither loss nor count depends on it."""
    trainer = toy_trainer(with_prompts, tmp_path)
    rows = trainer.windows.sequences(0, 64)
    last_is_prompt = rows[:, -1] < 0  # the last token of a window is a target only
    assert last_is_prompt.any()
    other = rows.clone()
    other[last_is_prompt, -1] = ~torch.tensor(5)
    assert not torch.equal(other, rows)
    assert all(torch.equal(a, b) for a, b in zip(trainer.losses(rows), trainer.losses(other), strict=True))


def test_a_mask_of_another_size_is_the_users_to_know(with_prompts: Path, tmp_path: Path) -> None:
    for path, end in itertools.product([with_prompts], (".bin", ".idx", ".mask.bin")):
        (tmp_path / f"train{end}").write_bytes((path / f"train{end}").read_bytes())
    with (tmp_path / "train.mask.bin").open("ab") as file:
        file.write(b"\1")
    with pytest.raises(UserError, match=r"train\.mask\.bin does not have a byte for each token"):
        TokenWindows(tmp_path, "train", LENGTH, 0)
