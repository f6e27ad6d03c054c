"""The `flexpert` command: `flexpert STAGE key=value …`. Heavy imports wait until a stage is known."""

import difflib
import importlib
import io
import os
import sys
import time
from typing import Any, TextIO

from flexpert import __version__, signals
from flexpert.config.tree import take_config_dir
from flexpert.errors import UserError
from flexpert.parallel.environment import LOCAL_RANK, adopt_slurm, is_first, num_ranks

#: Stage → (module:function that runs it on `(config, resolved_yaml)`, what it does).
STAGES = {
    "prepare": ("flexpert.data.prepare:run", "documents → token files"),
    "pretrain": ("flexpert.train.pretrain:run", "tokens → public model"),
    "expert": ("flexpert.train.expert:run", "public model + one owner's tokens → contribution"),
    "assemble": ("flexpert.assembly.stages:run_assemble", "public model + contributions → one mixture"),
    "remove": ("flexpert.assembly.stages:run_remove", "assembled model → the same without some experts"),
    "verify": (
        "flexpert.assembly.stages:run_verify",
        "a contribution, a public or an assembled model: is it what it says?",
    ),
    "tune_router": ("flexpert.train.tune_router:run", "assembled model + tokens → the same with tuned router rows"),
    "evaluate": ("flexpert.evaluation.evaluate:run", "bits per byte, answers and routing, under any choice of experts"),
    "generate": ("flexpert.evaluation.generate:run", "continue a prompt"),
    "report": ("flexpert.monitor.report:run", "a run → one self-contained page"),
    "pipeline": ("flexpert.launch.pipeline:run", "the whole graph, from text to report"),
    "status": ("flexpert.launch.status:run", "where every stage of a pipeline stands"),
    "logs": ("flexpert.launch.status:run_logs", "what a stage of a pipeline has printed"),
    "cancel": ("flexpert.launch.status:run_cancel", "end a pipeline's jobs on Slurm"),
    "sync": ("flexpert.monitor.sync:run", "tell W&B's server what a run has recorded without it"),
    "plan": ("flexpert.planning.plan:run", "model + cluster → memory, time and node-hours, and the layouts that fit"),
    "tune_kernels": ("flexpert.train.tune_kernels:run", "a model's shape + this machine's GPU → its fastest tiles"),
}

#: What is said about stages → (module:function that gets the words behind it, what it does).
COMMANDS = {
    "config": (
        "flexpert.config.origin:show",
        "config STAGE …: what it would run with, and where each value comes from",
    ),
    "completion": (
        "flexpert.config.completion:script",
        "completion bash or zsh: what the shell evaluates for its tab key",
    ),
}
#: Have Hydra run a stage once for each of several values.
MULTIRUN = ("--multirun", "-m")

#: Seconds by which a mistake, which is every process's and said by the first of a node, ends the others later: torchrun
#: ends all when one has ended.
AFTER_FIRST = 2.0

#: Stages whose output is a log, which they can do without; others print what they were asked for.
TRAINING = ("pretrain", "expert", "tune_router")

#: Stages that several processes run together, started by torchrun or srun.
PARALLEL = ("pretrain", "expert", "tune_router", "evaluate", "generate")


def usage() -> str:
    width = max(map(len, STAGES))
    lines, others = (
        [f"  {name:<{width}}  {text}" for name, (_, text) in table.items()] for table in (STAGES, COMMANDS)
    )
    return "\n".join(
        [
            f"flexpert {__version__}: experts trained apart, assembled into one model, and taken out again",
            "",
            "usage: flexpert STAGE [key=value …]      flexpert STAGE --help lists the keys",
            "",
            *lines,
            "",
            *others,
            "",
            "  --multirun, -m    run the stage once for each of key=a,b, one after the other or as jobs of Slurm's",
            "  --config-dir=DIR  your own files beside conf/: DIR/launcher/mysite.yaml is launcher=mysite",
        ]
    )


def main(argv: list[str] | None = None) -> None:
    """Run one stage.

    Exit status: 0 done; 1 a defect of ours (with traceback); 2 a mistake in the input (one line); 3 another process of
    the stage was lost (one line, from one of those that are left); 75 told to stop by a signal (one line): training and
    pipelines go on when they are started again.
    """
    arguments = sys.argv[1:] if argv is None else argv
    signals.install()
    adopt_slurm()
    try:
        arguments = take_config_dir(arguments)
        is_real = (sys.stdout, sys.stderr) == (sys.__stdout__, sys.__stderr__)  # and nothing that a test has put there
        if is_real and arguments[:1] and arguments[0] in TRAINING:
            sys.stdout, sys.stderr = lossy(sys.stdout), lossy(sys.stderr)
        if not is_first():
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (to the end; rank 0 says it all)
        if not arguments or arguments[0] in ("-h", "--help", "help"):
            print(usage(), flush=True)
        elif arguments[0] in ("-V", "--version"):
            print(__version__)
        elif arguments[0] in COMMANDS:
            function_of(COMMANDS[arguments[0]][0])(arguments[1:])
        elif arguments[0] == "complete":
            function_of("flexpert.config.completion:complete")(arguments[1:], [*STAGES, *COMMANDS])
        else:
            run_stage(arguments[0], arguments[1:])
    except UserError as error:
        if os.environ.get(LOCAL_RANK, "0") != "0":
            time.sleep(AFTER_FIRST)
        elif not error.told:
            print(f"flexpert: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(error.status)
    except BrokenPipeError:  # `flexpert … | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


class LossyFile(io.FileIO):
    """A descriptor to which what cannot be written is lost: a log on a full disk ends no training."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except BrokenPipeError:
            raise
        except OSError:
            return len(data)


def lossy(stream: TextIO) -> TextIO:
    raw = LossyFile(stream.fileno(), "w", closefd=False)
    encoding, errors, by_line = stream.encoding, stream.errors, bool(stream.line_buffering)
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, errors, line_buffering=by_line)


def function_of(place: str) -> Any:
    """The function at `module:function`, whose module is imported now."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def run_stage(stage: str, overrides: list[str]) -> None:
    if stage not in STAGES:
        meant = difflib.get_close_matches(stage, [*STAGES, *COMMANDS], 1)
        advice = f"did you mean {meant[0]}?" if meant else f"choose one of {', '.join([*STAGES, *COMMANDS])}"
        raise UserError(f"there is no stage '{stage}': {advice}")
    several = [word for word in overrides if word in MULTIRUN]
    if several and num_ranks() > 1:
        raise UserError(f"{several[0]} is for stages of one process: start it without torchrun or srun")
    if stage not in PARALLEL and num_ranks() > 1:
        raise UserError(
            f"{stage} runs in one process: start it without torchrun or srun; {', '.join(PARALLEL)} run in several"
        )
    from flexpert.config.compose import compose
    from flexpert.config.help import describe
    from flexpert.config.paths import check_paths

    if any(flag in overrides for flag in ("-h", "--help")):
        print(describe(stage, overrides))
        return
    if several:
        function_of("flexpert.launch.sweep:run")(stage, [word for word in overrides if word not in MULTIRUN])
        return
    config, resolved = compose(stage, overrides)
    check_paths(stage, config)
    for note in config.notes():
        print(f"note: {note}", flush=True)
    run = function_of(STAGES[stage][0])
    if num_ranks() == 1:
        run(config, resolved)
    else:
        from flexpert.parallel.process import among_ranks

        with among_ranks():
            run(config, resolved)
