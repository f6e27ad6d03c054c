"""The graph of a pipeline: which stages, with which overrides, after which others. `walk` brings it to completion.

A node's record (`RUN/stages/NODE.json`) says with which overrides and from which inputs its output was made, and the
SHA-256 of every file of it (of large token files, the size). A node is complete when its record agrees with all three.
An output without a record is what an interrupted run left, and is made again.

In a stage's overrides the pipeline's defaults (seed, monitor) come first, then the user's own, then what ties the
stages together: the user's win over the former, and cannot undo the latter.
"""

import json
import os
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from flexpert.config.compose import as_typed
from flexpert.config.stages import PipelineConfig
from flexpert.errors import UserError
from flexpert.records import (
    canonical_json,
    read_json,
    read_record,
    sha256_file,
    sha256_hex,
    write_atomic,
    write_record,
)

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
        wants: names of nodes that are waited for; those that fail are done without.
        alone: gets the whole machine; the others share it.
        always: is cheap and reads more than the outputs of what it needs: runs again whenever the pipeline does.
        processes: that run the stage together; None: nothing is said.
    """

    name: str
    stage: str
    overrides: tuple[str, ...]
    output: Path
    needs: tuple[str, ...] = ()
    wants: tuple[str, ...] = ()
    alone: bool = False
    always: bool = False
    processes: int | None = None

    @property
    def directory(self) -> Path:
        """All that the stage writes: its `output_dir`."""
        return self.output.parent if self.output.name in STAGE_OUTPUTS else self.output


@dataclass(frozen=True)
class Made:
    """A directory, and the nodes that it is ready after; none: it was there before the pipeline."""

    path: Path
    nodes: tuple[str, ...] = ()


def quoted(path: Path | str) -> str:
    return f'"{path}"'


def mapping(made: dict[str, Made]) -> str:
    return f"{{{','.join(f'{name}:{quoted(part.path)}' for name, part in made.items())}}}"


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


def read_pipeline(run: Path) -> PipelineConfig:
    """The config of the pipeline in a run directory.

    Raises:
        UserError: it is none, or another version's.
    """
    path = run / "pipeline.yaml"
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(PipelineConfig), OmegaConf.load(path)))
    except FileNotFoundError:
        raise UserError(f"{run} is no run of a pipeline: give the output_dir of a `flexpert pipeline`") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (OmegaConfBaseException, YAMLError) as error:
        line = str(error).splitlines()[0]
        raise UserError(f"{path} is not a pipeline of this version of Flexpert: {line}") from None
    assert isinstance(config, PipelineConfig)
    return config


def build_graph(config: PipelineConfig) -> list[Node]:
    """The nodes in an order in which each comes after what it needs."""
    return Builder(config).build()


class Builder:
    """Attributes:
    data: data sets by name.
    contributions, dense: likewise, by expert id.
    nodes: so far.
    """

    def __init__(self, config: PipelineConfig) -> None:
        self.config, self.graph, self.run = config, config.pipeline, Path(config.output_dir)
        self.nodes: list[Node] = []
        self.data: dict[str, Made] = {name: Made(Path(path)) for name, path in self.graph.prepared.items()}
        self.contributions: dict[str, Made] = {}
        self.dense: dict[str, Made] = {}

    def build(self) -> list[Node]:
        self.add_data()
        self.add_base()
        for name in self.graph.experts:
            self.add_expert(name)
        for name, path in self.graph.contributions.items():
            self.add_sent_contribution(name, Path(path))
        for name in self.graph.experts if self.graph.dense is not None else ():
            self.add_dense(name, self.graph.dense or [])
        self.add_model()
        self.add_evaluation()
        return self.nodes

    def add(
        self, name: str, stage: str, overrides: list[str], output: str, needs: Iterable[str] = (),
        wants: Iterable[str] = (), alone: bool = False, always: bool = False,
    ) -> Made:  # fmt: skip
        processes = self.graph.processes.get(name, self.graph.processes.get(stage))
        ordered, wanted = tuple(dict.fromkeys(needs)), tuple(dict.fromkeys(wants))
        path = self.run / output
        node = Node(name, stage, tuple(overrides), path, ordered, wanted, alone, always, processes)
        self.nodes.append(node)
        return Made(path, (name,))

    def training(self, own: list[str]) -> list[str]:
        return [f"seed={self.config.seed}", *monitor_defaults(self.config, own)]

    def add_data(self) -> None:
        graph, has_base = self.graph, self.graph.base is not None
        sets = {name: [*graph.prepare, *own] for name, own in graph.experts.items()}
        if graph.public_data or not has_base:
            sets = {"public": graph.public_data, **sets}
        tokenizer = Path(graph.base) if graph.base is not None else self.run / "data/public/tokenizer"
        for name, own in sets.items():
            if name in self.data:
                continue
            needs = [] if name == "public" or has_base else ["data/public"]
            wiring = [] if name == "public" and not has_base else [f"tokenizer={tokenizer}"]
            wiring.append(f"output_dir={self.run / 'data' / name}")
            overrides = [f"seed={self.config.seed}", *own, *wiring]
            self.data[name] = self.add_data_set(name, overrides, needs)

    def add_data_set(self, name: str, overrides: list[str], needs: list[str]) -> Made:
        """One `prepare`, or one for each shard and one that merges them."""
        number, path = self.graph.prepare_shards.get(name, 1), f"data/{name}"
        if number == 1:
            return self.add(path, "prepare", overrides, path, needs)
        shards = [
            self.add(
                f"{path}/{part}-of-{number}", "prepare", [*overrides, f"shard={part}/{number}"],
                f"{path}/shards/{part}-of-{number}", needs,
            )
            for part in range(number)
        ]  # fmt: skip
        merge = ["merge=true", f"output_dir={self.run / path}"]
        # The shards are nodes' outputs of their own; what the merge adds is told by its manifest.
        needs = [name for shard in shards for name in shard.nodes]
        return Made(self.run / path, self.add(path, "prepare", merge, f"{path}/manifest.json", needs).nodes)

    def add_base(self) -> None:
        graph = self.graph
        if graph.base is None:
            text = self.data["public"]
            wiring = [f"data.dir={text.path}", f"output_dir={self.run / 'public'}"]
            overrides = [*self.training(graph.public), *graph.public, *wiring]
            self.base = self.add("public", "pretrain", overrides, "public/model", text.nodes, alone=True)
            return
        self.base = Made(Path(graph.base))
        if digest := graph.digests.get("base"):
            wiring = [f"model={graph.base}", f"digest={digest}", f"output={self.run / 'verified/base.json'}"]
            self.base = Made(Path(graph.base), self.add("verified/base", "verify", wiring, "verified/base.json").nodes)

    def add_expert(self, name: str) -> None:
        graph, text, public = self.graph, self.data[name], self.data.get("public")
        own = [*graph.expert, *graph.owners.get(name, [])]
        defaults = [*self.training(own), *([f"public_data={public.path}"] if public else [])]
        wiring = [f"base={self.base.path}", f"data.dir={text.path}", f"name={name}"]
        overrides = [*defaults, *own, *wiring, f"output_dir={self.run / 'experts' / name}"]
        needs = [*self.base.nodes, *text.nodes, *(public.nodes if public else ())]
        place = f"experts/{name}"
        self.contributions[name] = self.add(place, "expert", overrides, f"{place}/contribution", needs)

    def add_sent_contribution(self, name: str, path: Path) -> None:
        digest = self.graph.digests.get(name)
        wiring = [f"contribution={path}", f"base={self.base.path}", *([f"digest={digest}"] if digest else [])]
        place = f"verified/{name}.json"
        overrides = [*wiring, f"output={self.run / place}"]
        verified = self.add(f"verified/{name}", "verify", overrides, place, self.base.nodes)
        self.contributions[name] = Made(path, verified.nodes)

    def add_dense(self, name: str, own: list[str]) -> None:
        share, text = self.graph.dense_public_share, self.data[name]
        wiring = [f"base={self.base.path}", f"output_dir={self.run / 'dense' / name}"]
        needs = [*self.base.nodes, *text.nodes]
        if share:
            public = self.data["public"]
            wiring.append(f"data.dirs={{own:{quoted(text.path)},public:{quoted(public.path)}}}")
            wiring.append(f"data.weights={{own:{1 - share:g},public:{share:g}}}")
            needs += public.nodes
        else:
            wiring.append(f"data.dir={text.path}")
        overrides = [*self.training(own), *own, *wiring]
        self.dense[name] = self.add(f"dense/{name}", "pretrain", overrides, f"dense/{name}/model", needs)

    def parts(self, *groups: dict[str, Made]) -> tuple[list[str], list[str], list[str]]:
        """Of what is made for several owners: nodes that are needed, those that are wanted, and an override that says
        which directories may be missing.
        """
        required, experts = self.graph.required, self.graph.experts
        needs: list[str] = []
        wants: list[str] = []
        paths: list[str] = []
        for name, made in (item for group in groups for item in group.items()):
            if required is None or name in required or name not in experts:  # what was sent is needed
                needs += made.nodes
            else:
                wants += made.nodes
                paths.append(quoted(made.path))
        return needs, wants, [f"optional=[{','.join(paths)}]"] if paths else []

    def add_model(self) -> None:
        graph = self.graph
        needs, wants, optional = self.parts(self.contributions)
        contributions = ",".join(quoted(part.path) for part in self.contributions.values())
        wiring = [f"base={self.base.path}", f"contributions=[{contributions}]", *optional]
        overrides = [*graph.assemble, *wiring, f"output_dir={self.run / 'assembled'}"]
        self.model = self.add("assembled", "assemble", overrides, "assembled", [*self.base.nodes, *needs], wants)
        if graph.tune_router is not None:
            wiring = [f"model={self.model.path}", f"output_dir={self.run / 'tuned'}"]
            overrides = [*self.training(graph.tune_router), *graph.tune_router, *wiring]
            needs = [*self.model.nodes, *(name for made in self.data.values() for name in made.nodes)]
            self.model = self.add("tuned", "tune_router", overrides, "tuned/model", needs)

    def add_evaluation(self) -> None:
        graph = self.graph
        needs, wants, optional = self.parts(self.data, self.dense)
        wiring = [f"model={self.model.path}", f"data.dirs={mapping(self.data)}", f"baselines.public={self.base.path}"]
        if self.dense:
            wiring.append(f"baselines.dense={mapping(self.dense)}")
        overrides = [*graph.evaluate, *wiring, *optional, f"output_dir={self.run / 'evaluation'}"]
        output = "evaluation/evaluation.json"
        self.add("evaluation", "evaluate", overrides, output, [*self.model.nodes, *needs], wants, alone=True)
        # It reads pipeline.yaml and the records of training, too.
        self.add("report", "report", [f"run={self.run}"], "report.html", ["evaluation"], always=True)


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

    def ended_path(self, name: str) -> Path:
        """How the node's last start ended, where it has ended."""
        return self.directory / f"{name.replace('/', '.')}.ended"

    def ended(self, name: str, job: str | None = None) -> int | None:
        """Exit status of the node's last start, by the given job of Slurm's; None: it has not ended."""
        if not self.ended_path(name).exists():
            return None
        content = read_record(self.ended_path(name), "flexpert.end")
        return int(content["status"]) if content["job"] == job else None

    def end(self, node: Node, status: int, job: str | None = None) -> None:
        """Record how a start has ended and, where it ended well, what was made."""
        if status == 0:
            self.write(node)
        write_record(self.ended_path(node.name), "flexpert.end", {"job": job, "status": status})

    def digest(self, node: Node) -> str:
        """Of what was made and from what; not of when."""
        record = read_record(self.path(node), "flexpert.stage")
        return sha256_hex(canonical_json({key: value for key, value in record.items() if key != "stats"}))

    def inputs(self, node: Node, graph: dict[str, Node]) -> dict[str, str]:
        """Digests of the records of what a node needs, and of what it wants and there is."""
        wanted = [name for name in node.wants if self.is_recorded(graph[name])]
        return {name: self.digest(graph[name]) for name in (*node.needs, *wanted)}

    def complete(self, nodes: list[Node]) -> set[str]:
        """Names of the nodes that are complete together with all that they need and want.

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
            if names.issuperset((*node.needs, *node.wants)):
                if self.is_complete(node, graph):
                    names.add(node.name)
            elif self.is_recorded(node):
                self.check_overrides(node)
        return names

    def is_stale(self, node: Node, graph: dict[str, Node]) -> bool:
        """Whether the node was made without something that it wants and there is by now."""
        if not (node.wants and self.is_recorded(node)):
            return False
        made_from = read_record(self.path(node), "flexpert.stage")["inputs"]
        return any(self.is_recorded(graph[name]) and name not in made_from for name in node.wants)

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
        if self.is_stale(node, graph):
            return False
        record = read_record(self.path(node), "flexpert.stage")
        if record["inputs"] != self.inputs(node, graph):
            raise self.conflict(node, "was made from other inputs")
        # As with make, who alters a file changes its time; a flipped bit is for `verify` to find.
        if record["stats"] != stats(node) and record["files"] != output_files(node):
            raise self.conflict(node, "was altered after it was made")
        return True

    def check_overrides(self, node: Node) -> None:
        record = read_record(self.path(node), "flexpert.stage")
        if (record["stage"], record["overrides"]) != (node.stage, list(node.overrides)):
            raise self.conflict(node, "was made with other overrides")

    def conflict(self, node: Node, what: str) -> UserError:
        advice = f"choose another output_dir, or delete {node.directory} to make it again"
        return UserError(f"{node.output} {what}: {advice}")

    def begin(self, node: Node, graph: dict[str, Node]) -> None:
        """Delete what an interrupted run left of a node that is about to start, its output or its record.

        What a training stage keeps beside its output, and resumes from, stays. So does the output of a node that runs
        always, which replaces it in one piece. Where the node was made without something that has come since, all that
        was made from it goes, too.
        """
        assert node.output.is_relative_to(self.run) and node.output != self.run, node
        if self.is_stale(node, graph):
            for other in followers(node, graph):
                self.begin(other, graph)
                if other.directory != other.output:
                    shutil.rmtree(other.directory, ignore_errors=True)
        self.directory.mkdir(parents=True, exist_ok=True)
        made_from = self.inputs(node, graph) if all(self.is_recorded(graph[need]) for need in node.needs) else {}
        write_atomic(self.begun(node), json.dumps(made_from))
        self.ended_path(node.name).unlink(missing_ok=True)
        self.path(node).unlink(missing_ok=True)
        if node.always:
            return
        if node.output.is_dir() and not node.output.is_symlink():
            shutil.rmtree(node.output)
        else:
            node.output.unlink(missing_ok=True)

    def write(self, node: Node) -> None:
        """Record a node that is complete, with what there was of its inputs when it began."""
        recipe = {"stage": node.stage, "overrides": list(node.overrides), "inputs": read_json(self.begun(node))}
        write_record(self.path(node), "flexpert.stage", {**recipe, "files": output_files(node), "stats": stats(node)})


def lost(graph: dict[str, Node], failed: set[str]) -> set[str]:
    """What has failed, and what cannot be made without it."""
    names = set(failed)
    for node in graph.values():  # in order
        if names.intersection(node.needs):
            names.add(node.name)
    return names


def followers(node: Node, graph: dict[str, Node]) -> list[Node]:
    """What is made from a node, directly or not; the last first."""
    found = {node.name}
    for other in graph.values():  # in order
        if found.intersection((*other.needs, *other.wants)):
            found.add(other.name)
    return [other for other in reversed(graph.values()) if other.name in found and other is not node]


def stats(node: Node) -> dict[str, list[int]]:
    """Size, and time of the last change in ns, of every file of a node's output, by its path below it."""
    paths = [node.output] if node.output.is_file() else [path for path in node.output.rglob("*") if path.is_file()]
    found = {str(path.relative_to(node.output)): path.stat() for path in sorted(paths)}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in found.items()}


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
