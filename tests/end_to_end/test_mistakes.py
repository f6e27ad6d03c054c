"""A user's mistake is one line on standard error, exit status 2, and nothing half-written."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from toy import SHAPE, train

from flexpert.cli import main, run_stage
from flexpert.errors import UserError
from flexpert.signals import REQUEUE
from flexpert.stage import check_directory


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    def run(stage: str, overrides: list[str], *expected: str) -> None:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([stage, *overrides])
        error = capsys.readouterr().err
        assert caught.value.code == 2
        assert error.startswith("flexpert: ") and error.count("\n") == 1, error
        for part in expected:
            assert part in error, error

    return run


@pytest.fixture(scope="module")
def assembled(road: Path, expert_overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("assembled")
    train("expert", *expert_overrides, f"output_dir={root}/letters")
    run_stage(
        "assemble",
        [f"base={road}/public/model", f"contributions=[{root}/letters/contribution]", f"output_dir={root}/model"],
    )
    return root


TOY = ["train.steps=2", "train.batch_tokens=128", "train.sequence_length=16", "monitor.wandb=off"]


def test_missing_data(fails, road: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    out = f"output_dir={tmp_path}/out"
    fails("pretrain", [*TOY, f"data.dir={tmp_path}/nowhere", out], "nowhere", "flexpert prepare")
    fails("evaluate", [f"model={road}/public/model", f"data.dirs={{a:{tmp_path}}}", out], "manifest.json")
    assert list(tmp_path.iterdir()) == []


def test_tokenizer_and_model_that_disagree(fails, road: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    documents = f"data.documents={road}/public_texts/*.txt"
    run_stage("prepare", [documents, "train_tokenizer.vocab_size=310", f"output_dir={tmp_path}/other"])
    base, data, out = f"base={road}/public/model", f"data.dir={tmp_path}/other", f"output_dir={tmp_path}/out"
    fails("expert", [*TOY, base, data, "name=a", "router.init=random", out], "another tokenizer", "prepare")
    fails("pretrain", [*TOY, base, data, out], "another tokenizer")
    fails("evaluate", [f"model={road}/public/model", f"data.dirs={{a:{tmp_path}/other}}", out], "another tokenizer")
    fails("pretrain", [*TOY, data, "model.vocab_size=128", out], "model.vocab_size=128")
    assert not (tmp_path / "out").exists()


def test_a_sequence_longer_than_the_context(fails, road: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    long = ["train.steps=1", "train.batch_tokens=1024", "train.sequence_length=1024", f"data.dir={road}/data/public"]
    fails("pretrain", [*long, f"output_dir={tmp_path}/out"], "train.sequence_length=1024", "512")


def test_a_mistake_does_not_claim_the_directory(fails, road: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    data, out = f"data.dir={road}/data/public", f"output_dir={tmp_path}/out"
    short = ["train.steps=1", "train.batch_tokens=2048", "train.sequence_length=512", "monitor.wandb=off"]
    base = [f"base={road}/public/model", "name=a", data, out]
    few = [
        "valid_fraction=0",
        f"tokenizer={road}/data/public/tokenizer",
        f"data.documents={road}/public_texts/00[0-3].txt",
    ]
    run_stage("prepare", [*few, f"output_dir={tmp_path}/few"])
    fails("pretrain", [*short, f"data.dir={tmp_path}/few", out], "fewer than one sequence")
    fails(
        "expert",
        [*TOY, *base, f"router.embedding={tmp_path}", f"public_data={road}/data/letters"],
        "sentence-transformers",
    )
    calibration = ["router.init=random", "router.calibration_steps=2", f"public_data={tmp_path}/few"]
    fails("expert", [*short, *base, *calibration], "fewer than one sequence")
    fails("expert", [*TOY, *base, "router.init=random", "name=" + "a" * 65], "at most 64")
    fails("expert", [*TOY, *base, "router.init=random", "title=two\nlines"], "line")
    assert not (tmp_path / "out").exists()


def test_excluding_what_is_not_there_or_all_there_is(fails, road: Path, assembled: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    model, prompt = f"model={assembled}/model", "prompt=dear"
    fails("generate", [model, prompt, "exclude=[nobody]"], "nobody", "letters")
    fails("generate", [model, prompt, "exclude=[public,letters]"], "no expert would be left")
    fails("generate", [model, prompt, "active_experts=3"], "active_experts=3", "2 experts")
    fails("generate", [model, prompt, "exclude=[letters]", "active_experts=2"], "active_experts=2", "1 expert")
    fails("generate", [f"model={road}/public/model", prompt, "exclude=[letters]"], "dense")
    fails("remove", [model, "experts=[nobody]", f"output_dir={tmp_path}/out"], "nobody", "letters")
    fails("remove", [model, "experts=[public,letters]", f"output_dir={tmp_path}/out"], "no expert would be left")
    assert list(tmp_path.iterdir()) == []


def test_contributions_that_do_not_fit(fails, road: Path, assembled: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    contribution, out = f"{assembled}/letters/contribution", f"output_dir={tmp_path}/out"
    base = f"base={road}/public/model"
    fails("assemble", [base, f"contributions=[{contribution},{contribution}]", out], "letters")
    fails("assemble", [base, f"contributions=[{contribution}]", "active_experts=3", out], "active_experts")
    fails("assemble", [base, f"contributions=[{tmp_path}/nowhere]", out], "nowhere")
    fails("assemble", [base, out], "contributions")
    train("pretrain", f"base={road}/public/model", f"data.dir={road}/data/public", f"output_dir={tmp_path}/other")
    fails("assemble", [f"base={tmp_path}/other/model", f"contributions=[{contribution}]", out], "another base")
    assert not (tmp_path / "out").exists()


def test_a_directory_that_holds_another_configuration(fails, road: Path, assembled: Path) -> None:  # type: ignore[no-untyped-def]
    used = [f"data.dir={road}/data/public", f"output_dir={road}/public"]
    fails("pretrain", [*TOY, *used], "another configuration", "choose another output_dir")
    fails("pretrain", [*TOY, f"data.dir={road}/data/public", f"output_dir={assembled}"], "something else")
    fails(
        "prepare",
        [f"data.documents={road}/public_texts/*", "train_tokenizer.vocab_size=300", f"output_dir={road}/data/public"],
        "choose another output_dir",
    )


def test_prompts_without_text_or_room(fails, road: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    model = f"model={road}/public/model"
    fails("generate", [model, "prompt="], "prompt is empty")
    fails("generate", [model, f"prompt_file={tmp_path}/nothing"], "is not a file")
    fails("generate", [model, f"prompt={'cat ' * 600}"], "context is 512")


def test_directories_that_are_no_model(fails, road: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    fails("generate", [f"model={tmp_path}", "prompt=a"], "is not a model", "config.json")
    fails("generate", [f"model={road}/data/public", "prompt=a"], "is a data set, not a model")
    fails(
        "expert",
        [*TOY, f"base={road}/data/public", f"data.dir={road}/data/public", "name=a", "router.init=random"],
        "is a data set, not a model",
    )
    fails("generate", [f"model={road}/public", "prompt=a"], f"did you mean {road}/public/model?")


def test_another_configuration_is_told_with_what_changed(tmp_path: Path) -> None:
    def refusal(before: str, now: str) -> str:
        (tmp_path / "resolved.yaml").write_text(before)
        with pytest.raises(UserError) as caught:
            check_directory(tmp_path, now, "auto")
        return str(caught.value)

    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "resolved.yaml").write_text("{seed: 1}")
    check_directory(
        tmp_path, "{seed: 2}", "auto"
    )  # a run that was stopped before its first step leaves nothing to keep
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    line = refusal("{seed: 1, train: {steps: null}}", "{seed: 2, train: {steps: 5}}")
    assert "seed was 1 and is 2, train.steps was unset and is 5; choose another output_dir" in line
    line = refusal("{a: 1, b: 1, c: 1, d: 1, e: 1}", "{a: 2, b: 2, c: 2, d: 2}")
    assert "a was 1 and is 2, b was 1 and is 2, c was 1 and is 2 (and 2 more); choose another output_dir" in line


def test_a_run_that_ends_in_its_warm_up_says_so_once(road: Path, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    steps = ["train.steps=2", "optim.warmup_steps=2"]
    train("pretrain", *SHAPE, *steps, f"data.dir={road}/data/public", f"output_dir={tmp_path}/public")
    note = "note: optim.warmup_steps=2 is not shorter than the run's 2 steps"
    assert capsys.readouterr().out.count(note) == 1


@pytest.mark.slow
def test_a_stage_that_is_terminated_cleans_up(road: Path, tmp_path: Path) -> None:
    """As a scheduler ends it, or the pipeline that started it."""
    output = tmp_path / "data"
    overrides = ["data=demo_math", f"tokenizer={road}/data/public/tokenizer", f"output_dir={output}"]
    endless = os.environ | {"FLEXPERT_FAULTS": '[{"action": "hang", "phase": "publish"}]'}
    with subprocess.Popen([sys.executable, "-m", "flexpert", "prepare", *overrides], env=endless) as process:
        while process.poll() is None and not list(tmp_path.glob(".data.*.partial/train.bin")):
            time.sleep(0.001)
        process.terminate()
    assert process.returncode == REQUEUE
    assert list(tmp_path.iterdir()) == []
