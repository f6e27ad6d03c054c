"""Every file of `conf/` is a stage or a choice of a group, and composes."""

import pytest
from test_config import NEEDED

from flexpert.cli import STAGES
from flexpert.config.compose import compose
from flexpert.config.presets import presets_of
from flexpert.config.tree import conf_directory, group_options, groups_of
from flexpert.errors import UserError


def group_choices() -> list[tuple[str, str, str]]:
    return [(stage, group, option) for stage in STAGES for group in groups_of(stage) for option in group_options(group)]


@pytest.mark.parametrize(("stage", "group", "option"), group_choices())
def test_every_file_of_every_group_composes(stage: str, group: str, option: str) -> None:
    needed = [word for word in NEEDED[stage] if option == "files" or not word.startswith("data.documents=")]
    needed = [word for word in needed if group != "mixture" or not word.startswith("data.dir=")]
    words = [*needed, f"{group}={option}"]
    if stage == "pretrain" and option.startswith("flex_"):
        with pytest.raises(UserError, match=r"model\.num_experts=0"):
            compose(stage, words)
    else:
        compose(stage, words)


def test_every_file_below_conf_is_a_stage_or_a_choice() -> None:
    choices = {f"{group}/{option}.yaml" for _, group, option in group_choices()}
    files = {path.relative_to(conf_directory()).as_posix() for path in conf_directory().rglob("*.yaml")}
    presets = {f"experiment/{name}.yaml" for stage in STAGES for name in presets_of(stage)}
    assert files == choices | presets | {f"{stage}.yaml" for stage in STAGES}
