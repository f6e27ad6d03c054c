"""Add experts to an assembled model, or put new ones in the place of old ones.

The result is what `assemble` would have written from the public model and all the contributions, byte for byte, and
needs neither the public model nor the contributions that are in already.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from flexpert.assembly.assemble import check_active, check_together
from flexpert.assembly.record import AssemblyRecord, read_assembly
from flexpert.assembly.remove import write_changed, write_rows
from flexpert.checkpoint.directory import ModelDirectory
from flexpert.checkpoint.layout import model_class
from flexpert.config.stages import MAX_FILE_BYTES
from flexpert.contribution.record import PUBLIC_ID
from flexpert.contribution.verify import OpenContribution, check_against_base, open_contribution
from flexpert.errors import UserError

#: An expert of the new model: its index in the old one, or a contribution.
Expert = int | OpenContribution


def add(
    model: Path,
    contributions: Sequence[Path],
    output: Path,
    *,
    replace_known: bool = False,
    active_experts: int | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> AssemblyRecord:
    """Write an assembled model with further experts, behind those that it has.

    Args:
        model: directory that `assemble` or `remove` wrote.
        contributions: directories, trained against the public model that `model` was assembled from.
        output: must not exist yet.
        replace_known: a contribution with the id of an expert of the model takes that expert's place.
        active_experts: k; None: all where the model uses all, otherwise the model's.
        max_file_bytes: as `assemble`'s, for the new experts; what is copied keeps its split into files.

    Returns:
        The content of the new `assembly.json`.

    Raises:
        UserError: as `assemble`; an expert is in the model already; or the model's router was tuned. Nothing is then
            left under `output`.
    """
    with ExitStack() as opened:
        record, directory = read_assembly(model), ModelDirectory.open(model)
        if record.tuned:
            raise UserError(
                f"the router rows of {model} were tuned together, so a row that was trained alone does not go with "
                "them; add to the model as it was before tune_router, and tune that again"
            )
        new = [opened.enter_context(open_contribution(path)) for path in contributions]
        for expert in new:
            check_against_base(expert.record, directory, record.base_digest)
        check_together(new)
        experts = _place(model, record, new, replace_known)
        biased = _check_bias(model, record, experts)
        k, before = directory.config.active_experts, len(record.experts)
        unless_given = len(experts) if k == before else k
        active = check_active(unless_given if active_experts is None else active_experts, len(experts))
        return write_changed(
            model,
            output,
            replace(record, active_experts=active, biased=biased),
            experts,
            {**directory.raw, "num_experts": len(experts), "num_experts_per_tok": active, **model_class(biased)},
            lambda folder: write_rows(model, folder, record, experts, biased),
            max_file_bytes=max_file_bytes,
        )


def _place(model: Path, record: AssemblyRecord, new: list[OpenContribution], replace_known: bool) -> list[Expert]:
    """The experts of the new model, in order."""
    ids = [expert.id for expert in record.experts]
    experts: list[Expert] = list(range(len(ids)))
    for expert in new:
        name, directory = expert.record.identity.id, expert.record.directory
        if name not in ids:
            experts.append(expert)
        elif replace_known:
            experts[ids.index(name)] = expert
        else:
            raise UserError(
                f"{model} has an expert {name!r} already; give replace=true to put {directory} in its place"
            )
    return experts


def _check_bias(model: Path, record: AssemblyRecord, experts: list[Expert]) -> bool:
    """Whether the new router has a bias. The public expert goes with both: its bias is 0."""
    kept = [expert for expert in experts if isinstance(expert, int) and record.experts[expert].id != PUBLIC_ID]
    new = [expert.record for expert in experts if not isinstance(expert, int)]
    for contribution in new:
        if kept and contribution.has_bias != record.biased:
            raise UserError(
                f"{model} and {contribution.directory} differ in router.bias; train all experts with it or none"
            )
    return any(contribution.has_bias for contribution in new) or (bool(kept) and record.biased)
