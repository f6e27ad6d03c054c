"""The graph of a pipeline: which stages, with which overrides, after which others. `walk` brings it to completion.

A node's record (`RUN/stages/NODE.json`) says with which overrides and from which inputs its output was made, and the
SHA-256 of every file of it (of large token files, the size). A node is complete when its record agrees with all three.
An output without a record is what an interrupted run left, and is made again.

In a stage's overrides the pipeline's defaults (seed, monitor) come first, then the user's own, then what ties the
stages together: the user's win over the former, and cannot undo the latter.
"""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from flexpert.config.compose import as_typed
from flexpert.config.stages import PipelineConfig
from flexpert.errors import UserError
from flexpert.records import canonical_json, read_record, sha256_file, sha256_hex, write_record

#: Outputs that a stage writes below its `output_dir`, beside what it resumes from.
STAGE_OUTPUTS = ("model", "contribution", "evaluation.json")

#: Files of a data set that are larger are known by their size.
LARGE_BYTES = 64 << 20
#: Hashing lets other threads run, so this many files are read at a time.
HASHED_AT_A_TIME = min(8, os.cpu_count() or 1)


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
        always: is cheap and reads more than the outputs of what it needs: runs again whenever the pipeline does.
    """

    name: str
    stage: str
    overrides: tuple[str, ...]
    output: Path
    needs: tuple[str, ...] = ()
    alone: bool = False
    always: bool = False

    @property
    def directory(self) -> Path:
        """All that the stage writes: its `output_dir`."""
        return self.output.parent if self.output.name in STAGE_OUTPUTS else self.output


def quoted(path: Path | str) -> str:
    return f'"{path}"'


def monitor_defaults(config: PipelineConfig, own: list[str]) -> list[str]:
    """The pipeline's monitor settings; those of a group that the user chose for the stage itself are left alone."""
    monitor = config.monitor
    defaults = [f"monitor.group={monitor.group or config.pipeline.name}"]
    if any(override.startswith("monitor=") for override in own):
        return defaults  # Hydra sets keys after groups, whatever the order: they would undo the choice
    keys = ("log_interval", "wandb", "project", "entity", "profile_steps", "memory_snapshot")
    values = {key: getattr(monitor, key) for key in keys}
    return defaults + [
        f"monitor.{key}={as_typed(value)}" for key, value in values.items() if value not in (None, False)
    ]


def build_graph(config: PipelineConfig) -> list[Node]:
    """The nodes in an order in which each comes after what it needs."""
    run, graph = Path(config.output_dir), config.pipeline
    seed = f"seed={config.seed}"
    public_data = run / "data/public"
    nodes: list[Node] = []

    def add(
        name: str, stage: str, overrides: list[str], output: str, needs: list[str],
        alone: bool = False, always: bool = False,
    ) -> None:  # fmt: skip
        nodes.append(Node(name, stage, tuple(overrides), run / output, tuple(needs), alone, always))

    def training(own: list[str]) -> list[str]:
        return [seed, *monitor_defaults(config, own)]

    data = {"public": graph.public_data, **{name: [*graph.prepare, *own] for name, own in graph.experts.items()}}
    tokenizer = public_data / "tokenizer" if graph.base is None else Path(graph.base)
    for name, own in data.items():
        needs = [] if name == "public" or graph.base is not None else ["data/public"]
        wiring = [] if name == "public" and graph.base is None else [f"tokenizer={tokenizer}"]
        wiring.append(f"output_dir={run / 'data' / name}")
        add(f"data/{name}", "prepare", [seed, *own, *wiring], f"data/{name}", needs)
    base, base_needs = Path(graph.base or run / "public/model"), ["public"] if graph.base is None else []
    if graph.base is None:
        wiring = [f"data.dir={public_data}", f"output_dir={run / 'public'}"]
        overrides = [*training(graph.public), *graph.public, *wiring]
        add("public", "pretrain", overrides, "public/model", ["data/public"], alone=True)
    for name in graph.experts:
        own = [*graph.expert, *graph.owners.get(name, [])]
        defaults = [*training(own), f"public_data={public_data}"]
        wiring = [f"base={base}", f"data.dir={run / 'data' / name}", f"name={name}"]
        overrides = [*defaults, *own, *wiring, f"output_dir={run / 'experts' / name}"]
        needs = [*base_needs, f"data/{name}", "data/public"]
        add(f"experts/{name}", "expert", overrides, f"experts/{name}/contribution", needs)
    for name in graph.experts if graph.dense is not None else ():
        own, share, text = graph.dense or [], graph.dense_public_share, run / "data" / name
        wiring = [f"base={base}", f"output_dir={run / 'dense' / name}"]
        if share:
            wiring.append(f"data.dirs={{own:{quoted(text)},public:{quoted(public_data)}}}")
            wiring.append(f"data.weights={{own:{1 - share:g},public:{share:g}}}")
        else:
            wiring.append(f"data.dir={text}")
        needs = [*base_needs, f"data/{name}", *(["data/public"] if share else [])]
        add(f"dense/{name}", "pretrain", [*training(own), *own, *wiring], f"dense/{name}/model", needs)
    contributions = ",".join(quoted(run / "experts" / name / "contribution") for name in graph.experts)
    overrides = [*graph.assemble, f"base={base}", f"contributions=[{contributions}]", f"output_dir={run / 'assembled'}"]
    add("assembled", "assemble", overrides, "assembled", [*base_needs, *(f"experts/{name}" for name in graph.experts)])
    model, model_node = run / "assembled", "assembled"
    if graph.tune_router is not None:
        wiring = [f"model={model}", f"output_dir={run / 'tuned'}"]
        overrides = [*training(graph.tune_router), *graph.tune_router, *wiring]
        add("tuned", "tune_router", overrides, "tuned/model", ["assembled", *(f"data/{name}" for name in data)])
        model, model_node = run / "tuned/model", "tuned"
    dirs = ",".join(f"{name}:{quoted(run / 'data' / name)}" for name in data)
    overrides = [*graph.evaluate, f"model={model}", f"data.dirs={{{dirs}}}", f"baselines.public={base}"]
    if graph.dense is not None:
        dense = ",".join(f"{name}:{quoted(run / 'dense' / name / 'model')}" for name in graph.experts)
        overrides.append(f"baselines.dense={{{dense}}}")
    overrides.append(f"output_dir={run / 'evaluation'}")
    everything = [node.name for node in nodes if node.stage != "prepare"]
    add("evaluation", "evaluate", overrides, "evaluation/evaluation.json", [model_node, *everything], alone=True)
    add("report", "report", [f"run={run}"], "report.html", ["evaluation"], always=True)  # it reads pipeline.yaml too
    return nodes


class Records:
    """The records of a run's nodes."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.directory = run / "stages"

    def path(self, node: Node) -> Path:
        return self.directory / f"{node.name.replace('/', '.')}.json"

    def begun(self, node: Node) -> Path:
        """A file that says that this pipeline has started the node: what lies at its output is the pipeline's."""
        return self.path(node).with_suffix(".begun")

    def digest(self, node: Node) -> str:
        return sha256_hex(canonical_json(read_record(self.path(node), "flexpert.stage")))

    def inputs(self, node: Node, graph: dict[str, Node]) -> dict[str, str]:
        return {name: self.digest(graph[name]) for name in node.needs}

    def complete(self, nodes: list[Node]) -> set[str]:
        """Names of the nodes that are complete together with all that they need.

        Raises:
            UserError: as `is_complete`, whether what the node needs is complete or not; an output that is there was
                not made by this pipeline.
        """
        graph = {node.name: node for node in nodes}
        names: set[str] = set()
        for node in nodes:
            if node.output.exists() and not (node.always or self.path(node).exists() or self.begun(node).exists()):
                raise UserError(
                    f"{node.output} was not made by this pipeline: move it away, or choose another output_dir"
                )
            if names.issuperset(node.needs):
                if self.is_complete(node, graph):
                    names.add(node.name)
            elif self.is_recorded(node):
                self.check_overrides(node)
        return names

    def is_recorded(self, node: Node) -> bool:
        return not node.always and node.output.exists() and self.path(node).exists()

    def is_complete(self, node: Node, graph: dict[str, Node]) -> bool:
        """Whether the node's output is there, whole, and made as the graph says; what it needs must be complete.

        Raises:
            UserError: the output was made with other overrides or from other inputs, or was altered since.
        """
        if not self.is_recorded(node):
            return False
        self.check_overrides(node)
        record = read_record(self.path(node), "flexpert.stage")
        if record["inputs"] != self.inputs(node, graph):
            raise self.conflict(node, "was made from other inputs")
        if record["files"] != output_files(node):
            raise self.conflict(node, "was altered after it was made")
        return True

    def check_overrides(self, node: Node) -> None:
        record = read_record(self.path(node), "flexpert.stage")
        if (record["stage"], record["overrides"]) != (node.stage, list(node.overrides)):
            raise self.conflict(node, "was made with other overrides")

    def conflict(self, node: Node, what: str) -> UserError:
        advice = f"choose another output_dir, or delete {node.directory} to make it again"
        return UserError(f"{node.output} {what}: {advice}")

    def begin(self, node: Node) -> None:
        """Delete what an interrupted run left of a node that is about to start, its output or its record.

        What a training stage keeps beside its output, and resumes from, stays. So does the output of a node that runs
        always, which replaces it in one piece.
        """
        assert node.output.is_relative_to(self.run) and node.output != self.run, node
        self.directory.mkdir(parents=True, exist_ok=True)
        self.begun(node).touch()
        self.path(node).unlink(missing_ok=True)
        if node.always:
            return
        if node.output.is_dir() and not node.output.is_symlink():
            shutil.rmtree(node.output)
        else:
            node.output.unlink(missing_ok=True)

    def write(self, node: Node, graph: dict[str, Node]) -> None:
        recipe = {"stage": node.stage, "overrides": list(node.overrides), "inputs": self.inputs(node, graph)}
        write_record(self.path(node), "flexpert.stage", {**recipe, "files": output_files(node)})


def output_files(node: Node) -> dict[str, str]:
    """What identifies every file of a node's output, by its path below it: the SHA-256, several at a time.

    Of a data set's large files it is the size. The manifest, which is hashed, holds their hashes, and to read trillions
    of tokens would take hours, whenever the pipeline is started.
    """

    def identity(path: Path) -> str:
        size = path.stat().st_size
        is_large = node.stage == "prepare" and size > LARGE_BYTES and path.name != "manifest.json"
        return f"{size} bytes" if is_large else sha256_file(path)

    if node.output.is_file():
        return {node.output.name: identity(node.output)}
    paths = sorted(path for path in node.output.rglob("*") if path.is_file())
    with ThreadPoolExecutor(HASHED_AT_A_TIME) as pool:
        return {
            str(p.relative_to(node.output)): found for p, found in zip(paths, pool.map(identity, paths), strict=True)
        }
