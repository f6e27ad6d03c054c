"""`flexpert evaluate`: one model, under any choice of experts, beside what owners could do without it."""

import gc
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from flexpert.assembly.record import select_experts
from flexpert.baselines.btm import btm_nll
from flexpert.baselines.soup import check_shapes, soup
from flexpert.checkpoint.digest import tokenizer_digest
from flexpert.checkpoint.directory import ModelDirectory
from flexpert.checkpoint.huggingface import experts_of, load_model
from flexpert.config.stages import EvaluateConfig
from flexpert.data.hashes import overlap_notes
from flexpert.data.tokenizer import load_tokenizer
from flexpert.errors import UserError
from flexpert.evaluation.documents import EvaluationSet, load_set
from flexpert.evaluation.score import Scores, bits_per_byte, score, summary
from flexpert.evaluation.table import print_bits
from flexpert.model.moe import set_backend
from flexpert.model.transformer import Transformer, build_on_meta
from flexpert.parallel.apply import check_for_inference, put_for_inference, ranks_for_inference
from flexpert.parallel.process import on_first
from flexpert.parallel.ranks import Ranks
from flexpert.records import write_record
from flexpert.stage import claim_directory, set_up_process

MODEL = "model"


@dataclass
class Evaluation:
    """Collects results: method → data set → summary."""

    config: EvaluateConfig
    sets: list[EvaluationSet]
    device: torch.device
    ranks: Ranks
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, method: str, model: Transformer, experts: list[str]) -> list[Scores]:
        print(f"evaluate {self.config.output_dir}  scoring {method}", flush=True)
        length = min(self.config.sequence_length or model.config.max_sequence_length, model.config.max_sequence_length)
        scores = [score(model, data, length, self.config.batch_sequences, self.ranks) for data in self.sets]
        self.methods[method] = {
            "active_experts": model.config.active_experts if model.config.num_experts else None,
            "experts": experts,
            "domains": {data.name: summary(s, data, experts) for data, s in zip(self.sets, scores, strict=True)},
        }
        return scores

    def add_flex(self, method: str, exclude: list[str], active: int | None) -> list[Scores]:
        model = self.load(Path(self.config.model), exclude=exclude, active_experts=active)
        return self.add(method, model, experts_of(ModelDirectory.open(Path(self.config.model)), exclude))

    def load(self, path: Path, **options: Any) -> Transformer:
        """As `load_model` with these options, for the processes that there are."""
        gc.collect()  # what `fully_shard` has put on the model before is a cycle

        def give_memory(model: Transformer) -> None:
            put_for_inference(model, self.ranks, self.device)
            set_backend(model, self.config.moe_backend, self.device)

        return load_model(path, **{"dtype": None, **options}, device=self.device, give_memory=give_memory)[0]


def run(config: EvaluateConfig, resolved: str) -> None:
    """Write `output_dir/evaluation.json` and print its table.

    Raises:
        UserError: a data set, the model, a baseline or `output_dir` cannot be used as the config says; nothing has
            been scored or written then.
    """
    config = without_missing(config)
    output, main = Path(config.output_dir), ModelDirectory.open(Path(config.model))
    device = set_up_process(config.device, config.parallel)
    ranks = ranks_for_inference(config.parallel, device, main.config)
    sets = [
        load_set(name, Path(path), config.data.split, config.data.max_documents)
        for name, path in config.data.dirs.items()
    ]
    for note in overlap_notes({name: Path(path) for name, path in config.data.dirs.items()}, config.data.split):
        print(f"note: {note}", flush=True)
    check_data(main, sets)
    check_vocabulary("model", main, sets)
    check_experts(config, main)
    check_baselines(config, sets)
    left = len(select_experts(main.experts, config.exclude)) if main.experts else 0
    for experts in (left, left - 1) if config.leave_one_out and left > 1 else (left,):
        check_for_inference(replace(main.config, num_experts=experts, active_experts=1), ranks)
    set_backend(build_on_meta(main.config), config.moe_backend, device)
    on_first(lambda: claim_directory(output, resolved, "auto"))
    evaluation = Evaluation(config, sets, device, ranks)
    evaluation.add_flex(MODEL, config.exclude, config.active_experts)
    if config.leave_one_out:
        leave_one_out(evaluation)
    for active in config.sweep_active_experts:
        evaluation.add_flex(f"active {active}", config.exclude, active)
    add_baselines(evaluation)
    domains = {data.name: {"documents": len(data.documents), "bytes": data.num_bytes} for data in sets}
    content = {"exclude": config.exclude, "domains": domains, "methods": evaluation.methods}
    on_first(lambda: write_record(output / "evaluation.json", "flexpert.evaluation", content))
    print_bits(content)
    print(output / "evaluation.json")


def without_missing(config: EvaluateConfig) -> EvaluateConfig:
    """The config without the optional directories that are not there."""

    def there(directories: dict[str, str]) -> dict[str, str]:
        return {n: path for n, path in directories.items() if path not in config.optional or os.path.lexists(path)}

    baselines = replace(config.baselines, dense=there(config.baselines.dense))
    return replace(config, data=replace(config.data, dirs=there(config.data.dirs)), baselines=baselines)


def check_data(model: ModelDirectory, sets: list[EvaluationSet]) -> None:
    """Raises `UserError` where a data set holds tokens of another tokenizer than the model's."""
    identity = tokenizer_digest(model.path), load_tokenizer(model.path).eos_id
    for data in sets:
        if (data.manifest.tokenizer_digest, data.manifest.eos_id) != identity:
            raise UserError(
                f"data.dirs.{data.name}={data.manifest.directory} was tokenised with another tokenizer than "
                f"{model.path} has: prepare it again with tokenizer={model.path}"
            )


def check_vocabulary(key: str, model: ModelDirectory, sets: list[EvaluationSet]) -> None:
    """Raises `UserError` where a data set can hold token ids that the model under this key has no embedding for."""
    for data in sets:
        if data.manifest.vocab_size > model.config.vocab:
            raise UserError(
                f"data.dirs.{data.name}={data.manifest.directory} has a vocabulary of {data.manifest.vocab_size}, but "
                f"{key}={model.path} embeds {model.config.vocab} tokens: its tokenizer is not the one it was trained "
                "with"
            )


def check_experts(config: EvaluateConfig, model: ModelDirectory) -> None:
    """Raises `UserError` where the config excludes or activates experts that the model does not have."""
    counts = [("sweep_active_experts", number) for number in config.sweep_active_experts]
    if config.active_experts is not None:
        counts.insert(0, ("active_experts", config.active_experts))
    if not model.experts:
        for key in ("exclude", "active_experts", "sweep_active_experts"):
            if getattr(config, key):
                raise UserError(f"{key}={getattr(config, key)}: {model.path} is a dense model, it has no experts")
        return
    left = len(select_experts(model.experts, config.exclude))
    for key, number in counts:
        if number > left:
            raise UserError(f"{key}: {number} is more than the {left} experts of {model.path} that are left")


def check_baselines(config: EvaluateConfig, sets: list[EvaluationSet]) -> None:
    """Raises `UserError` where a baseline is not a dense model with the model's tokenizer, or cannot be averaged."""
    paths = {f"baselines.dense.{name}": path for name, path in config.baselines.dense.items()}
    if config.baselines.public is not None:
        paths = {"baselines.public": config.baselines.public, **paths}
    models = {key: ModelDirectory.open(Path(path)) for key, path in paths.items()}
    digest = tokenizer_digest(Path(config.model))
    for key, model in models.items():
        if model.experts:
            raise UserError(f"{key}={model.path} is a mixture of experts; give a dense model")
        if tokenizer_digest(model.path) != digest:
            raise UserError(
                f"{key}={model.path} has another tokenizer than model={config.model}; give a model with the same one"
            )
        check_vocabulary(key, model, sets)
    if config.baselines.dense and config.baselines.soup:
        check_shapes(list(models.values()))


def leave_one_out(evaluation: Evaluation) -> None:
    """Take out each owner's expert in turn, with as many active experts as the evaluated model has, or all left."""
    config, whole = evaluation.config, evaluation.methods[MODEL]
    left = len(whole["experts"]) - 1
    for expert in whole["experts"]:
        if expert != "public" and left > 0:
            active = min(whole["active_experts"], left)
            evaluation.add_flex(f"without {expert}", [*config.exclude, expert], active)


def add_baselines(evaluation: Evaluation) -> None:
    """The public model, the dense fine-tunes, their soup and their ensemble, where the config names them."""
    config = evaluation.config.baselines
    members = {"public": config.public, **{f"dense {name}": path for name, path in config.dense.items()}}
    paths = {name: Path(path) for name, path in members.items() if path is not None}
    scores = {name: evaluation.add(name, evaluation.load(path), []) for name, path in paths.items()}
    if config.dense and config.soup:
        evaluation.add("soup", soup(list(paths.values()), evaluation.load, evaluation.device), [])
    if config.dense and config.btm:
        domains = {}
        for index, data in enumerate(evaluation.sets):
            ensemble = btm_nll([parts[index].nll for parts in scores.values()], config.btm_temperature)
            domains[data.name] = {"bits_per_byte": bits_per_byte(ensemble, data)}
        evaluation.methods["btm"] = {"active_experts": None, "experts": [], "domains": domains}
