"""The graph of a pipeline: which stages, with which overrides, after which others. Launchers only start and watch.

A node's record (`RUN/stages/NODE.json`) says with which overrides and from which inputs its output was made, and the
SHA-256 of every file of it. A node is complete when its record agrees with all three.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexpert.config.stages import PipelineConfig
from flexpert.errors import UserError
from flexpert.records import canonical_json, read_record, sha256_file, sha256_hex, write_record


@dataclass(frozen=True)
class Node:
    """One stage of a pipeline.

    Attributes:
        name: unique in the graph, such as `experts/math`.
        stage: the command.
        overrides: its arguments.
        output: file or directory whose content the nodes after it read.
        needs: names of the nodes that must be complete before.
        alone: gets the whole machine; the others share it.
    """

    name: str
    stage: str
    overrides: tuple[str, ...]
    output: Path
    needs: tuple[str, ...] = ()
    alone: bool = False


def quoted(path: Path | str) -> str:
    return f'"{path}"'


def build_graph(config: PipelineConfig) -> list[Node]:
    """The nodes in an order in which each comes after what it needs."""
    run, graph = Path(config.output_dir), config.pipeline
    seed = f"seed={config.seed}"
    monitor = [f"monitor.{key}={getattr(config.monitor, key)}" for key in ("log_interval", "wandb", "project")]
    monitor.append(f"monitor.group={config.monitor.group or graph.name}")
    if config.monitor.entity is not None:
        monitor.append(f"monitor.entity={config.monitor.entity}")
    training = [seed, *monitor]
    nodes: list[Node] = []

    def add(name: str, stage: str, overrides: list[str], output: str, needs: list[str], alone: bool = False) -> None:
        nodes.append(Node(name, stage, tuple(overrides), run / output, tuple(needs), alone))

    data = {"public": graph.public_data, **{name: [*graph.prepare, *own] for name, own in graph.experts.items()}}
    tokenizer = run / "data/public/tokenizer" if graph.base is None else Path(graph.base)
    for name, overrides in data.items():
        needs = [] if name == "public" or graph.base is not None else ["data/public"]
        own_tokenizer = [] if name == "public" and graph.base is None else [f"tokenizer={tokenizer}"]
        output = [f"output_dir={run / 'data' / name}", seed]
        add(f"data/{name}", "prepare", [*overrides, *own_tokenizer, *output], f"data/{name}", needs)
    base, base_needs = Path(graph.base or run / "public/model"), ["public"] if graph.base is None else []
    if graph.base is None:
        overrides = [f"data.dir={run / 'data/public'}", *graph.public, *training, f"output_dir={run / 'public'}"]
        add("public", "pretrain", overrides, "public/model", ["data/public"], alone=True)
    for name in graph.experts:
        overrides = [f"base={base}", f"data.dir={run / 'data' / name}", f"name={name}", *graph.expert]
        overrides += [f"router.public_data={run / 'data/public'}", *training, f"output_dir={run / 'experts' / name}"]
        needs = [*base_needs, f"data/{name}", "data/public"]
        add(f"experts/{name}", "expert", overrides, f"experts/{name}/contribution", needs)
    for name in graph.experts if graph.dense is not None else ():
        overrides = [f"base={base}", f"data.dir={run / 'data' / name}", *(graph.dense or [])]
        overrides += [*training, f"output_dir={run / 'dense' / name}"]
        add(f"dense/{name}", "pretrain", overrides, f"dense/{name}/model", [*base_needs, f"data/{name}"])
    contributions = ",".join(quoted(run / "experts" / name / "contribution") for name in graph.experts)
    overrides = [f"base={base}", f"contributions=[{contributions}]", *graph.assemble, f"output_dir={run / 'assembled'}"]
    add("assembled", "assemble", overrides, "assembled", [*base_needs, *(f"experts/{name}" for name in graph.experts)])
    model, model_node = run / "assembled", "assembled"
    if graph.tune_router is not None:
        overrides = [f"model={model}", *graph.tune_router, *training, f"output_dir={run / 'tuned'}"]
        add("tuned", "tune_router", overrides, "tuned/model", ["assembled", *(f"data/{name}" for name in data)])
        model, model_node = run / "tuned/model", "tuned"
    dirs = ",".join(f"{name}:{quoted(run / 'data' / name)}" for name in data)
    overrides = [f"model={model}", f"data.dirs={{{dirs}}}", f"baselines.public={base}", *graph.evaluate]
    if graph.dense is not None:
        dense = ",".join(f"{name}:{quoted(run / 'dense' / name / 'model')}" for name in graph.experts)
        overrides.append(f"baselines.dense={{{dense}}}")
    overrides.append(f"output_dir={run / 'evaluation'}")
    everything = [node.name for node in nodes if node.stage != "prepare"]
    add("evaluation", "evaluate", overrides, "evaluation/evaluation.json", [model_node, *everything], alone=True)
    add("report", "report", [f"run={run}"], "report.html", ["evaluation"])
    return nodes


class Records:
    """The records of a run's nodes."""

    def __init__(self, run: Path) -> None:
        self.directory = run / "stages"

    def path(self, node: Node) -> Path:
        return self.directory / f"{node.name.replace('/', '.')}.json"

    def digest(self, node: Node) -> str:
        return sha256_hex(canonical_json(read_record(self.path(node), "flexpert.stage")))

    def expected(self, node: Node, graph: dict[str, Node]) -> dict[str, Any]:
        inputs = {name: self.digest(graph[name]) for name in node.needs}
        return {"stage": node.stage, "overrides": list(node.overrides), "inputs": inputs}

    def is_complete(self, node: Node, graph: dict[str, Node]) -> bool:
        """Whether the node's output is there, whole, and made as the graph says.

        Raises:
            UserError: the output was made with other overrides or from other inputs, or was altered since.
        """
        if not node.output.exists() or not self.path(node).exists():
            return False
        record = read_record(self.path(node), "flexpert.stage")
        advice = f"choose another output_dir, or delete {node.output} and {self.path(node)} to make it again"
        for key, value in self.expected(node, graph).items():
            if record[key] != value:
                changed = "overrides" if key != "inputs" else "inputs"
                raise UserError(f"{node.output} was made with other {changed}: {advice}")
        if record["files"] != output_files(node.output):
            raise UserError(f"{node.output} was altered after it was made: {advice}")
        return True

    def write(self, node: Node, graph: dict[str, Node]) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        content = {**self.expected(node, graph), "files": output_files(node.output)}
        write_record(self.path(node), "flexpert.stage", content)


def output_files(output: Path) -> dict[str, str]:
    """SHA-256 of every file of an output, by its path below it."""
    if output.is_file():
        return {output.name: sha256_file(output)}
    paths = sorted(path for path in output.rglob("*") if path.is_file())
    return {str(path.relative_to(output)): sha256_file(path) for path in paths}
