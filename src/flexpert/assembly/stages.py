"""`flexpert assemble` and `flexpert remove`."""

from pathlib import Path

from omegaconf import OmegaConf

from flexpert.assembly.assemble import assemble
from flexpert.assembly.remove import remove
from flexpert.config.stages import AssembleConfig, RemoveConfig


def run_assemble(config: AssembleConfig, resolved: str) -> None:
    """Write the assembled model into `output_dir`."""
    output = Path(config.output_dir)
    contributions = [Path(path) for path in config.contributions]
    assemble(Path(config.base), contributions, output, active_experts=config.active_experts)
    (output / "resolved.yaml").write_text(resolved, encoding="utf-8")
    print(output)


def run_remove(config: RemoveConfig, resolved: str) -> None:
    """Write the smaller model into `output_dir`; not even its `resolved.yaml` says who was removed."""
    output = Path(config.output_dir)
    remove(Path(config.model), config.experts, output, record_removed=config.record_removed)
    kept = OmegaConf.masked_copy(OmegaConf.create(resolved), ["record_removed", "output_dir"])
    (output / "resolved.yaml").write_text(OmegaConf.to_yaml(kept), encoding="utf-8")
    print(output)
