"""Where a configuration comes from: a directory of the user's own, presets, and what `flexpert config` says of it."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf
from test_config import one_line_of_status_2

from flexpert.cli import main
from flexpert.config.compose import compose
from flexpert.config.origin import annotated
from flexpert.config.presets import presets_of
from flexpert.config.tree import CONFIG_DIR
from flexpert.errors import UserError

PRETRAIN = ["data.dir=/d", "train.steps=1"]
EXPERT = ["base=/b", "data.dir=/d", "name=math", "public_data=/p"]
TUNE = ["model=/m", "data.dir=/d"]

COMMANDS = [
    ["pretrain", *PRETRAIN, "model=small", "optim.lr=1e-3", "optim.betas=[0.8,0.9]"],
    ["pretrain", "mixture=flexmix", "data.dirs.public=/my #1", "train.steps=5"],
    ["expert", *EXPERT, "experiment=flexolmo_expert", "title=a: 'b' #c\nd \u2028 é漢😀"],
    ["expert", *EXPERT, "train.steps=1", f"title={'long words ' * 30}"],
    ["tune_router", *TUNE, "+experiment=flexolmo_router"],
    ["evaluate", "model=/m", "data.dirs={2024_05:/d,1e3:/e,v1.5:/f}", "exclude=[1e3,null]", "output_dir=/o"],
    ["pipeline", "pipeline=demo"],
    ["prepare", "data=demo_math", "tokenizer=/t", "output_dir=/o"],
    ["plan"],
]


@pytest.fixture(autouse=True)
def no_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    """None is set, and what a test sets by the flag is not there in the next one."""
    monkeypatch.setenv(CONFIG_DIR, "")


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A user's directory, in a place whose name Hydra's grammar would not take."""
    directory = tmp_path / "my conf (a=b), [c]"
    for name, text in {
        "launcher/mysite": "kind: slurm\npartition: gpu\noptions: [--qos=normal]\n",
        "launcher/typo": "partion: gpu\n",
        "launcher/text": "max_jobs: many\n",
        "launcher/broken": "a: [\n",
        "optim/adamw": "lr: 0.25\n",
        "experiment/bare": "defaults:\n  - override /model: small\nseed: 7\ntrain: {batch_tokens: 8192}\n",
        "experiment/onward": "# @package _global_\ndefaults:\n  - flexolmo_expert\n  - _self_\noptim: {lr: 0.5}\n",
        "experiment/round": "defaults: [round]\n",
        "experiment/typo": "train: {stepps: 3}\n",
        "experiment/choice": "defaults:\n  - override /model: huge\n",
        "experiment/list": "- 1\n",
    }.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / f"{name}.yaml").write_text(text)
    return directory


# --- flexpert config


@pytest.mark.parametrize("command", COMMANDS, ids=[" ".join(words)[:50] for words in COMMANDS])
def test_the_annotated_yaml_loads_to_the_same_configuration(command: list[str]) -> None:
    stage, *overrides = command
    _, resolved = compose(stage, overrides)
    text = annotated(stage, overrides)
    assert yaml.safe_load(text) == yaml.safe_load(resolved)
    assert OmegaConf.create(text) == OmegaConf.create(resolved)


@pytest.mark.parametrize("prompt", ["one", "a\nb # c", "'${x}' \"y\" \\", "", "é漢😀 \u2028", "- a: {", "1e3", "null"])
def test_a_prompt_is_shown_as_it_will_be_read(prompt: str) -> None:
    text = annotated("generate", ["model=/m", f"prompt={prompt}"])
    assert yaml.safe_load(text)["prompt"] == prompt
    assert yaml.safe_load(text)["max_new_tokens"] == 64


def test_every_value_is_followed_by_what_has_set_it() -> None:
    text = annotated(
        "tune_router",
        ["model=/m", "mixture=flexmix", "data.dirs.news=/x", "experiment=flexolmo_router", "optim.warmup_steps=9"],
    )
    for line in (
        "model: /m  # command line",
        "active_experts: 4  # conf/experiment/flexolmo_router.yaml",
        "  warmup_steps: 9  # command line",
        "  lr: 0.002  # conf/experiment/flexolmo_router.yaml",
        "  eps: 1.0e-08  # default",
        "  log_interval: 10  # conf/monitor/default.yaml",
        "    code: data/code  # conf/mixture/flexmix.yaml",
        "    news: /x  # command line",
        "  max_epochs: {}  # default",
        "output_dir: runs/tuned  # conf/tune_router.yaml",
        "seed: 0  # default",
    ):
        assert f"\n{line}\n" in f"\n{text}", text
    assert "  betas:  # conf/experiment/flexolmo_router.yaml\n  - 0.9\n" in text
    uncommented = [line for line in text.splitlines() if "  # " not in line]
    assert all(line.endswith(":") or line.lstrip().startswith("- ") for line in uncommented)


def test_a_mapping_that_was_typed_whole_comes_from_the_command_line() -> None:
    words = ["mixture=flexmix", "data.dirs={news:/n}", "data.weights={news:1}", "train.steps=1"]
    assert "    news: /n  # command line\n" in annotated("pretrain", words)


@pytest.mark.parametrize("arguments", [[], ["optim.lr=3"], ["nothing", "a=b"]])
def test_config_without_a_stage_is_told_how(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "config needs a stage" in one_line_of_status_2(["config", *arguments], capsys)


def test_config_has_the_mistakes_of_the_stage(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean seed?" in one_line_of_status_2(["config", "pretrain", "sed=3"], capsys)


# --- --config-dir


@pytest.mark.parametrize("is_one_word", [True, False])
def test_a_file_of_the_users_directory_is_a_choice(
    own: Path, is_one_word: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    flag = [f"--config-dir={own}"] if is_one_word else ["--config-dir", str(own)]
    main(["config", "pipeline", *flag, "launcher=mysite"])
    out = capsys.readouterr().out
    assert f"  partition: gpu  # {own}/launcher/mysite.yaml\n" in out
    assert f"  options:  # {own}/launcher/mysite.yaml\n" in out
    assert "  max_jobs: null  # default\n" in out
    assert compose("pipeline", ["launcher=mysite"])[0].launcher.partition == "gpu"


def test_it_is_looked_into_first_and_leaves_no_trace_in_the_configuration(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, before = compose("pretrain", [*PRETRAIN, "optim.lr=0.25"])
    monkeypatch.setenv(CONFIG_DIR, str(own))
    config, resolved = compose("pretrain", PRETRAIN)
    assert config.optim.lr == 0.25
    assert resolved == before


def test_processes_that_are_started_inherit_it_from_another_directory(own: Path, tmp_path: Path) -> None:
    """Through a shell that has moved on, as a stage of a pipeline."""
    program = (
        "import subprocess, sys\nfrom flexpert.config.tree import take_config_dir\n"
        f"assert take_config_dir(['a', '--config-dir', {own.name!r}, 'b']) == ['a', 'b']\n"
        "words = ['pipeline', 'launcher=mysite']\n"
        "sys.exit(subprocess.call([sys.executable, '-m', 'flexpert', 'config', *words], cwd='/'))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert f"partition: gpu  # {own}/launcher/mysite.yaml" in done.stdout


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["launcher=none"], ("there is no launcher=none", "local, mysite,")),
        (["launcher=typo"], ("launcher/typo.yaml: unknown key 'launcher.partion'", "did you mean launcher.partition?")),
        (["launcher=text"], ("launcher/text.yaml: launcher.max_jobs:", "'many'")),
        (["launcher=broken"], ("launcher/broken.yaml", "YAML")),
        (["experiment=broken"], ("there is no experiment=broken", "bare, choice, flexolmo_expert")),
        (["experiment=list"], ("experiment/list.yaml holds a list",)),
        (["experiment=round"], ("experiment/round.yaml names itself",)),
        (["experiment=typo"], ("experiment=typo sets train, which pipeline does not have", "no stage has it")),
        (["experiment=choice"], ("there is no model=huge",)),
    ],
)
def test_a_mistake_in_a_file_of_the_user_is_one_line(
    own: Path, words: list[str], parts: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    line = one_line_of_status_2(["pipeline", f"--config-dir={own}", *words], capsys)
    assert not [part for part in parts if part not in line], line


def test_a_stages_own_defaults_are_not_replaced(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (own / "pretrain.yaml").write_text("seed: 3\n")
    line = one_line_of_status_2(["pretrain", *PRETRAIN, f"--config-dir={own}"], capsys)
    assert f"{own}/pretrain.yaml" in line and "experiment=NAME" in line


@pytest.mark.parametrize(
    "words", [["--config-dir=/none"], ["--config-dir", "/none"], ["--config-dir="], ["--config-dir"]]
)
def test_a_directory_that_is_not_there_is_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    line = one_line_of_status_2(["plan", *words], capsys)
    assert "--config-dir=/none" in line or "--config-dir needs a directory" in line


# --- presets


#: Preset → its stage, what that needs, and the paper's figures.
RECIPES: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    "flexolmo_public": ("pretrain", ["data.dir=/d"], {
        "optim.lr": 9e-4, "optim.warmup_steps": 2000, "optim.schedule": "cosine", "optim.final_lr_ratio": 0.1,
        "optim.betas": [0.9, 0.95], "optim.weight_decay": 0.1, "optim.grad_clip": 1.0, "train.tokens": 10**12,
        "train.batch_tokens": 4_194_304, "train.sequence_length": 4096, "train.z_loss": 1e-5,
        "model.num_layers": 32, "model.hidden_size": 4096, "model.intermediate_size": 11008, "model.num_heads": 32,
    }),
    "flexolmo_expert": ("expert", EXPERT, {
        "optim.lr": 9e-4, "optim.warmup_steps": 2000, "optim.weight_decay": 0.0, "train.tokens": 50 * 10**9,
        "train.batch_tokens": 4_194_304, "train.sequence_length": 4096, "train.z_loss": 1e-5,
        "train.router_z_loss": 1e-3, "router.init": "mean", "router.documents": 1000,
        "router.bias": False, "public_share": 0.0, "router.calibration_steps": 0,
    }),
    "flexolmo_router": ("tune_router", TUNE, {
        "optim.lr": 2e-3, "optim.warmup_steps": 100, "optim.weight_decay": 0.1, "train.tokens": 5 * 10**9,
        "train.batch_tokens": 4_194_304, "train.sequence_length": 4096, "train.router_z_loss": 1e-3,
        "active_experts": 4,
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_the_papers_recipe_is_a_preset_with_its_figures(name: str) -> None:
    stage, needed, figures = RECIPES[name]
    config, _ = compose(stage, [*needed, f"experiment={name}"])
    for key, figure in figures.items():
        value = config
        for part in key.split("."):
            value = getattr(value, part)
        assert (key, value) == (key, figure)


def test_the_public_models_schedule_is_laid_out_for_five_trillion_tokens() -> None:
    config, _ = compose("pretrain", ["data.dir=/d", "experiment=flexolmo_public"])
    tokens = config.optim.horizon_steps * config.train.batch_tokens
    assert 0 <= tokens - 5 * 10**12 < config.train.batch_tokens
    assert config.train.num_steps == 238_419


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("stage", ["pretrain", "expert", "tune_router", "plan"])
def test_a_preset_for_another_stage_is_refused_with_its_own(
    stage: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fitting = RECIPES[name][0]
    assert (name in presets_of(stage)) == (stage == fitting)
    if stage != fitting:
        line = one_line_of_status_2([stage, f"experiment={name}"], capsys)
        assert f"experiment={name} sets " in line
        assert f"which {stage} does not have; it is for {fitting}\n" in line


def test_what_is_typed_wins_over_a_preset_and_a_later_preset_over_an_earlier_one(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CONFIG_DIR, str(own))
    config, _ = compose("pretrain", ["seed=1", "experiment=bare", *PRETRAIN, "train.batch_tokens=4096"])
    assert (config.seed, config.train.batch_tokens, config.model.hidden_size) == (1, 4096, 512)
    config, _ = compose("pretrain", ["+experiment=bare", "model=tiny", *PRETRAIN])
    assert (config.seed, config.model.hidden_size) == (7, 96)
    config, _ = compose("expert", ["experiment=flexolmo_expert", "experiment=onward", *EXPERT])
    assert (config.optim.lr, config.train.tokens) == (0.5, 50 * 10**9)


def test_help_lists_the_presets_of_the_stage_and_shows_one(capsys: pytest.CaptureFixture[str]) -> None:
    main(["tune_router", "--help", "experiment=flexolmo_router"])
    out = capsys.readouterr().out
    assert "\n  experiment=NAME   one of flexolmo_router\n" in out
    assert "\n  active_experts=4\n" in out
    main(["plan", "--help"])
    assert "experiment=" not in capsys.readouterr().out


def test_no_environment_variable_but_the_directory_is_read(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CONFIG_DIR, str(own))
    (own / "experiment/secret.yaml").write_text("output_dir: ${oc.env:SECRET}\n")
    monkeypatch.setenv("SECRET", "12345")
    with pytest.raises(UserError, match=r"oc\.env") as caught:
        compose("pretrain", [*PRETRAIN, "experiment=secret"])
    assert "12345" not in str(caught.value)
