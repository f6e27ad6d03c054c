"""The schema of each stage's config: what `conf/STAGE.yaml` may hold."""

import re
from dataclasses import dataclass

from omegaconf import MISSING

from flexpert.config.accelerators import check_chosen
from flexpert.config.groups import (
    WANDB_MODES,
    BaselinesConfig,
    CheckpointConfig,
    ComputeConfig,
    EvaluateDataConfig,
    ModelConfig,
    MonitorConfig,
    OptimConfig,
    ParallelConfig,
    PrepareDataConfig,
    PrepareParallelConfig,
    RouterConfig,
    TrainConfig,
    TrainDataConfig,
    TrainTokenizerConfig,
)
from flexpert.config.launcher import (
    CancelConfig,
    LauncherConfig,
    LogsConfig,
    PipelineGraphConfig,
    StatusConfig,
    SyncConfig,
)
from flexpert.config.options import (
    EXPERT_ID,
    Lockable,
    check_choice,
    check_license,
    check_not_negative,
    check_positive,
    check_seed,
    opt,
    require,
)

#: Weights in one file of a model, bytes, as in the models on the Hugging Face Hub.
MAX_FILE_BYTES = 5 << 30
#: Of `flexpert_kernels.moe_ffn`.
MOE_BACKENDS = ("auto", "reference", "dense", "loop", "grouped_mm", "triton")
MOE_BACKEND = f"what computes experts where not all are active: {', '.join(MOE_BACKENDS)}"


@dataclass
class TrainingStage(Lockable):
    """Keys that every training stage has."""

    data: TrainDataConfig = opt(TrainDataConfig, "")
    train: TrainConfig = opt(TrainConfig, "")
    optim: OptimConfig = opt(OptimConfig, "")
    checkpoint: CheckpointConfig = opt(CheckpointConfig, "")
    parallel: ParallelConfig = opt(ParallelConfig, "")
    monitor: MonitorConfig = opt(MonitorConfig, "")
    resume: str = opt("auto", "auto: from the newest checkpoint in output_dir; never: refuse a used output_dir")
    seed: int = opt(0, "the only source of randomness: weights and the order of the data")
    output_dir: str = opt(MISSING, "where the stage writes", path="output")

    def check(self) -> None:
        check_choice("resume", self.resume, ("auto", "never"))
        check_seed(self.seed)
        check_chosen(self)

    def notes(self) -> list[str]:
        warmup, steps = self.optim.warmup_steps, self.train.num_steps
        if warmup < steps:
            return []
        return [
            f"optim.warmup_steps={warmup} is not shorter than the run's {steps} steps: the learning rate still rises "
            "when the run ends"
        ]


@dataclass
class PretrainConfig(TrainingStage):
    """`flexpert pretrain`: a dense public model, from nothing or from an existing one."""

    model: ModelConfig = opt(ModelConfig, "")
    base: str | None = opt(None, "start from this Olmo2ForCausalLM directory; its shape replaces model's", path="model")

    def check(self) -> None:
        super().check()
        require(
            self.model.num_experts == 0,
            "pretrain trains the dense public model: set model.num_experts=0 (experts come from `flexpert expert`)",
        )


@dataclass
class ExpertConfig(TrainingStage):
    """`flexpert expert`: one owner's expert, trained beside the frozen public model."""

    model: ComputeConfig = opt(ComputeConfig, "")
    base: str = opt(MISSING, "the public model, an Olmo2ForCausalLM directory", path="model")
    local_copy: str | None = opt(
        None,
        "a directory on a disk of the node, such as /tmp: its first process copies the base's weights there, and all "
        "processes of the node read that; the copy stays for the next start; null: all read base",
        path="file",
    )
    name: str = opt(MISSING, "the expert's id: a-z, then a-z, 0-9 and -")
    title: str | None = opt(None, "display name; null: the id")
    license: str | None = opt(
        None, "licence of the contribution, as an SPDX expression; LicenseRef-NAME: terms of your own"
    )
    public_data: str | None = opt(
        None,
        "public data set: for the router's start (needed unless router.init=random), public_share and "
        "router.calibration_steps",
        path="data",
    )
    public_share: float = opt(
        0.0,
        "share of public sequences in training: they teach the row what is not its owner's, the FFN not to harm it",
    )
    router: RouterConfig = opt(RouterConfig, "")

    def notes(self) -> list[str]:
        if self.public_share or self.router.calibration_steps:
            return super().notes()
        return [
            *super().notes(),
            "public_share=0 and router.calibration_steps=0, as in the paper: without public text an expert tends to "
            "claim others' text, too; conf/pipeline/demo.yaml has settings that mend it",
        ]

    def check(self) -> None:
        super().check()
        require(0 <= self.public_share < 1, f"public_share={self.public_share} must be in [0, 1)")
        uses = {
            f"router.init={self.router.init}": self.router.needs_public_text,
            f"public_share={self.public_share}": self.public_share > 0,
            "router.calibration_steps": self.router.calibration_steps > 0,
        }
        for use in (use for use, needed in uses.items() if needed):
            require(self.public_data is not None, f"{use} needs public_data=DIR, prepared public text")
        require(
            EXPERT_ID.fullmatch(self.name) is not None and self.name != "public",
            f"name={self.name} is not an expert id: a-z, then a-z, 0-9 and '-', at most 64; 'public' is taken "
            "(title= is the display name)",
        )
        check_license("license", self.license)


@dataclass
class TuneRouterConfig(TrainingStage):
    """`flexpert tune_router`: train the router rows of an assembled model, and nothing else."""

    model: str = opt(MISSING, "assembled model directory", path="model")
    active_experts: int | None = opt(None, "experts that run for each token; null: what the model says")
    moe_backend: str = opt("auto", MOE_BACKEND)

    def check(self) -> None:
        super().check()
        check_positive("", self, "active_experts")
        check_choice("moe_backend", self.moe_backend, MOE_BACKENDS)


@dataclass
class PrepareConfig(Lockable):
    """`flexpert prepare`: documents to token files that Megatron reads."""

    data: PrepareDataConfig = opt(PrepareDataConfig, "")
    tokenizer: str | None = opt(
        None,
        "directory with tokenizer.json (a model's, or a data set's `tokenizer`); give exactly one of this and "
        "train_tokenizer.vocab_size",
        path="tokenizer",
    )
    train_tokenizer: TrainTokenizerConfig = opt(TrainTokenizerConfig, "")
    valid_fraction: float = opt(0.01, "share of the documents held out, chosen by a hash of the text")
    valid_documents: int | None = opt(
        None, "at most this many held-out documents are kept (of each shard); the others are dropped"
    )
    shard: str | None = opt(None, "i/n: only the i-th (from 0) of n parts of the files; each part may run elsewhere")
    merge: bool = opt(False, "make one data set of the shards in output_dir, where they are; needs no other key")
    parallel: PrepareParallelConfig = opt(PrepareParallelConfig, "")
    seed: int = opt(0, "seed of demo:NAME")
    output_dir: str = opt(MISSING, "where the stage writes", path="output")

    @property
    def part(self) -> tuple[int, int]:
        """(i, n) of `shard`; (0, 1) without."""
        part, _, num_parts = (self.shard or "0/1").partition("/")
        return int(part), int(num_parts)

    def check(self) -> None:
        check_seed(self.seed)
        check_not_negative("", self, "valid_documents")
        require(0 <= self.valid_fraction < 1, f"valid_fraction={self.valid_fraction} must be in [0, 1)")
        if self.shard is not None:
            matched = re.fullmatch(r"\d+/\d+", self.shard) is not None
            require(matched and self.part[0] < self.part[1], f"shard={self.shard} must be i/n with 0 ≤ i < n")
        if self.merge:
            require(self.shard is None, "merge=true is of all shards: leave out shard")
            return
        has_documents, has_tokens = self.data.documents is not None, self.data.tokens is not None
        require(has_documents != has_tokens, "prepare needs data.documents=… or data.tokens=…, one of them")
        require(
            (self.tokenizer is None) != (self.train_tokenizer.vocab_size is None),
            "give either tokenizer=DIR or train_tokenizer.vocab_size=N",
        )
        if self.shard is not None:
            require(has_documents, "shard deals out data.documents: leave it out with data.tokens")
        if self.shard is not None or has_tokens:
            require(self.tokenizer is not None, "shards and token files need tokenizer=DIR: a tokenizer that is there")


@dataclass
class AssembleConfig(Lockable):
    """`flexpert assemble`: public model and contributions to one mixture, with no training."""

    base: str | None = opt(
        None,
        "the public model that every contribution was trained against; give exactly one of this and model",
        path="model",
    )
    model: str | None = opt(None, "an assembled model, to which the contributions are added", path="model")
    contributions: list[str] = opt(
        MISSING, "contribution directories; their order is the experts' order", path="contribution"
    )
    optional: list[str] = opt(
        [], "those of contributions that are left out, with a note, where they are missing", path="file"
    )
    replace: bool = opt(False, "with model: a contribution takes the place of the expert that has its id")
    active_experts: int | None = opt(
        None, "experts that run for each token; null: all, or as many as model's where it does not use all"
    )
    max_file_bytes: int = opt(
        MAX_FILE_BYTES, "weights in one file; the trunk and each expert are split where they are larger"
    )
    output_dir: str = opt(MISSING, "where the assembled model goes", path="output")

    def check(self) -> None:
        require(
            (self.base is None) != (self.model is None),
            "give either base=DIR, the public model, or model=DIR, an assembled model to add to",
        )
        require(not self.replace or self.model is not None, "replace=true needs model=DIR, whose experts are replaced")
        require(len(self.contributions) > 0, "contributions=[DIR,…] names no contribution")
        check_positive("", self, "active_experts", "max_file_bytes")


@dataclass
class RemoveConfig(Lockable):
    """`flexpert remove`: an assembled model without some experts, byte for byte as if they had never been there."""

    model: str = opt(MISSING, "assembled model directory", path="model")
    experts: list[str] = opt(MISSING, "ids of the experts to take out")
    record_removed: bool = opt(False, "keep the number (never the names) of removed experts in assembly.json")
    output_dir: str = opt(MISSING, "where the smaller model goes", path="output")

    def check(self) -> None:
        require(len(self.experts) > 0, "experts=[ID,…] names no expert")


@dataclass
class VerifyConfig(Lockable):
    """`flexpert verify`: whether a contribution or a model is, to the last byte, what its record or its maker says."""

    contribution: str | None = opt(None, "contribution directory; give one of this and model", path="contribution")
    base: str | None = opt(None, "with contribution: it must have been trained on this public model", path="model")
    model: str | None = opt(None, "model directory, public or assembled", path="model")
    digest: str | None = opt(None, "what its digest must be: sha256:…, as its maker has told it in another way")
    output: str | None = opt(None, "JSON file to write, with what was verified; null: none", path="file")

    def check(self) -> None:
        is_one = (self.contribution is None) != (self.model is None)
        require(is_one, "verify needs contribution=DIR or model=DIR, one of them")
        is_digest = self.digest is None or re.fullmatch(r"sha256:[0-9a-f]{64}", self.digest) is not None
        require(is_digest, f"digest={self.digest} is no digest: give sha256: and 64 of 0-9 and a-f, as verify prints")
        require(self.base is None or self.model is None, "base=DIR goes with contribution=DIR: leave it out with model")


@dataclass
class EvaluateConfig(Lockable):
    """`flexpert evaluate`: bits per byte, answers and routing on held-out documents, under any choice of experts."""

    model: str = opt(MISSING, "model directory, dense or assembled", path="model")
    data: EvaluateDataConfig = opt(EvaluateDataConfig, "")
    optional: list[str] = opt(
        [],
        "those directories of data.dirs and baselines.dense that are left out, with a note, where they are missing",
        path="file",
    )
    exclude: list[str] = opt([], "experts to leave out; as if removed")
    active_experts: int | None = opt(None, "experts that run for each token; null: what the model says")
    sweep_active_experts: list[int] = opt([], "also evaluate with each of these numbers of active experts")
    leave_one_out: bool = opt(False, "also evaluate without each expert in turn")
    baselines: BaselinesConfig = opt(BaselinesConfig, "")
    sequence_length: int | None = opt(None, "context window, tokens; null: the model's")
    batch_sequences: int = opt(16, "windows in one forward pass")
    moe_backend: str = opt("auto", MOE_BACKEND)
    device: str = opt("auto", "cpu, cuda, or auto: cuda where there is one")
    parallel: ParallelConfig = opt(ParallelConfig, "")
    output_dir: str = opt(MISSING, "where evaluation.json goes", path="output")

    def check(self) -> None:
        check_choice("moe_backend", self.moe_backend, MOE_BACKENDS)
        check_positive("", self, "active_experts", "sequence_length", "batch_sequences")
        require(
            all(number > 0 for number in self.sweep_active_experts),
            f"sweep_active_experts={self.sweep_active_experts} must be positive numbers",
        )


@dataclass
class GenerateConfig(Lockable):
    """`flexpert generate`: continue one prompt, or many in batches."""

    model: str = opt(MISSING, "model directory, dense or assembled", path="model")
    prompt: str = opt("-", "text to continue; -: read standard input", literal=True)
    prompt_file: str | None = opt(None, "read the prompt from this file instead", path="input")
    prompts_file: str | None = opt(
        None,
        'many prompts instead: lines {"prompt": TEXT}; prints a line {"prompt": TEXT, "text": CONTINUATION} for each',
        path="input",
    )
    batch_size: int = opt(8, "prompts of prompts_file that run at a time")
    exclude: list[str] = opt([], "experts to leave out; as if removed")
    active_experts: int | None = opt(None, "experts that run for each token; null: what the model says")
    max_new_tokens: int = opt(64, "longest continuation, tokens; ends sooner where the model's context is full")
    temperature: float = opt(0.0, "0: greedy; otherwise sample from softmax(logits / temperature)")
    top_k: int | None = opt(None, "sample from this many likeliest tokens")
    top_p: float = opt(1.0, "sample from the likeliest tokens that hold this much probability")
    seed: int = opt(0, "seed of the sampling")
    moe_backend: str = opt("auto", MOE_BACKEND)
    device: str = opt("auto", "cpu, cuda, or auto: cuda where there is one")
    parallel: ParallelConfig = opt(ParallelConfig, "")

    def check(self) -> None:
        check_positive("", self, "batch_size", "active_experts", "max_new_tokens", "top_k")
        given = [self.prompt != "-", self.prompt_file is not None, self.prompts_file is not None]
        require(sum(given) <= 1, "give one of prompt, prompt_file and prompts_file")
        check_not_negative("", self, "temperature")
        check_seed(self.seed)
        require(0 < self.top_p <= 1, f"top_p={self.top_p} must be in (0, 1]")
        check_choice("moe_backend", self.moe_backend, MOE_BACKENDS)


@dataclass
class ReportConfig(Lockable):
    """`flexpert report`: one self-contained page about a pipeline's run, or about several side by side."""

    run: str | None = opt(None, "run directory of a pipeline; give exactly one of this and runs", path="run")
    runs: list[str] = opt([], "two to eight run directories to compare; needs output", path="run")
    output: str | None = opt(None, "HTML file to write; null: report.html in the run directory", path="file")
    wandb: str | None = opt(
        None, "off, offline, online or auto: W&B is told the results of run; null: as the pipeline's monitor.wandb"
    )

    def check(self) -> None:
        require((self.run is None) != (not self.runs), "report needs run=DIR, or runs=[DIR,DIR,…] to compare several")
        if self.wandb is not None:
            check_choice("wandb", self.wandb, WANDB_MODES)
        if self.runs:
            require(1 < len(self.runs) <= 8, f"runs={self.runs} must be two to eight directories")
            require(self.output is not None, "runs=[DIR,DIR,…] needs output=FILE: no run's directory is theirs all")
            require(self.wandb is None, f"wandb={self.wandb} is for one run; give run=DIR")


@dataclass
class PipelineConfig(Lockable):
    """`flexpert pipeline`: the whole graph, from text to report; started again, it does only what is missing."""

    pipeline: PipelineGraphConfig = opt(PipelineGraphConfig, "")
    launcher: LauncherConfig = opt(LauncherConfig, "")
    monitor: MonitorConfig = opt(MonitorConfig, "")
    seed: int = opt(0, "seed of every stage")
    output_dir: str = opt("runs/${pipeline.name}", "run directory", path="output")

    def check(self) -> None:
        check_seed(self.seed)


@dataclass
class ClusterConfig(Lockable):
    """Group `cluster`: what a node is made of. Rates are those of data sheets, one way, in 10^9 bytes a second."""

    name: str = opt(MISSING, "what the tables call it")
    gpus_per_node: int = opt(8, "GPUs of a node, which the fast links join")
    memory_gib: float = opt(MISSING, "memory of a GPU, GiB")
    peak_flops: float = opt(MISSING, "peak of dense bf16 matrix products of a GPU, operations a second")
    intra_node_gbs: float = opt(MISSING, "what a GPU can send to others of its node, GB/s")
    inter_node_gbs: float = opt(MISSING, "what each GPU of a node can send to other nodes, all at once, GB/s")
    write_gbs: float = opt(MISSING, "what the file system takes from all nodes together, GB/s")

    def check(self) -> None:
        check_positive("cluster", self, "gpus_per_node", "memory_gib", "peak_flops")
        check_positive("cluster", self, "intra_node_gbs", "inter_node_gbs", "write_gbs")


@dataclass
class PlanParallelConfig(Lockable):
    """Group `parallel` of `plan`: a layout, or a part of one, in the keys of training; null: whatever is best."""

    tensor: int | None = opt(None, "only layouts with this parallel.tensor; null: any")
    sequence: bool | None = opt(
        None, "only layouts with, or without, parallel.sequence where parallel.tensor > 1; null: both"
    )
    expert: int | None = opt(None, "only layouts with this parallel.expert; null: any")
    expert_tensor: int | None = opt(None, "only layouts with this parallel.expert_tensor; null: any")

    def check(self) -> None:
        check_positive("parallel", self, "tensor", "expert", "expert_tensor")


@dataclass
class PlanConfig(Lockable):
    """`flexpert plan`: memory, time and node-hours of each stage up to a model, and the layouts that fit a cluster."""

    model: ModelConfig = opt(ModelConfig, "")
    cluster: ClusterConfig = opt(ClusterConfig, "")
    nodes: int = opt(8, "nodes that each stage gets")
    parallel: PlanParallelConfig = opt(PlanParallelConfig, "")
    stage: str = opt("all", "all, or one of pretrain, expert, tune_router")
    public_tokens: int = opt(1_050_000_000_000, "tokens of the public model, its anneal included")
    expert_tokens: int = opt(50_000_000_000, "tokens of each expert")
    router_tokens: int = opt(5_000_000_000, "tokens of the router's tuning")
    batch_tokens: int = opt(4_194_304, "tokens in one optimiser step")
    sequence_length: int = opt(4096, "tokens in one sequence")
    microbatch_sequences: int = opt(1, "sequences in one forward pass of a data rank")
    loss_chunk_tokens: int = opt(1024, "tokens whose logits are held at one time")
    recompute: str = opt("none", "train.recompute: none or full; selective needs memory and time between these")
    mfu: float = opt(
        0.4,
        "share of the peak that a GPU reaches where it waits for no other: an assumption, until a run on this kind of "
        "GPU has measured it (metrics.jsonl has a run's)",
    )
    link_share: float = opt(0.7, "share of the links' rates that collectives reach: an assumption, likewise")
    reserve_gib: float = opt(6.0, "memory of a GPU left to CUDA, NCCL and fragmentation, GiB")
    layouts: int = opt(3, "layouts that are shown for each stage, best first")

    def check(self) -> None:
        check_choice("stage", self.stage, ("all", "pretrain", "expert", "tune_router"))
        check_choice("recompute", self.recompute, ("none", "full"))
        check_positive("", self, "nodes", "public_tokens", "expert_tokens", "router_tokens", "batch_tokens", "layouts")
        check_positive("", self, "sequence_length", "microbatch_sequences", "loss_chunk_tokens")
        check_not_negative("", self, "reserve_gib")
        for key in ("mfu", "link_share"):
            require(0 < getattr(self, key) <= 1, f"{key}={getattr(self, key)} must be in (0, 1]")
        sequences = self.sequence_length * self.microbatch_sequences
        require(
            self.batch_tokens % sequences == 0,
            f"batch_tokens={self.batch_tokens} does not divide by the {sequences} tokens of a microbatch "
            "(sequence_length x microbatch_sequences)",
        )
        require(
            self.stage in ("all", "pretrain") or self.model.num_experts > 1,
            f"stage={self.stage} needs a mixture: model.num_experts={self.model.num_experts}",
        )


@dataclass
class TuneKernelsConfig(Lockable):
    """`flexpert tune_kernels`: the fastest tiles of a model's experts on this GPU, found and kept for runs to come.

    It needs a GPU of compute capability 8.0 (sm_80, such as A100) or newer. What it finds is kept in
    ~/.cache/flexpert/tiles.json ($XDG_CACHE_HOME/flexpert/tiles.json where that is set), for this kind of GPU, this
    Triton and this PyTorch.
    """

    model: str = opt(MISSING, "a named choice of conf/model, such as flex_37b, or a model directory", path="file")
    tokens: int = opt(8192, "tokens of a microbatch")
    active_experts: int | None = opt(None, "experts that run for each token; null: what the model says")
    expert: int = opt(1, "ranks that share the experts, as parallel.expert")
    expert_tensor: int = opt(1, "ranks that share each expert's FFN width, as parallel.expert_tensor")

    def check(self) -> None:
        check_positive("", self, "tokens", "active_experts", "expert", "expert_tensor")


#: Stage name → schema of its config; `conf/STAGE.yaml` holds the defaults.
STAGE_CONFIGS: dict[str, type[Lockable]] = {
    "prepare": PrepareConfig,
    "pretrain": PretrainConfig,
    "expert": ExpertConfig,
    "assemble": AssembleConfig,
    "remove": RemoveConfig,
    "verify": VerifyConfig,
    "tune_router": TuneRouterConfig,
    "evaluate": EvaluateConfig,
    "generate": GenerateConfig,
    "report": ReportConfig,
    "pipeline": PipelineConfig,
    "status": StatusConfig,
    "logs": LogsConfig,
    "cancel": CancelConfig,
    "sync": SyncConfig,
    "plan": PlanConfig,
    "tune_kernels": TuneKernelsConfig,
}
