"""What `--help` says, and how soon."""

import re
import subprocess
import sys

import pytest
from test_config import one_line_of_status_2

from flexpert.cli import STAGES, main
from flexpert.config.schema import all_keys
from flexpert.config.stages import STAGE_CONFIGS
from flexpert.config.tree import group_options, groups_of


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


def test_help_begins_with_the_keys_that_must_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    main(["expert", "--help"])
    _, _, rest = capsys.readouterr().out.partition("\nrequired:\n")
    required, _, others = rest.partition("\n\n")
    assert re.findall(r"^  (\S+)=…$", required, re.MULTILINE) == ["base", "name"]
    assert "=…" not in others
    assert "needed unless router.init=random" in others
    assert others.count("give exactly one of") == 2


@pytest.mark.parametrize(
    ("words", "shown", "not_shown"),
    [
        (["pipeline", "pipeline=smoke"], "pipeline.experts={math:[data=demo_math],news:[data=demo_news]}", "code"),
        (["pretrain", "model=small", "train.steps=3"], "model.hidden_size=512", "train.steps=3"),
        (["prepare", "data=demo_math"], "\ndefaults:\n  data.documents=demo:math", "data.documents=…"),
    ],
)
def test_help_shows_the_values_of_the_choices_beside_it(
    words: list[str], shown: str, not_shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main([*words, "--help"])
    out = capsys.readouterr().out
    assert shown in out
    assert not_shown not in re.sub(r"one of .*", "", out)


def test_help_refuses_a_choice_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no pipeline=none" in one_line_of_status_2(["pipeline", "pipeline=none", "--help"], capsys)


def test_help_of_the_command_lists_the_stages(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    out = capsys.readouterr().out
    assert all(f"\n  {stage} " in out for stage in STAGES)


def test_help_and_mistakes_do_not_wait_for_torch() -> None:
    program = (
        "import sys; from flexpert.cli import main; main(['--help'])\n"
        "assert not {'torch', 'hydra', 'omegaconf', 'yaml', 'numpy'} & set(sys.modules)\n"
        "main(['pretrain', '--help']); assert 'torch' not in sys.modules\n"
        "try: main(['pretrain', 'no.key=1'])\n"
        "except SystemExit: assert 'torch' not in sys.modules\n"
        "try: main(['expert', 'base=/none', 'data.dir=/none', 'name=a', 'train.steps=1', 'router.init=random'])\n"
        "except SystemExit: assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
