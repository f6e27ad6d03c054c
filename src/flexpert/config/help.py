"""`flexpert STAGE --help`: every key with its meaning and default, those that must be given first."""

from typing import Any

from hydra import compose as hydra_compose
from omegaconf import OmegaConf

from flexpert.config.compose import as_typed, conf_tree, understand
from flexpert.config.presets import presets_of
from flexpert.config.schema import leaves_of
from flexpert.config.stages import STAGE_CONFIGS
from flexpert.config.tree import EXPERIMENT, group_options, groups_of


def describe(stage: str, overrides: list[str]) -> str:
    """The help of a stage. Defaults are those of the choices among the overrides; other overrides do not count.

    Raises:
        UserError: there is no such choice.
    """
    groups = groups_of(stage)
    chosen = [override for override in overrides if override.lstrip("+").partition("=")[0] in (*groups, EXPERIMENT)]
    choices, _ = understand(stage, chosen)
    with conf_tree(stage):
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
    if presets := presets_of(stage):
        named.append(f"  {EXPERIMENT}=NAME   one of {', '.join(presets)}")
    sections = {"required:": required, "named choices, each of which sets several keys:": named, "defaults:": others}
    for heading, content in sections.items():
        lines += ["", heading, *content] if content else []
    return "\n".join(lines)
