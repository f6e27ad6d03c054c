"""The schema: what it holds, what it refuses and how it says so."""

import dataclasses
import re
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import yaml

from flexpert.cli import STAGES, main
from flexpert.config.compose import compose
from flexpert.config.options import Lockable, check_license
from flexpert.config.paths import KINDS, check_paths
from flexpert.config.schema import all_keys
from flexpert.config.stages import STAGE_CONFIGS
from flexpert.errors import UserError

#: What each stage cannot do without.
NEEDED: dict[str, list[str]] = {
    "prepare": ["data.documents=/none/*.txt", "tokenizer=/none", "output_dir=runs/data"],
    "pretrain": ["data.dir=/none", "train.steps=1"],
    "expert": ["base=/none", "data.dir=/none", "train.steps=1", "router.init=random", "name=math"],
    "assemble": ["base=/none", "contributions=/none"],
    "remove": ["model=/none", "experts=news"],
    "verify": ["contribution=/none"],
    "tune_router": ["model=/none", "data.dir=/none", "train.steps=1"],
    "evaluate": ["model=/none", "data.dirs.all=/none"],
    "generate": ["model=/none"],
    "report": ["run=/none"],
    "pipeline": [],
    "status": ["run=/none"],
    "logs": ["run=/none"],
    "cancel": ["run=/none"],
    "sync": ["run=/none"],
    "plan": [],
    "tune_kernels": ["model=tiny"],
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
    ("verify", ["contributions=/c"], ("did you mean contribution?",)),
    ("tune_router", ["active_expert=2"], ("did you mean active_experts?",)),
    ("evaluate", ["data.dir=/d"], ("did you mean data.dirs?",)),
    ("generate", ["tempersture=1"], ("did you mean temperature?",)),
    ("report", ["rums=/r"], ("did you mean runs?",)),
    ("pipeline", ["launcher.max_job=1"], ("did you mean launcher.max_jobs?",)),
    ("pretrain", ["hydra.verbose=true"], ("unknown key 'hydra.verbose' for stage pretrain (all keys",)),
    ("expert", ["model.linear=te"], ("'model.linear' for stage expert; it is a key of pretrain, plan (all",)),
    ("expert", ["exclude=[news]"], ("'exclude' for stage expert; it is a key of evaluate, generate (all",)),
    ("pretrain", ["~model"], ("is not an override: write key=value",)),
    ("generate", ["--prompt", "hello"], ("is not an override: write key=value",)),
    ("pretrain", [""], ("'' is not an override",)),
    # values of a wrong kind
    ("prepare", ["valid_fraction=some"], ("valid_fraction=some: expected a number",)),
    ("pretrain", ["train.steps=five"], ("train.steps=five: expected a whole number or null",)),
    ("pretrain", ["train.steps=1.5"], ("train.steps=1.5: expected a whole number",)),
    ("pretrain", ["train.steps="], ("train.steps=: expected a whole number",)),
    ("pretrain", ["optim.lr=fast"], ("optim.lr=fast: expected a number",)),
    ("pretrain", ["optim.betas=0.9"], ("optim.betas=0.9: expected [A,B,…]",)),
    ("pretrain", ["optim.betas=0.9,0.95"], ("optim.betas=0.9,0.95", "[A,B]")),
    ("pretrain", ["optim.betas=[a,b]"], ("optim.betas[0]=a: expected a number",)),
    ("pretrain", ["seed=1,2"], ("seed=1,2", "[A,B]")),
    ("pretrain", ["seed=range(1,3)"], ("seed=range(1,3)",)),
    ("pretrain", ["seed=("], ("seed=(",)),
    ("pretrain", ['seed="'], ('seed="',)),
    ("pretrain", ["seed=true"], ("seed=true: expected a whole number",)),
    ("pretrain", ["seed=null"], ("seed=null: expected a whole number",)),
    ("pretrain", ["seed=${resume}"], ("seed", "auto", "${KEY}")),
    ("expert", ["router.bias=perhaps"], ("router.bias=perhaps: expected true or false",)),
    ("expert", ["name=null"], ("name=null: expected text",)),
    ("expert", ["title=${seed"], ("title", "${KEY}")),
    ("expert", ["title=${nothing}"], ("title", "nothing")),
    ("evaluate", ["data.dirs=/d"], ("data.dirs=/d is not a mapping", "'data.dirs={NAME:VALUE,…}'")),
    ("evaluate", ["data.dirs={news}"], ("'news' in data.dirs={news} has no value",)),
    ("evaluate", ["exclude=[a"], ("exclude=[a is a list without its end",)),
    ("evaluate", ["exclude=null"], ("exclude=null: expected [A,B,…]",)),
    ("evaluate", ["data.dirs=null"], ("data.dirs=null: expected {NAME:VALUE,…}",)),
    ("evaluate", ["sweep_active_experts=[one]"], ("sweep_active_experts[0]=one: expected a whole number",)),
    ("pipeline", ["pipeline.gates={gain:much}"], ("pipeline.gates.gain=much: expected a number",)),
    ("pipeline", ["pipeline.owners={m:null}"], ("pipeline.owners.m=null: expected [A,B,…]",)),
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
    ("expert", ["license=all rights reserved"], ("license=all rights reserved", "SPDX", "LicenseRef-NAME")),
    ("prepare", ["data.license="], ("data.license= is not an SPDX expression",)),
    ("expert", ["router.init=random", "public_share=0.2"], ("public_share=0.2 needs public_data=DIR",)),
    ("expert", ["public_share=1.5"], ("public_share=1.5 must be in [0, 1)",)),
    ("expert", ["router.init=mean"], ("router.init=mean needs public_data=DIR",)),
    ("expert", ["router.init=best"], ("router.init=best is not one of mean, unit_mean, discriminant, random",)),
    ("expert", ["router.init=mean", "router.embedding=v.npy"], ("needs router.public_embedding",)),
    ("expert", ["router.init=discriminant", "router.embedding=v.npy"], ("needs router.embedding=stream",)),
    ("assemble", ["contributions=[]"], ("contributions=[DIR,…] names no contribution",)),
    ("assemble", ["active_experts=0"], ("flexpert: active_experts=0 must be positive",)),
    ("remove", ["experts=[]"], ("experts=[ID,…] names no expert",)),
    ("verify", ["model=/none"], ("contribution=DIR or model=DIR, one of them",)),
    ("verify", ["contribution=null"], ("contribution=DIR or model=DIR, one of them",)),
    ("verify", ["contribution=null", "model=/none", "base=/none"], ("base=DIR goes with contribution=DIR",)),
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
    ("pipeline", ["launcher.options=[-N2]"], ("'-N2' is not an option of sbatch in its long form",)),
    ("pipeline", ["launcher.jobs={expert:[--array=1-3]}"], ("launcher.jobs.expert: --array is said by the pipeline",)),
    ("pipeline", ["pipeline.resources={expert:[--clusters=a]}"], ("pipeline.resources.expert: --clusters",)),
    ("pipeline", ["pipeline.resources={training:[--nodes=2]}"], ("pipeline.resources.training is neither a stage",)),
    ("pipeline", ["launcher.dry_run=true"], ("launcher.dry_run=true is Slurm's",)),
    ("pipeline", ["pipeline.processes={assemble:2}"], ("processes.assemble=2", "runs in one process")),
    ("pipeline", ["pipeline.processes={expert:0}"], ("pipeline.processes.expert=0 must be positive",)),
    ("pipeline", ["pipeline.required=[poetry]"], ("pipeline.required", "poetry is not one of math, code")),
    ("logs", ["lines=0"], ("lines=0 must be positive",)),
    ("plan", ["cluster=b17"], ("there is no cluster=b17", "a100, h100, h200")),
    ("plan", ["mfu=1.2"], ("mfu=1.2 must be in (0, 1]",)),
    ("plan", ["cluster.memory_gib=0"], ("cluster.memory_gib=0.0 must be positive",)),
    ("plan", ["stage=report"], ("stage=report is not one of all, pretrain, expert, tune_router",)),
    ("plan", ["batch_tokens=10000"], ("batch_tokens=10000 does not divide by the 4096 tokens of a microbatch",)),
    ("tune_kernels", ["tokens=0"], ("tokens=0 must be positive",)),
    ("tune_kernels", ["model=huge"], ("model=huge is neither a model directory nor one of", "flex_37b")),
    ("tune_kernels", ["model=olmo2_7b"], ("model=olmo2_7b is dense",)),
    ("tune_kernels", ["model=flex_2x7b", "active_experts=3"], ("active_experts=3 is more than the 2 experts",)),
    ("tune_kernels", ["model=flex_37b", "expert_tensor=3"], ("expert_tensor=3 does not divide", "11008")),
    # inputs that are not there
    ("prepare", [], ("tokenizer=/none does not exist", "tokenizer.json")),
    ("pretrain", [], ("data.dir=/none does not exist", "flexpert prepare")),
    ("expert", [], ("data.dir=/none does not exist",)),
    ("assemble", [], ("base=/none does not exist", "config.json")),
    ("remove", [], ("model=/none does not exist",)),
    ("verify", [], ("contribution=/none does not exist", "flexpert expert")),
    ("tune_router", [], ("data.dir=/none does not exist",)),
    ("evaluate", [], ("model=/none does not exist",)),
    ("generate", ["prompt=x"], ("model=/none does not exist", "on this machine")),
    ("report", [], ("run=/none does not exist", "flexpert pipeline")),
    ("status", [], ("run=/none does not exist", "flexpert pipeline")),
    ("logs", [], ("run=/none does not exist",)),
    ("cancel", [], ("run=/none does not exist",)),
    ("sync", [], ("sync needs W&B's server", "WANDB_API_KEY")),
    ("pipeline", ["pipeline.base=/none"], ("pipeline.base=/none does not exist",)),
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


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current directory: runs as the stages lay them out, with the files that tell what a directory is."""
    monkeypatch.chdir(tmp_path)
    for file in (
        "run/pipeline.yaml", "run/data/news/manifest.json", "run/data/news/tokenizer/tokenizer.json",
        "run/public/model/config.json", "run/public/model/tokenizer.json", "run/public/model/model.safetensors",
        "run/experts/news/contribution/contribution.json", "run/assembled/config.json", "partial/logs/public.log",
    ):  # fmt: skip
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).touch()


#: Stage, key and directory in place of one of those that it needs, and the line.
WRONG_PATHS: list[tuple[str, str, str, str]] = [
    ("generate", "model", "run/data/news", "model=run/data/news is a data set, not a model: give a Hugging Face"),
    ("generate", "model", "run/public", "model=run/public is not a model, it has no config.json: did you mean"
     " run/public/model?"),
    ("generate", "model", "run", "model=run is a pipeline's run, not a model: did you mean run/assembled?"),
    ("generate", "model", "run/public/model/model.safetensors", "is a file, not a model: did you mean"
     " run/public/model?"),
    ("generate", "model", "allenai/OLMo-2-1124-7B", "model=allenai/OLMo-2-1124-7B does not exist: give a Hugging Face"
     " model directory on this machine"),
    ("generate", "model", "m" * 5000, "does not exist"),
    ("pretrain", "data.dir", "run/data/news/tokenizer", "is a tokenizer, not a data set: did you mean run/data/news?"),
    ("pretrain", "base", "run/data/news", "base=run/data/news is a data set, not a model"),
    ("expert", "base", "run/public/modle", "base=run/public/modle does not exist: give a Hugging Face"),
    ("expert", "public_data", "run/public/model", "public_data=run/public/model is a model, not a data"),
    ("tune_router", "model", "run/experts/news/contribution", "model=run/experts/news/contribution is a contribution,"
     " not a model"),
    ("assemble", "base", "run/public", "did you mean run/public/model?"),
    ("assemble", "contributions", "run/experts/news/contribution,run/experts/news", "contributions=run/experts/news is"
     " not a contribution, it has no contribution.json: did you mean run/experts/news/contribution?"),
    ("remove", "model", "run/data", "model=run/data is not a model"),
    ("verify", "contribution", "run/experts/news", "did you mean run/experts/news/contribution?"),
    ("verify", "base", "run/data/news", "base=run/data/news is a data set, not a model"),
    ("evaluate", "data.dirs.math", "run/data/math", "data.dirs.math=run/data/math does not exist"),
    ("evaluate", "baselines.public", "run/public", "baselines.public=run/public is not a model"),
    ("evaluate", "baselines.dense.news", "run", "baselines.dense.news=run is a pipeline's run, not a model"),
    ("prepare", "tokenizer", "run/data/news", "is a data set, not a tokenizer: did you mean run/data/news/tokenizer?"),
    ("prepare", "tokenizer", "run/public", "did you mean run/public/model?"),
    ("report", "run", "run/assembled", "run=run/assembled is a model, not a pipeline's run: did you mean run?"),
    ("pipeline", "pipeline.base", "run/public", "did you mean run/public/model?"),
    ("pretrain", "data.dir", "run/data", "data.dir=run/data is not a data set, it has no manifest.json: did you mean"
     " run/data/news?"),
    ("pretrain", "output_dir", "run/data/news/manifest.json/new/run", "output_dir=run/data/news/manifest.json/new/run"
     " cannot be written: run/data/news/manifest.json is not a directory"),
]  # fmt: skip


def right_path(stage: str, key: str) -> str | None:
    """The directory that an option takes, where it takes one."""
    places = {
        "model": "run/public/model",
        "data": "run/data/news",
        "contribution": "run/experts/news/contribution",
        "tokenizer": "run/data/news/tokenizer",
        "run": "run",
    }
    field = next((field for name, _, field in all_keys(STAGE_CONFIGS[stage]) if key == name), None)
    return places.get(field.metadata.get("path", "")) if field is not None else None


def with_right_paths(stage: str) -> list[str]:
    words = []
    for word in NEEDED[stage]:
        key, _, value = word.partition("=")
        words.append(f"{key}={right_path(stage, key.replace('data.dirs.all', 'data.dirs')) or value}")
    return words


@pytest.mark.usefixtures("tree")
@pytest.mark.parametrize(("stage", "key", "path", "message"), WRONG_PATHS, ids=[f"{r[0]} {r[1]}" for r in WRONG_PATHS])
def test_a_wrong_path_is_answered_with_what_was_probably_meant(
    stage: str, key: str, path: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = one_line_of_status_2([stage, *with_right_paths(stage), f"{key}={path}"], capsys)
    assert message in line
    assert f"{key}=" in line


@pytest.mark.usefixtures("tree")
@pytest.mark.parametrize("stage", STAGES)
def test_the_right_paths_are_accepted(stage: str) -> None:
    check_paths(stage, compose(stage, with_right_paths(stage))[0])


@pytest.mark.usefixtures("tree")
def test_what_is_left_of_a_run_may_be_reported_on() -> None:
    check_paths("report", compose("report", ["run=partial"])[0])


def test_every_input_directory_is_looked_at() -> None:
    found = {(stage, key) for stage in STAGES for key, _, field in all_keys(STAGE_CONFIGS[stage])
             if field.metadata.get("path") in KINDS}  # fmt: skip
    assert found == {
        ("prepare", "tokenizer"), ("prepare", "data.exclude"), ("pretrain", "data.dir"), ("pretrain", "data.dirs"),
        ("pretrain", "base"), ("expert", "data.dir"), ("expert", "data.dirs"), ("expert", "base"),
        ("expert", "public_data"), ("tune_router", "data.dir"), ("tune_router", "data.dirs"), ("tune_router", "model"),
        ("assemble", "base"), ("assemble", "model"), ("assemble", "contributions"), ("remove", "model"),
        ("verify", "contribution"), ("verify", "base"), ("verify", "model"),
        ("evaluate", "model"), ("evaluate", "data.dirs"), ("evaluate", "baselines.public"),
        ("evaluate", "baselines.dense"), ("generate", "model"), ("report", "run"), ("report", "runs"),
        ("pipeline", "pipeline.base"), ("pipeline", "pipeline.prepared"), ("pipeline", "pipeline.contributions"),
        ("status", "run"), ("logs", "run"), ("cancel", "run"),
    }  # fmt: skip


def test_home_is_expanded_in_paths_and_in_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    config = compose("evaluate", ["model=~/m", "data.dirs={a:~/a,b:/b~/b}", "data.dirs.c=~/c", "output_dir=~/out"])[0]
    assert (config.model, config.output_dir) == ("/home/someone/m", "/home/someone/out")
    assert config.data.dirs == {"a": "/home/someone/a", "b": "/b~/b", "c": "/home/someone/c"}
    assert compose("generate", ["model=m", "prompt=~/ is home"])[0].prompt == "~/ is home"


def test_mistakes_in_several_groups_are_told_together() -> None:
    with pytest.raises(UserError) as raised:
        compose("pretrain", ["output_dir=x", "model=tiny"])
    assert "training needs data.dir" in str(raised.value) and "; also: give exactly one of" in str(raised.value)


def test_the_table_of_mistakes_covers_every_stage() -> None:
    assert {stage for stage, _, _ in BAD} == STAGES.keys() == STAGE_CONFIGS.keys() == NEEDED.keys()


def test_an_unknown_stage_is_answered_with_the_stages(capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no stage 'pre-train': did you mean pretrain?" in one_line_of_status_2(["pre-train"], capsys)
    assert all(stage in one_line_of_status_2(["xyz"], capsys) for stage in STAGES)


@pytest.mark.parametrize(
    ("stage", "keys"),
    [
        ("prepare", ["output_dir"]),
        ("expert", ["base", "name"]),
        ("assemble", ["contributions"]),
        ("remove", ["model", "experts"]),
        ("tune_router", ["model"]),
        ("evaluate", ["model", "data.dirs"]),
        ("generate", ["model"]),
        ("tune_kernels", ["model"]),
    ],
)
def test_a_stage_without_its_keys_names_them_all(
    stage: str, keys: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    line = one_line_of_status_2([stage], capsys)
    assert line == f"flexpert: {stage} needs {', '.join(f'{key}=…' for key in keys)}\n"


@pytest.mark.parametrize(
    "license_",
    ["MIT", "Apache-2.0", "GPL-2.0+", "MIT OR Apache-2.0", "GPL-2.0-only WITH Classpath-exception-2.0",
     "(MIT OR (ISC AND CC0-1.0)) AND LicenseRef-terms.2024", "LicenseRef-private-terms"],
)  # fmt: skip
def test_a_licence_is_an_spdx_expression(license_: str) -> None:
    check_license("license", license_)


@pytest.mark.parametrize(
    "license_",
    ["", "all rights reserved", "MIT or ISC", "MIT OR", "(MIT", "MIT)", "MIT/ISC", "MIT, ISC", "MIT\n", "()"],
)
def test_another_text_is_no_licence(license_: str) -> None:
    with pytest.raises(UserError, match="LicenseRef-NAME"):
        check_license("license", license_)


def test_an_evaluation_goes_into_a_directory_of_its_own() -> None:
    config, resolved = compose("evaluate", NEEDED["evaluate"])
    assert re.fullmatch(r"runs/evaluations/\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", config.output_dir)
    assert yaml.safe_load(resolved)["output_dir"] == config.output_dir


@pytest.mark.parametrize(
    ("overrides", "noted"),
    [
        (["train.steps=200"], True),
        (["train.steps=200", "optim.warmup_steps=200"], True),
        (["train.steps=200", "optim.warmup_steps=300", "optim.horizon_steps=1000"], True),
        (["train.tokens=200", "train.batch_tokens=4096", "optim.warmup_steps=1"], True),
        (["train.steps=200", "optim.warmup_steps=199"], False),
        (["train.steps=200", "optim.warmup_steps=0"], False),
    ],
)
def test_a_warm_up_that_the_run_does_not_outlast_is_noted(overrides: list[str], noted: bool) -> None:
    config, _ = compose("pretrain", ["data.dir=/none", *overrides])
    warmup, steps = config.optim.warmup_steps, config.train.num_steps
    start = f"optim.warmup_steps={warmup} is not shorter than the run's {steps} steps"
    assert [note.startswith(start) for note in config.notes()] == [True] * noted


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
