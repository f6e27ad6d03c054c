"""`flexpert assemble` and `flexpert remove`.

Neither writes its `resolved.yaml` into the model: a model directory is passed on, and the paths and names in that file
are nobody's business there. `assembly.json` says what a model consists of.
"""

from pathlib import Path

from flexpert.assembly.add import add
from flexpert.assembly.assemble import assemble
from flexpert.assembly.remove import remove
from flexpert.checkpoint.directory import ModelDirectory
from flexpert.config.stages import AssembleConfig, RemoveConfig


def run_assemble(config: AssembleConfig, resolved: str) -> None:
    """Write the assembled model into `output_dir`."""
    output = Path(config.output_dir)
    contributions = [Path(path) for path in config.contributions]
    active, limit = config.active_experts, config.max_file_bytes
    if config.model is None:
        assert config.base is not None, "the config was checked"
        assemble(Path(config.base), contributions, output, active_experts=active, max_file_bytes=limit)
    else:
        add(
            Path(config.model),
            contributions,
            output,
            replace_known=config.replace,
            active_experts=active,
            max_file_bytes=limit,
        )
    print(summary(output))
    print(output)


def run_remove(config: RemoveConfig, resolved: str) -> None:
    """Write the smaller model into `output_dir`."""
    output = Path(config.output_dir)
    record = remove(Path(config.model), config.experts, output, record_removed=config.record_removed)
    if record.tuned:
        print(
            "note: the other experts' router rows were tuned on text of all; tune again without it for a full removal"
        )
    print(f"took out {', '.join(config.experts)}; left: {summary(output)}")
    print(output)


def summary(directory: Path) -> str:
    """An assembled model in a few words."""
    model = ModelDirectory.open(directory)
    parameters, unit = float(model.config.num_params()), ""
    for larger in ("K", "M", "B"):
        if parameters >= 1000:
            parameters, unit = parameters / 1000, larger
    count = len(model.experts)
    return (
        f"{count} expert{'s' if count > 1 else ''} ({', '.join(model.experts)}), "
        f"{parameters:.3g}{unit} parameters, {len(list(directory.iterdir()))} files"
    )
