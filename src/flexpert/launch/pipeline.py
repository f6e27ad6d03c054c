"""`flexpert pipeline`: run the graph, check its gates."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from flexpert.cli import PARALLEL, STAGES, TRAINING
from flexpert.config.compose import compose
from flexpert.config.options import EXPERT_ID
from flexpert.config.stages import EvaluateConfig, PipelineConfig
from flexpert.errors import UserError
from flexpert.evaluation.gates import GATES, check_gates
from flexpert.evaluation.table import print_bits
from flexpert.launch.graph import Node, Records, build_graph, read_pipeline
from flexpert.launch.job import AtWork, at_work, check_known, job_path
from flexpert.launch.local import LocalLauncher
from flexpert.launch.submit import Submission
from flexpert.launch.walk import StageFailed, Walk
from flexpert.lock import exclusive
from flexpert.records import read_record, write_atomic
from flexpert.stage import check_directory


def run(config: PipelineConfig, resolved: str) -> None:
    """Bring the run directory to completion, and exit with status 1 when a gate does not hold.

    On Slurm, submit what is missing and return; the results are printed when all is complete.

    Raises:
        UserError: a mistake in the graph or its gates, a directory that cannot be written, is in use, or holds another
            pipeline's outputs or somebody's own files, or has jobs at work that cannot be asked about here: all before
            anything is written or started.
    """
    check_names(config)
    nodes = build_graph(config)
    check_node_names(config, nodes)
    configs = compose_all(nodes)
    check_evaluable(config.pipeline.gates, configs["evaluation"][0])
    run_directory = Path(config.output_dir)
    records = Records(run_directory)
    with claim(run_directory, config.pipeline.name, nodes, records) as (jobs, complete):
        submission = None
        is_complete = complete.issuperset(node.name for node in nodes if not node.always)
        if config.launcher.kind == "slurm" and (jobs or config.launcher.dry_run or not is_complete):
            texts = {name: text for name, (_, text) in configs.items()}
            submission = Submission(config, run_directory, nodes, complete, texts)
        if submission is not None and not config.launcher.dry_run:
            submission.adopt(jobs)
        elif jobs:
            advice = f"`flexpert cancel run={run_directory}`"
            if config.launcher.dry_run:
                advice = "a dry run needs another output_dir"
            raise UserError(f"{run_directory}: jobs of Slurm's are at work here ({', '.join(jobs)}): {advice}")
        check_begun(nodes, complete, {name: text for name, (_, text) in configs.items()})
        # Jobs read the pipeline's config: it is not written before it is known that it fits them.
        print(f"pipeline {config.pipeline.name} in {run_directory}", flush=True)
        if submission is not None:
            submission.submit(resolved)
            return
        write_atomic(run_directory / "pipeline.yaml", resolved)
        for node in nodes:
            if node.name not in complete:  # made here, whatever became of a job that was to make it
                job_path(run_directory, node.name).unlink(missing_ok=True)
        try:
            Walk(nodes, records, LocalLauncher(config.launcher, run_directory), complete).run()
        except StageFailed as error:
            print(f"flexpert: {error}", file=sys.stderr)
            sys.exit(2 if error.status == 2 else 1)
        evaluation = read_record(run_directory / "evaluation/evaluation.json", "flexpert.evaluation")
    print_bits(evaluation)
    gates = check_gates(evaluation, config.pipeline.gates)
    for gate in gates:
        mark = "holds" if gate.holds else "DOES NOT HOLD"
        print(f"  {gate.claim}: {gate.value:.3f} ({gate.where}), threshold {gate.threshold:g}: {mark}")
    print(run_directory / "report.html")
    if config.pipeline.base is not None:
        tell_contributions(run_directory, list(config.pipeline.experts))
    if not all(gate.holds for gate in gates):
        sys.exit(1)


def check_begun(nodes: list[Node], complete: set[str], resolved: dict[str, str]) -> None:
    """Raises `UserError` where training has begun with other settings than it would go on with."""
    for node in nodes:
        if node.name in complete or node.stage not in TRAINING or not (node.directory / "resolved.yaml").exists():
            continue
        try:
            check_directory(node.directory, resolved[node.name], "auto")
        except UserError as error:
            raise UserError(f"{node.name}: {error}, or delete {node.directory} to begin it anew") from None


def tell_contributions(run: Path, experts: list[str]) -> None:
    """What owners who have made experts for somebody's public model send, and tell in another way."""
    for path in (run / "experts" / name / "contribution" for name in experts):
        if path.exists():  # one that is not required may have failed
            digest = read_record(path / "contribution.json", "flexpert.contribution")["digest"]
            print(f"send {path} and nothing else; tell its digest in another way: {digest}")


def check_names(config: PipelineConfig) -> None:
    graph = config.pipeline
    names = [*graph.experts, *graph.contributions]
    if not names:
        raise UserError("pipeline.experts names no expert, and pipeline.contributions none")
    for name in names:
        if EXPERT_ID.fullmatch(name) is None or name == "public":
            key = f"pipeline.{'experts' if name in graph.experts else 'contributions'}.{name}"
            raise UserError(f"{key}: an id is a-z, then a-z, 0-9 and '-', and not 'public'")
    sets = ["public", *graph.experts]
    known = {
        "owners": (graph.owners, list(graph.experts)),
        "required": (graph.required or [], list(graph.experts)),
        "digests": (graph.digests, ["base", *graph.contributions]),
        "prepare_shards": (graph.prepare_shards, sets),
    }
    for key, (given, allowed) in known.items():
        for name in given:
            if name not in allowed:
                choices = f"not one of {', '.join(allowed)}" if allowed else "not there: this pipeline has none"
                raise UserError(f"pipeline.{key}.{name} is {choices}")
    for name, directory in graph.prepared.items():
        check_held_out(name, Path(directory))
    for name, path in graph.contributions.items():
        if name in graph.experts:
            raise UserError(f"{name} is both in pipeline.experts and in pipeline.contributions")
        check_sent(name, Path(path), Path(config.output_dir) / f"verified/{name}.json")
    if graph.base is None and not graph.public:
        raise UserError(
            "give pipeline.base=DIR, a public model; or pipeline.public=[…], how to train one, and pipeline.public_data"
        )
    if graph.base is None and "public" in graph.prepare_shards:
        raise UserError(
            "pipeline.prepare_shards.public needs pipeline.base=DIR: shards share a tokenizer that is there"
        )
    if graph.base is None and "public" in graph.prepared:
        raise UserError("pipeline.prepared.public needs pipeline.base=DIR, whose tokenizer it was prepared with")
    if not graph.experts and not graph.prepared and not graph.public_data:
        raise UserError("there is nothing to evaluate on: give pipeline.prepared={NAME:DIR} or pipeline.public_data")
    if '"' in config.output_dir:
        raise UserError(
            f"output_dir={config.output_dir} holds a double quote, which the stages' overrides cannot carry"
        )


def check_held_out(name: str, directory: Path) -> None:
    """Raises `UserError` for a data set that nothing can be evaluated on, which would be said after all training."""
    if read_record(directory / "manifest.json", "flexpert.data")["splits"]["valid"]["documents"] == 0:
        raise UserError(
            f"pipeline.prepared.{name}={directory} holds out no document to evaluate on: prepare it with a larger "
            "valid_fraction"
        )


def check_sent(name: str, directory: Path, verified: Path) -> None:
    """Raises `UserError` where a contribution is another expert's, or not the one that this run has verified."""
    record = read_record(directory / "contribution.json", "flexpert.contribution")
    if record.get("id") != name:
        raise UserError(
            f"pipeline.contributions.{name}={directory} is the expert {record.get('id')!r}: give it under its own name"
        )
    if verified.is_file() and read_record(verified, "flexpert.verified")["digest"] != record.get("digest"):
        raise UserError(
            f"{directory} is not what this run has verified and used: choose another output_dir, or delete {verified}"
        )


def check_node_names(config: PipelineConfig, nodes: list[Node]) -> None:
    """Raises `UserError` where settings are for a stage or node that the graph does not have."""
    known = dict.fromkeys(name for node in nodes for name in (node.stage, node.name))
    graph, jobs = config.pipeline, config.launcher.jobs
    for key, settings in (
        ("pipeline.processes", graph.processes), ("pipeline.resources", graph.resources), ("launcher.jobs", jobs)
    ):  # fmt: skip
        for name in settings:
            # A site's own launcher file is for any pipeline, whatever experts it has.
            is_of_another = settings is jobs and name.partition("/")[0] in ("data", "experts", "dense", "verified")
            if name not in known and is_of_another:
                print(f"note: {key}.{name} is for no node of this pipeline", flush=True)
            elif name not in known and name not in STAGES:
                raise UserError(f"{key}.{name} is neither a stage nor a node of this pipeline: {', '.join(known)}")
    for name, number in graph.processes.items():
        stages = {node.stage for node in nodes if name in (node.stage, node.name)}
        if number > 1 and not stages <= set(PARALLEL):
            raise UserError(f"pipeline.processes.{name}={number}: {', '.join(stages)} runs in one process")


def compose_all(nodes: list[Node]) -> dict[str, tuple[object, str]]:
    """The config of every node, as its stage will see it, and as YAML.

    Raises:
        UserError: overrides that the stage would refuse; the message names the node.
    """
    configs = {}
    composed: dict[tuple[str, ...], Any] = {}
    for node in nodes:
        try:
            configs[node.name] = compose(node.stage, list(node.overrides), composed)
        except UserError as error:
            raise UserError(f"{node.name}: {error}") from None
    return configs


def check_evaluable(gates: dict[str, float], evaluate: object) -> None:
    """Raises `UserError` for gates that are unknown, or need a method that will not be evaluated."""
    assert isinstance(evaluate, EvaluateConfig)
    has_soup = bool(evaluate.baselines.dense) and evaluate.baselines.soup
    removal = (evaluate.leave_one_out, "leave_one_out=true among pipeline.evaluate")
    needs = {
        "gain_over_soup": (has_soup, "a soup: give pipeline.dense, and leave baselines.soup=true"),
        "removal_on_own": removal,
        "removal_on_others": removal,
    }
    for name in gates:
        if name not in GATES:
            raise UserError(f"pipeline.gates.{name} is not one of {', '.join(GATES)}")
        is_met, need = needs.get(name, (True, ""))
        if not is_met:
            raise UserError(f"pipeline.gates.{name} needs {need}")


@contextmanager
def claim(run: Path, name: str, nodes: list[Node], records: Records) -> Iterator[tuple[dict[str, AtWork], set[str]]]:
    """Hold `run` as the directory of the pipeline of this name, unless it holds something else.

    An output without a record is deleted later on as the leftover of an interrupted run, so in a directory that has
    never been a pipeline's there must be none.

    Yields: jobs that may still run; names of the nodes that are complete, which is looked at after that: of a job that
        ends in between, the record is there.
    """
    with ExitStack() as stack:
        try:
            if not (run / "pipeline.yaml").exists():
                for node in nodes:
                    if node.output.exists():
                        raise UserError(f"{node.output} exists already and is no pipeline's: choose another output_dir")
            elif (other := read_pipeline(run).pipeline.name) != name:
                raise UserError(f"{run} is a run of the pipeline {other}: choose another output_dir")
            run.mkdir(parents=True, exist_ok=True)
            stack.enter_context(exclusive(run))
            jobs, complete = at_work(run), records.complete(nodes)
            check_known(run, complete, records)
            for directory in (records.directory, run / "logs"):
                directory.mkdir(exist_ok=True)
            yield jobs, complete
        except BrokenPipeError:  # of what this prints, not of a file
            raise
        except OSError as error:
            where = f" ({error.filename})" if error.filename else ""
            raise UserError(f"output_dir={run} cannot be used: {error.strerror}{where}") from None
