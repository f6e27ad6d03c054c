"""`flexpert assemble`, `flexpert remove` and `flexpert verify`.

None writes its `resolved.yaml` into the model: a model directory is passed on, and the paths and names in that file
are nobody's business there. `assembly.json` says what a model consists of.
"""

from pathlib import Path

from flexpert.assembly.add import add
from flexpert.assembly.assemble import assemble
from flexpert.assembly.record import RECORD_NAME
from flexpert.assembly.remove import remove
from flexpert.assembly.verify import verify_model
from flexpert.checkpoint.digest import base_digest
from flexpert.checkpoint.directory import ModelDirectory
from flexpert.config.stages import AssembleConfig, RemoveConfig, VerifyConfig
from flexpert.contribution.verify import check_against_base, verify
from flexpert.errors import UserError


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


def run_verify(config: VerifyConfig, resolved: str) -> None:
    """Print what a contribution or a model is and what was checked; writes nothing.

    Raises:
        UserError: it is not what its record says, or was trained on another base.
    """
    if config.model is not None:
        lines = verified_model(Path(config.model))
    else:
        assert config.contribution is not None, "the config was checked"
        lines = verified_contribution(Path(config.contribution), Path(config.base) if config.base else None)
    print("\n".join([*lines, "  hashes find damage and mix-ups; whose work it is, they do not prove"]))


def verified_contribution(directory: Path, base: Path | None) -> list[str]:
    public = ModelDirectory.open(base) if base is not None else None
    if public is not None and public.experts:
        raise UserError(f"base={base} is a mixture; give the public model that the expert was trained on")
    contribution = verify(directory)
    if public is not None:
        check_against_base(contribution, public, base_digest(public.path))
    identity, num_files = contribution.identity, len(contribution.files)
    return [
        f"{directory} is the contribution {identity.id} ({identity.title}; {identity.license or 'no licence stated'})",
        f"  digest {contribution.digest}",
        f"  of the base {contribution.base_digest}",
        f"  checked: SHA-256 of {num_files} file{'s' if num_files > 1 else ''} and {len(contribution.tensors)} tensors,"
        f" {sum(file.bytes for file in contribution.files):,} bytes; every number is finite",
        f"  checked: {base} is that base" if base is not None else "  not checked: its base (give base=DIR)",
    ]


def verified_model(directory: Path) -> list[str]:
    record = verify_model(directory)
    active = ModelDirectory.open(directory).config.active_experts
    notes = []
    if active != record.active_experts:
        notes = [f"  note: config.json has {active} experts active for a token, {RECORD_NAME} {record.active_experts}"]
    listed = {file.name for file in record.files}
    others = sorted(path.name for path in directory.iterdir() if path.name not in listed)
    return [
        f"{directory} is {summary(directory)}",
        f"  of the base {record.base_digest}{'; its router rows were tuned' if record.tuned else ''}",
        *(f"  {expert.id}: {expert.contribution or 'the public expert'}" for expert in record.experts),
        f"  checked: SHA-256 of {len(listed)} files, {sum(file.bytes for file in record.files):,} bytes;"
        " config.json calls for these tensors, experts and this architecture, and the index lists them",
        *notes,
        f"  without a hash: {', '.join(others)}",
    ]


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
