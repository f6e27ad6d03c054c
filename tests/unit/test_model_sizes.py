"""Parameters of the models that `conf/model` describes: published, counted by the config, and built."""

import dataclasses
from typing import Any

import pytest
from omegaconf import OmegaConf

from flexpert.config.groups import ModelConfig
from flexpert.config.tree import conf_directory
from flexpert.model.transformer import build_on_meta


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
    """FlexOlmo's sizes, in billions."""
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
