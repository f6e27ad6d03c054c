"""`flexpert pipeline`: run the graph, check its gates."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from flexpert.config.compose import compose
from flexpert.config.options import EXPERT_ID
from flexpert.config.stages import EvaluateConfig, PipelineConfig
from flexpert.errors import UserError
from flexpert.evaluation.gates import GATES, check_gates
from flexpert.evaluation.table import print_bits
from flexpert.launch.graph import Node, Records, build_graph
from flexpert.launch.local import LocalLauncher
from flexpert.launch.walk import StageFailed, Walk
from flexpert.lock import exclusive
from flexpert.records import read_record, write_atomic


def run(config: PipelineConfig, resolved: str) -> None:
    """Bring the run directory to completion, and exit with status 1 when a gate does not hold.

    Raises:
        UserError: a mistake in the graph or its gates, a directory that cannot be written, is in use, or holds another
            pipeline's outputs or somebody's own files: all before anything is written or started.
    """
    check_names(config)
    nodes = build_graph(config)
    configs = compose_all(nodes)
    check_evaluable(config.pipeline.gates, configs["evaluation"])
    run_directory = Path(config.output_dir)
    records = Records(run_directory)
    with claim(run_directory, resolved, nodes, records) as complete:
        print(f"pipeline {config.pipeline.name} in {run_directory}", flush=True)
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
    if not all(gate.holds for gate in gates):
        sys.exit(1)


def check_names(config: PipelineConfig) -> None:
    if not config.pipeline.experts:
        raise UserError("pipeline.experts names no expert")
    for name in config.pipeline.owners:
        if name not in config.pipeline.experts:
            raise UserError(f"pipeline.owners.{name} is not one of {', '.join(config.pipeline.experts)}")
    for name in config.pipeline.experts:
        if EXPERT_ID.fullmatch(name) is None or name == "public":
            raise UserError(f"pipeline.experts.{name}: an id is a-z, then a-z, 0-9 and '-', and not 'public'")
    if '"' in config.output_dir:
        raise UserError(
            f"output_dir={config.output_dir} holds a double quote, which the stages' overrides cannot carry"
        )


def compose_all(nodes: list[Node]) -> dict[str, object]:
    """The config of every node, as its stage will see it.

    Raises:
        UserError: overrides that the stage would refuse; the message names the node.
    """
    configs = {}
    for node in nodes:
        try:
            configs[node.name] = compose(node.stage, list(node.overrides))[0]
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
def claim(run: Path, resolved: str, nodes: list[Node], records: Records) -> Iterator[set[str]]:
    """Hold `run` as this pipeline's directory, with `pipeline.yaml` in it, unless it holds something else.

    An output without a record is deleted later on as the leftover of an interrupted run, so in a directory that has
    never been a pipeline's there must be none.

    Yields: names of the nodes that are complete.
    """
    with ExitStack() as stack:
        try:
            if not (run / "pipeline.yaml").exists():
                for node in nodes:
                    if node.output.exists():
                        raise UserError(f"{node.output} exists already and is no pipeline's: choose another output_dir")
            run.mkdir(parents=True, exist_ok=True)
            stack.enter_context(exclusive(run))
            complete = records.complete(nodes)
            for directory in (records.directory, run / "logs"):
                directory.mkdir(exist_ok=True)
            write_atomic(run / "pipeline.yaml", resolved)
        except OSError as error:
            raise UserError(f"output_dir={run} cannot be used: {error.strerror} ({error.filename})") from None
        yield complete
