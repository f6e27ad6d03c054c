"""What training promises: accumulation that changes nothing, frozen parts that do not move."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from toy import SHAPE, train
from transformers import AutoModelForCausalLM

from flexpert.checkpoint.directory import ModelDirectory
from flexpert.cli import run_stage
from flexpert.config.compose import compose
from flexpert.data.dataset import TokenWindows, read_manifest
from flexpert.errors import UserError
from flexpert.monitor.jsonl import read_metrics
from flexpert.train.expert import build_job, mixed_windows
from flexpert.train.loop import Trainer
from flexpert.train.optimizer import project_biases


def weights(path: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(path)


def expert_trainer(overrides: list[str], output: Path, *more: str) -> Trainer:
    toy = [
        "train.microbatch_sequences=8",
        "train.steps=4",
        "train.batch_tokens=128",
        "train.sequence_length=16",
        "optim.warmup_steps=0",
    ]
    given = {override.split("=")[0] for override in more}
    toy = [override for override in toy if override.split("=")[0] not in given]
    settings = ["monitor.wandb=off", f"output_dir={output}", *toy, *more]
    config, resolved = compose("expert", [*overrides, *settings])
    output.mkdir(exist_ok=True)
    device = torch.device("cpu")
    model, _ = build_job(ModelDirectory.open(Path(config.base)), config, device)
    return Trainer(model, config, "expert", read_manifest(Path(config.data.dir)), device, resolved)


def test_accumulation_does_not_change_the_gradient(expert_overrides: list[str], tmp_path: Path) -> None:
    gradients = []
    for name, size in (("one", 8), ("four", 2)):
        trainer = expert_trainer(expert_overrides, tmp_path / name, f"train.microbatch_sequences={size}")
        trainer.optimizer.step = lambda *_: None  # type: ignore[method-assign, assignment]
        trainer.optimizer.zero_grad = lambda *_, **__: None  # type: ignore[method-assign]
        trainer.config.optim.__dict__["grad_clip"] = None
        row = trainer.optimizer_step()
        parts = {name: p.grad for name, p in trainer.model.named_parameters() if p.requires_grad}
        gradients.append((row, parts))
    (first_row, first), (second_row, second) = gradients
    assert first_row["loss"] == pytest.approx(second_row["loss"], rel=1e-6)
    for name, gradient in first.items():
        assert gradient is not None and second[name] is not None
        assert (gradient - second[name]).norm() <= 1e-5 * gradient.norm(), name


def test_what_is_frozen_has_neither_gradient_nor_optimiser_state(expert_overrides: list[str], tmp_path: Path) -> None:
    trainer = expert_trainer(expert_overrides, tmp_path / "run", "router.bias=true")
    for name, parameter in trainer.model.named_parameters():
        if name.endswith("router.bias.1"):
            parameter.data.fill_(-1.0)  # it starts at 0, the largest that acts, and could well stay there
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    for _ in range(3):
        trainer.optimizer_step()
    own = {name for name in before if ".groups.1." in name or name.endswith((".weight.1", ".bias.1"))}
    assert len(own) == 2 * 4  # per layer: gate and up, down, row, bias
    parameters = dict(trainer.model.named_parameters())
    for name, value in before.items():
        if name in own:
            assert not torch.equal(parameters[name], value), name
        else:
            assert parameters[name].grad is None and not parameters[name].requires_grad
            assert torch.equal(parameters[name], value), name
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(parameters[name]) for name in own}
    assert len(trainer.optimizer.state) == len(own)


def test_an_expert_job_starts_as_the_public_model(road: Path, expert_overrides: list[str], tmp_path: Path) -> None:
    """Both FFNs are copies, so whatever the router says the mixture computes what the public FFN does."""
    from flexpert.checkpoint.huggingface import load_model

    trainer = expert_trainer(expert_overrides, tmp_path / "run")
    public = load_model(road / "public/model")[0]
    tokens = torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(0))
    assert (trainer.model.logits(tokens) - public.logits(tokens)).abs().max() <= 1e-5


def test_a_step_that_is_not_finite_changes_nothing(expert_overrides: list[str], tmp_path: Path) -> None:
    trainer = expert_trainer(expert_overrides, tmp_path / "run")
    trainer.optimizer_step()
    parameters = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in parameters.items()}
    states = {id(p): {k: v.clone() for k, v in s.items()} for p, s in trainer.optimizer.state.items()}
    handle = trainer.model.norm.register_forward_hook(lambda module, inputs, output: output * float("nan"))
    row = trainer.optimizer_step()
    handle.remove()
    assert row["skipped_steps"] == 1 and trainer.step == 2
    for name, value in before.items():
        assert torch.equal(parameters[name], value), name
    for parameter, state in trainer.optimizer.state.items():
        assert all(torch.equal(value, states[id(parameter)][key]) for key, value in state.items())
    assert trainer.optimizer_step()["skipped_steps"] == 1


def test_a_run_whose_steps_all_fail_stops(expert_overrides: list[str], tmp_path: Path) -> None:
    trainer = expert_trainer(expert_overrides, tmp_path / "run", "train.steps=100")
    trainer.model.norm.register_forward_hook(lambda module, inputs, output: output * float("nan"))
    with pytest.raises(UserError, match="20 steps in a row"):
        trainer.run()


def test_the_contribution_names_the_base_that_was_frozen(
    road: Path, expert_overrides: list[str], tmp_path: Path
) -> None:
    from flexpert.checkpoint.digest import base_digest

    train("expert", *expert_overrides, f"output_dir={tmp_path}/run")
    record = json.loads((tmp_path / "run/contribution/contribution.json").read_text())
    assert record["base_digest"] == base_digest(road / "public/model")
    assert record["training"] == {"steps": 6, "tokens": 6 * 128, "public_share": 0, "calibration_steps": 0}


def test_a_frozen_tensor_that_moved_is_found(expert_overrides: list[str], tmp_path: Path) -> None:
    from flexpert.checkpoint.huggingface import job_tensor_map
    from flexpert.train.freeze import frozen_digest

    trainer = expert_trainer(expert_overrides, tmp_path / "run")
    slots = job_tensor_map(trainer.model.config, expert=False)
    before = frozen_digest(trainer.model, slots, torch.float32, "t")
    trainer.model.blocks[1].feed_forward.groups[0].down.data[0, 3, 5] += 1e-3  # type: ignore[union-attr, index]
    assert frozen_digest(trainer.model, slots, torch.float32, "t") != before


def test_a_run_whose_data_was_replaced_is_refused(road: Path, tmp_path: Path) -> None:
    shutil.copytree(road / "data/public", tmp_path / "data")
    overrides = [*SHAPE, f"data.dir={tmp_path}/data", f"output_dir={tmp_path}/run"]
    train("pretrain", *overrides)
    shutil.rmtree(tmp_path / "run/model")
    manifest = tmp_path / "data/manifest.json"
    manifest.write_text(manifest.read_text().replace('"license": null', '"license": "other"'))
    with pytest.raises(UserError, match="begun with another data"):
        train("pretrain", *overrides)


def test_public_text_in_training_is_the_stated_share(expert_overrides: list[str], road: Path) -> None:
    config, _ = compose(
        "expert", [*expert_overrides, "train.steps=1", "train.sequence_length=16", "train.batch_tokens=16"]
    )
    own, public = (
        TokenWindows(Path(path), "train", 16, config.seed) for path in (config.data.dir, str(config.public_data))
    )
    mixed = mixed_windows(config, 0.25).sequences(0, 40)
    assert torch.equal(mixed[3::4], public.sequences(0, 10))
    assert torch.equal(torch.cat([mixed[i::4] for i in range(3)]).sort(0)[0], own.sequences(0, 30).sort(0)[0])
    assert torch.equal(mixed_windows(config, 0.0).sequences(0, 40), own.sequences(0, 40))


def test_attention_within_documents_sees_no_other_document(road: Path) -> None:
    from flexpert.checkpoint.huggingface import load_model
    from flexpert.data.dataset import document_ids

    model = load_model(road / "public/model")[0]
    first, second = torch.tensor([[5, 6, 7, 0]]), torch.tensor([[9, 10, 11, 12]])
    both = torch.cat([first, second], 1)
    ids = document_ids(both, eos_id=0)
    assert ids.tolist() == [[0, 0, 0, 0, 1, 1, 1, 1]]
    joined = model(both, document_ids_BS=ids).stream_BSD
    assert (joined[:, :4] - model(first).stream_BSD).abs().max() <= 1e-5
    assert (joined[:, 4:] - model(second).stream_BSD).abs().max() <= 1e-5  # rotary positions are relative
    assert (model(both).stream_BSD[:, 4:] - joined[:, 4:]).abs().max() > 1e-3


@pytest.mark.slow
def test_calibration_moves_the_row_and_bias_alone(expert_overrides: list[str], tmp_path: Path) -> None:
    biased = [*expert_overrides, "router.bias=true", "router.init=discriminant"]
    train("expert", *biased, f"output_dir={tmp_path}/plain")
    train("expert", *biased, "router.calibration_steps=4", f"output_dir={tmp_path}/calibrated")
    plain, calibrated = (weights(tmp_path / run / "contribution/expert.safetensors") for run in ("plain", "calibrated"))
    for name, value in plain.items():
        if not name.endswith("router.bias"):  # stored as it acts: one that would be positive is 0 before and after
            assert torch.equal(value, calibrated[name]) == (".router." not in name), name
    assert [row["step"] for row in read_metrics(tmp_path / "calibrated/calibration/metrics.jsonl")] == [1, 2, 3, 4]


def test_a_bias_that_a_step_carried_above_zero_comes_back(expert_overrides: list[str], tmp_path: Path) -> None:
    trainer = expert_trainer([*expert_overrides, "router.bias=true"], tmp_path / "run")
    biases = [p for name, p in trainer.model.named_parameters() if name.endswith("router.bias.1")]
    assert all(bias.item() == 0 for bias in biases), "where the paper's start leaves it"
    for group in trainer.optimizer.param_groups:
        group["lr"] = 0.1
    for wanted in (1.0, -1.0):  # first every gradient pulls the biases up, then down
        for _ in range(20):
            for bias in biases:
                assert bias.requires_grad
                bias.grad = torch.full_like(bias, -wanted)
            trainer.optimizer.step()
            project_biases(trainer.model)
    assert all(bias.item() < -0.1 for bias in biases)


def test_the_training_loop_keeps_biases_where_they_act(expert_overrides: list[str], tmp_path: Path) -> None:
    trainer = expert_trainer([*expert_overrides, "router.bias=true"], tmp_path / "run", "optim.router_lr=0.5")
    for _ in range(4):
        trainer.optimizer_step()
        biases = {n: p.item() for n, p in trainer.model.named_parameters() if n.endswith("router.bias.1")}
        assert biases and all(value <= 0 for value in biases.values())


def test_private_text_is_not_taken_for_public(expert_overrides: list[str], road: Path, tmp_path: Path) -> None:
    same = f"public_data={road}/data/letters"
    with pytest.raises(UserError, match=r"is the data set of data\.dir: give public text"):
        train("expert", *expert_overrides, same, f"output_dir={tmp_path}/run")
    assert not (tmp_path / "run").exists()


def test_validation_loss_is_that_of_the_tokens_that_training_counts(road: Path, tmp_path: Path) -> None:
    """Against transformers, on the files that `prepare` wrote."""
    rows = [{"prompt": f"dear {'cat ' * (number % 5)}", "text": f"a mat {number} yours"} for number in range(90)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer, split = f"tokenizer={road}/data/public/tokenizer", "valid_fraction=0.3"
    source = [f"data.documents={tmp_path}/a.jsonl", "data.prompt_field=prompt"]
    run_stage("prepare", [*source, tokenizer, split, f"output_dir={tmp_path}/data"])
    evaluation = ["train.evaluation_interval=6", "train.evaluation_sequences=1000000"]
    train("pretrain", *SHAPE, *evaluation, f"data.dir={tmp_path}/data", f"output_dir={tmp_path}/run")
    reported = read_metrics(tmp_path / "run/metrics.jsonl")[-1]["valid_loss"]

    tokens = torch.from_numpy(np.fromfile(tmp_path / "data/valid.bin", np.uint16).astype(np.int64))
    counts = torch.from_numpy(np.fromfile(tmp_path / "data/valid.mask.bin", np.uint8) == 1)
    places = torch.arange(0, len(tokens) - 16, 16)[:, None] + torch.arange(17)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    with torch.no_grad():
        logits = model(tokens[places[:, :-1]]).logits.double()
    losses = torch.nn.functional.cross_entropy(logits.mT, tokens[places[:, 1:]], reduction="none")
    counted = counts[places[:, 1:]]
    assert reported == pytest.approx(losses[counted].mean().item(), rel=1e-5)
    assert abs(reported - losses.mean().item()) > 1e-3 and 0.1 < counted.double().mean() < 0.9
