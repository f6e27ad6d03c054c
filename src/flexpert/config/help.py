"""`flexpert STAGE --help`: every key with its meaning and default, those that must be given first."""

from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from flexpert.config.compose import as_typed, check_group_choice, group_options, groups_of, leaves_of, register_schema
from flexpert.config.stages import STAGE_CONFIGS


def describe(stage: str, overrides: list[str]) -> str:
    """The help of a stage. Defaults are those of the group choices among the overrides; other overrides do not count.

    Raises:
        UserError: there is no such choice.
    """
    groups = groups_of(stage)
    choices = [override for override in overrides if override.partition("=")[0] in groups]
    for choice in choices:
        check_group_choice(choice)
    register_schema(stage)
    GlobalHydra.instance().clear()
    with initialize_config_module("flexpert.conf", version_base="1.3"):
        defaults: Any = OmegaConf.to_container(hydra_compose(config_name=stage, overrides=choices))
    required, others = [], []
    for key, (_, field) in leaves_of(stage).items():
        value = defaults
        for name in key.split("."):
            value = value[name]
        meaning = f"        {field.metadata['help']}"
        if value == "???":
            required += [f"  {key}=…", meaning]
        else:
            others += [f"  {key}={as_typed(value)}", meaning]
    lines = [(STAGE_CONFIGS[stage].__doc__ or "").strip(), "", f"usage: flexpert {stage} key=value …"]
    named = [f"  {group}=NAME   one of {', '.join(group_options(group))}" for group in groups]
    sections = {"required:": required, "named choices, each of which sets several keys:": named, "defaults:": others}
    for heading, content in sections.items():
        lines += ["", heading, *content] if content else []
    return "\n".join(lines)
