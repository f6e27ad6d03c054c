"""`flexpert pipeline`: run the graph, check its gates."""

import sys
from pathlib import Path

from flexpert.config.groups import EXPERT_ID
from flexpert.config.stages import PipelineConfig
from flexpert.errors import UserError
from flexpert.evaluation.gates import check_gates
from flexpert.launch.graph import build_graph
from flexpert.launch.local import LocalLauncher, StageFailed
from flexpert.records import read_record


def run(config: PipelineConfig, resolved: str) -> None:
    """Bring the run directory to completion, and exit with status 1 when a gate does not hold.

    Raises:
        UserError: no experts, an id that is none, or a directory that holds another pipeline's outputs.
    """
    if not config.pipeline.experts:
        raise UserError("pipeline.experts names no expert")
    for name in config.pipeline.experts:
        if EXPERT_ID.fullmatch(name) is None or name == "public":
            raise UserError(f"pipeline.experts.{name}: an id is a-z, then a-z, 0-9 and '-', and not 'public'")
    if '"' in config.output_dir:
        raise UserError(
            f"output_dir={config.output_dir} holds a double quote, which the stages' overrides cannot carry"
        )
    run_directory = Path(config.output_dir)
    run_directory.mkdir(parents=True, exist_ok=True)
    (run_directory / "pipeline.yaml").write_text(resolved, encoding="utf-8")
    print(f"pipeline {config.pipeline.name} in {run_directory}", flush=True)
    try:
        LocalLauncher(config.launcher, run_directory).run(build_graph(config))
    except StageFailed as error:
        print(f"flexpert: {error}", file=sys.stderr)
        sys.exit(2 if error.status == 2 else 1)
    evaluation = read_record(run_directory / "evaluation/evaluation.json", "flexpert.evaluation")
    gates = check_gates(evaluation, config.pipeline.gates)
    for gate in gates:
        mark = "holds" if gate.holds else "DOES NOT HOLD"
        print(f"  {gate.claim}: {gate.value:.3f} ({gate.where}), threshold {gate.threshold:g}: {mark}")
    print(run_directory / "report.html")
    if not all(gate.holds for gate in gates):
        sys.exit(1)
