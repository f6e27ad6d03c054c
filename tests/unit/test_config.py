"""The schema: what it holds, what it refuses and how it says so, and the sizes of the models that it describes."""

import dataclasses
import subprocess
import sys
import time
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from flexpert.cli import STAGES, main
from flexpert.config.compose import all_keys, compose, conf_directory, group_options, groups_of
from flexpert.config.groups import Lockable, ModelConfig
from flexpert.config.stages import STAGE_CONFIGS
from flexpert.errors import UserError
from flexpert.model.transformer import build_on_meta

#: What each stage cannot do without.
NEEDED: dict[str, list[str]] = {
    "prepare": ["data.documents=/none/*.txt", "tokenizer=/none"],
    "pretrain": ["data.dir=/none", "train.steps=1"],
    "expert": ["base=/none", "data.dir=/none", "train.steps=1", "router.init=random", "name=math"],
    "assemble": ["base=/none", "contributions=/none"],
    "remove": ["model=/none", "experts=news"],
    "tune_router": ["model=/none", "data.dir=/none", "train.steps=1"],
    "evaluate": ["model=/none", "data.dirs.all=/none"],
    "generate": ["model=/none"],
    "report": ["run=/none"],
    "pipeline": [],
}

#: Stage, overrides (after what the stage needs, or "only" these), and what the one line must hold.
BAD: list[tuple[str, list[str], tuple[str, ...]]] = [
    # keys
    ("prepare", ["data.document=x"], ("data.document'", "did you mean data.documents?")),
    ("pretrain", ["model.hidden_sise=96"], ("did you mean model.hidden_size?", "flexpert pretrain --help")),
    ("pretrain", ["hidden_size=96"], ("did you mean model.hidden_size?",)),
    ("pretrain", ["steps=3"], ("did you mean train.steps?",)),
    ("expert", ["routers.init=mean"], ("did you mean router.init?",)),
    ("assemble", ["contribution=/c"], ("did you mean contributions?",)),
    ("remove", ["expert=news"], ("did you mean experts?",)),
    ("tune_router", ["active_expert=2"], ("did you mean active_experts?",)),
    ("evaluate", ["data.dir=/d"], ("did you mean data.dirs?",)),
    ("generate", ["tempersture=1"], ("did you mean temperature?",)),
    ("report", ["runs=/r"], ("did you mean run?",)),
    ("pipeline", ["launcher.max_job=1"], ("did you mean launcher.max_jobs?",)),
    ("pretrain", ["hydra.verbose=true"], ("unknown key 'hydra.verbose'",)),
    ("pretrain", ["~model"], ("is not an override: write key=value",)),
    ("generate", ["--prompt", "hello"], ("is not an override: write key=value",)),
    ("pretrain", [""], ("'' is not an override",)),
    # values of a wrong kind
    ("prepare", ["valid_fraction=some"], ("valid_fraction", "some", "Float")),
    ("pretrain", ["train.steps=many"], ("train.steps", "many", "Integer")),
    ("pretrain", ["train.steps=1.5"], ("train.steps", "1.5")),
    ("pretrain", ["train.steps="], ("train.steps",)),
    ("pretrain", ["optim.lr=fast"], ("optim.lr", "fast", "Float")),
    ("pretrain", ["optim.betas=0.9"], ("optim.betas",)),
    ("pretrain", ["optim.betas=0.9,0.95"], ("optim.betas=0.9,0.95", "[A,B]")),
    ("pretrain", ["optim.betas=[a,b]"], ("optim.betas[0]", "'a'")),
    ("pretrain", ["seed=1,2"], ("seed=1,2", "[A,B]")),
    ("pretrain", ["seed=range(1,3)"], ("seed=range(1,3)",)),
    ("pretrain", ["seed=("], ("seed=(",)),
    ("pretrain", ['seed="'], ('seed="',)),
    ("pretrain", ["seed=true"], ("seed",)),
    ("expert", ["router.bias=perhaps"], ("router.bias", "perhaps", "bool")),
    ("expert", ["name=null"], ("name",)),
    ("expert", ["title=${seed"], ("title", "${KEY}")),
    ("expert", ["title=${nothing}"], ("title", "nothing")),
    ("evaluate", ["data.dirs=/d"], ("/d is not a mapping", "{NAME:VALUE,…}")),
    ("evaluate", ["data.dirs={news}"], ("'news'", "has no value")),
    ("evaluate", ["exclude=null"], ("exclude",)),
    ("evaluate", ["sweep_active_experts=[one]"], ("sweep_active_experts[0]",)),
    ("pipeline", ["pipeline.gates={gain:much}"], ("pipeline.gates.gain", "much")),
    # groups
    ("prepare", ["data=demo_poems"], ("data=demo_poems", "demo_math")),
    ("pretrain", ["model=huge"], ("model=huge", "tiny")),
    ("pretrain", ["model=/models/olmo"], ("model=/models/olmo", "tiny")),
    ("pretrain", ["optim=sgd"], ("optim=sgd", "adamw")),
    ("pipeline", ["pipeline=none"], ("pipeline=none", "demo", "smoke")),
    ("pipeline", ["launcher=cloud"], ("launcher=cloud", "local")),
    # values that cannot be, or not together
    ("prepare", ["train_tokenizer.vocab_size=512"], ("either tokenizer=DIR or train_tokenizer.vocab_size=N",)),
    ("prepare", ["tokenizer=null"], ("either tokenizer=DIR or train_tokenizer.vocab_size=N",)),
    ("prepare", ["tokenizer=null", "train_tokenizer.vocab_size=256"], ("vocab_size=256", "too small")),
    ("prepare", ["valid_fraction=1"], ("valid_fraction=1.0", "[0, 1)")),
    ("prepare", ["valid_documents=-1"], ("valid_documents=-1",)),
    ("pretrain", ["model.hidden_size=97"], ("model.hidden_size=97 does not divide by model.num_heads=4",)),
    ("pretrain", ["model.hidden_size=100"], ("model.hidden_size / model.num_heads = 25 must be even",)),
    ("pretrain", ["model.num_kv_heads=3"], ("model.num_heads=4 does not divide by model.num_kv_heads=3",)),
    ("pretrain", ["model.num_heads=0"], ("model.num_heads=0 must be positive",)),
    ("pretrain", ["model=flex_37b"], ("model.num_experts=0", "flexpert expert")),
    ("pretrain", ["train.batch_tokens=100"], ("train.batch_tokens=100", "train.sequence_length=4096")),
    ("pretrain", ["train.microbatch_sequences=3"], ("1024 sequences", "train.microbatch_sequences=3")),
    ("pretrain", ["train.tokens=5"], ("exactly one of train.steps and train.tokens",)),
    ("pretrain", ["train.steps=null"], ("exactly one of train.steps and train.tokens",)),
    ("pretrain", ["train.steps=-1"], ("train.steps=-1 must be positive",)),
    ("pretrain", ["train.z_loss=-1"], ("train.z_loss=-1",)),
    ("pretrain", ["optim.lr=nan"], ("optim.lr=nan must be positive",)),
    ("pretrain", ["optim.lr=inf"], ("optim.lr=inf must be positive",)),
    ("pretrain", ["optim.final_lr_ratio=-0.1"], ("optim.final_lr_ratio=-0.1",)),
    ("pretrain", ["optim.betas=[0.9]"], ("optim.betas=[0.9] must be two numbers",)),
    ("pretrain", ["optim.schedule=step"], ("optim.schedule=step is not one of cosine, linear, constant",)),
    ("pretrain", ["checkpoint.interval=0"], ("checkpoint.interval=0 must be positive",)),
    ("pretrain", ["monitor.wandb=yes"], ("monitor.wandb=yes is not one of off, offline, online, auto",)),
    ("pretrain", ["resume=perhaps"], ("resume=perhaps is not one of auto, never",)),
    ("pretrain", ["seed=-1"], ("seed=-1", "[0, 2^32)")),
    ("pretrain", ["seed=99999999999999999999"], ("seed=99999999999999999999", "[0, 2^32)")),
    ("expert", ["name=Math"], ("name=Math is not an expert id", "title=")),
    ("expert", ["name=public"], ("name=public is not an expert id",)),
    ("expert", ["name="], ("name= is not an expert id",)),
    ("expert", ["router.init=mean"], ("router.init=mean needs router.public_data=DIR",)),
    ("expert", ["router.init=best"], ("router.init=best is not one of mean, unit_mean, discriminant, random",)),
    ("expert", ["router.init=mean", "router.embedding=v.npy"], ("needs router.public_embedding",)),
    ("expert", ["router.init=discriminant", "router.embedding=v.npy"], ("needs router.embedding=stream",)),
    ("assemble", ["contributions=[]"], ("contributions=[DIR,…] names no contribution",)),
    ("assemble", ["active_experts=0"], ("flexpert: active_experts=0 must be positive",)),
    ("remove", ["experts=[]"], ("experts=[ID,…] names no expert",)),
    ("tune_router", ["active_experts=-2"], ("flexpert: active_experts=-2 must be positive",)),
    ("evaluate", ["data.dirs={}"], ("data.dirs={NAME:DIR,…} names no data set",)),
    ("evaluate", ["data.split=test"], ("data.split=test is not one of valid, train",)),
    ("evaluate", ["batch_sequences=0"], ("flexpert: batch_sequences=0 must be positive",)),
    ("evaluate", ["sweep_active_experts=[2,0]"], ("sweep_active_experts=[2, 0]",)),
    ("evaluate", ["baselines.btm_temperature=0"], ("baselines.btm_temperature=0.0 must be positive",)),
    ("generate", ["top_p=0"], ("top_p=0.0 must be in (0, 1]",)),
    ("generate", ["temperature=-1"], ("temperature=-1.0",)),
    ("pipeline", ["pipeline.experts={}"], ("pipeline.experts names no expert",)),
    ("pipeline", ["pipeline.experts.Bad=[data=demo_math]"], ("pipeline.experts.Bad", "a-z")),
    ("pipeline", ["seed=-1"], ("seed=-1",)),
    # inputs that are not there
    ("prepare", [], ("/none", "tokenizer.json")),
    ("pretrain", [], ("/none", "flexpert prepare")),
    ("expert", [], ("/none", "config.json")),
    ("assemble", [], ("/none",)),
    ("remove", [], ("/none",)),
    ("evaluate", [], ("/none",)),
    ("generate", ["prompt=x"], ("/none",)),
    ("generate", ["prompt_file=/none/prompt"], ("/none",)),
    ("report", [], ("/none",)),
]


def one_line_of_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run the command, which must end with status 2 and one line on standard error, and nothing else."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    out, error = capsys.readouterr()
    assert ended.value.code == 2
    assert error.startswith("flexpert: ")
    assert error.endswith("\n")
    assert error.count("\n") == 1
    assert "Traceback" not in error
    assert out == ""
    return error


@pytest.mark.parametrize(("stage", "overrides", "parts"), BAD, ids=[f"{row[0]} {' '.join(row[1])}" for row in BAD])
def test_a_mistake_is_one_line_and_leaves_nothing_behind(
    stage: str,
    overrides: list[str],
    parts: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    line = one_line_of_status_2([stage, *NEEDED[stage], *overrides], capsys)
    assert not [part for part in parts if part not in line], line
    assert set(tmp_path.rglob("*")) <= {tmp_path / "runs"}  # the parent of the default output_dir, empty


def test_the_table_of_mistakes_covers_every_stage() -> None:
    assert {stage for stage, _, _ in BAD} == STAGES.keys() == STAGE_CONFIGS.keys() == NEEDED.keys()


def test_an_unknown_stage_is_answered_with_the_stages(capsys: pytest.CaptureFixture[str]) -> None:
    line = one_line_of_status_2(["pre-train"], capsys)
    assert "'pre-train'" in line
    assert all(stage in line for stage in STAGES)


@pytest.mark.parametrize(
    ("stage", "keys"),
    [
        ("prepare", ["data.documents"]),
        ("pretrain", ["data.dir"]),
        ("expert", ["data.dir", "base", "name"]),
        ("assemble", ["base"]),
        ("remove", ["model"]),
        ("tune_router", ["data.dir", "model"]),
        ("evaluate", ["model"]),
        ("generate", ["model"]),
        ("report", ["run"]),
    ],
)
def test_a_stage_without_its_keys_names_them_all(
    stage: str, keys: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    line = one_line_of_status_2([stage], capsys)
    assert line == f"flexpert: {stage} needs {', '.join(f'{key}=…' for key in keys)}\n"


@pytest.mark.parametrize("stage", STAGES)
def test_the_help_of_a_stage_lists_every_key_with_its_meaning(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    main([stage, "--help"])
    out = capsys.readouterr().out
    for key, _, field in all_keys(STAGE_CONFIGS[stage]):
        assert field.metadata["help"].strip(), f"{key} has no help text"
        assert f"\n  {key}=" in out
        assert f"\n        {field.metadata['help']}" in out
    for group in groups_of(stage):
        assert f"\n  {group}=NAME   one of {', '.join(group_options(group))}" in out


def test_help_of_the_command_lists_the_stages(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    out = capsys.readouterr().out
    assert all(f"\n  {stage} " in out for stage in STAGES)


def test_help_answers_within_half_a_second() -> None:
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "flexpert", "--help"], check=True, capture_output=True)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.5


def test_help_and_mistakes_do_not_wait_for_torch() -> None:
    program = (
        "import sys; from flexpert.cli import main; main(['--help']); assert 'hydra' not in sys.modules\n"
        "main(['pretrain', '--help']); assert 'torch' not in sys.modules\n"
        "try: main(['pretrain', 'no.key=1'])\n"
        "except SystemExit: assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def assert_locked(config: Lockable) -> None:
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        with pytest.raises(FrozenInstanceError, match=field.name):
            setattr(config, field.name, None)
        value = getattr(config, field.name)
        if isinstance(value, Lockable):
            assert_locked(value)


@pytest.mark.parametrize("stage", STAGES)
def test_a_composed_config_is_read_only(stage: str) -> None:
    config, _ = compose(stage, NEEDED[stage])
    assert_locked(config)
    with pytest.raises(FrozenInstanceError):
        config.new_key = 1


def test_two_configs_share_nothing() -> None:
    first, _ = compose("evaluate", [*NEEDED["evaluate"], "exclude=news"])
    second, _ = compose("evaluate", NEEDED["evaluate"])
    assert (first.exclude, second.exclude) == (["news"], [])


def group_choices() -> list[tuple[str, str, str]]:
    return [(stage, group, option) for stage in STAGES for group in groups_of(stage) for option in group_options(group)]


@pytest.mark.parametrize(("stage", "group", "option"), group_choices())
def test_every_file_of_every_group_composes(stage: str, group: str, option: str) -> None:
    needed = [word for word in NEEDED[stage] if option == "files" or not word.startswith("data.documents=")]
    words = [*needed, f"{group}={option}"]
    if stage == "pretrain" and option.startswith("flex_"):
        with pytest.raises(UserError, match=r"model\.num_experts=0"):
            compose(stage, words)
    else:
        compose(stage, words)


def test_every_file_below_conf_is_a_stage_or_a_choice() -> None:
    choices = {f"{group}/{option}.yaml" for _, group, option in group_choices()}
    files = {path.relative_to(conf_directory()).as_posix() for path in conf_directory().rglob("*.yaml")}
    assert files == choices | {f"{stage}.yaml" for stage in STAGES}


def model_config(name: str, **changes: Any) -> ModelConfig:
    config = ModelConfig(**OmegaConf.load(conf_directory() / "model" / f"{name}.yaml"))  # type: ignore[arg-type]
    config = dataclasses.replace(config, **changes)
    config.check()
    return config


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [("olmo2_7b", "7.299", "7.299"), ("flex_2x7b", "11.63", "11.63"), ("flex_37b", "37.60", "20.29")],
)
def test_published_models_have_their_published_sizes(name: str, total: str, active: str) -> None:
    """FlexOlmo's sizes, in billions (FLEXOLMO.md, model)."""
    config = model_config(name)
    decimals = len(total.partition(".")[2])
    assert f"{config.num_params() / 1e9:.{decimals}f}" == total
    assert f"{config.num_active_params() / 1e9:.{decimals}f}" == active


@pytest.mark.parametrize(
    "config",
    [
        model_config("flex_37b"),
        model_config("flex_2x7b"),
        model_config("olmo2_7b"),
        model_config("olmo2_1b"),
        model_config("tiny", vocab_size=1024),
        model_config("tiny", vocab_size=384, num_kv_heads=2),
        model_config("tiny", vocab_size=384, num_kv_heads=1, num_experts=5, active_experts=2, router_bias=True),
    ],
)
def test_the_counted_parameters_are_those_of_the_built_model(config: ModelConfig) -> None:
    model = build_on_meta(config)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert sum(sizes.values()) == config.num_params()
    experts = sum(size for name, size in sizes.items() if ".feed_forward." in name and ".router." not in name)
    idle = config.num_experts - config.active_experts if config.num_experts else 0
    assert config.num_active_params() == config.num_params() - experts * idle // max(1, config.num_experts)


def test_the_tiny_model_has_the_size_that_its_file_names() -> None:
    assert f"{model_config('tiny', vocab_size=1024).num_params() / 1e6:.2f}" == "0.64"
