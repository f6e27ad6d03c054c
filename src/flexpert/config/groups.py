"""The schema of `conf/`: one dataclass per Hydra group and per stage.

The classes are plain dataclasses, registered as Hydra structured configs, so an unknown key or a wrong type fails when
the config is composed. `flexpert.config.compose` turns a command line into one of the stage classes, locks it
(assignment raises from then on) and calls every `check`. Each option's help text stands beside its default and is what
`flexpert STAGE --help` prints.
"""

import math
from dataclasses import dataclass, fields, replace

from omegaconf import MISSING

from flexpert.config.accelerators import names
from flexpert.config.options import (
    Lockable,
    check_choice,
    check_license,
    check_not_negative,
    check_positive,
    opt,
    require,
)

WANDB_MODES = ("off", "offline", "online", "auto")


@dataclass
class ComputeConfig(Lockable):
    """Keys of the group `model` that say what a run computes with. A saved model does not know them."""

    norm: str = opt(
        "torch",
        "what computes RMSNorm: torch, te (transformer-engine) or apex; the two need CUDA and parallel.tensor=1, and "
        "such a model is not compiled",
    )
    attention: str = opt("sdpa", "what computes attention: sdpa (PyTorch) or, likewise, te (transformer-engine)")

    def check(self) -> None:
        check_choice("model.norm", self.norm, names("model.norm"))
        check_choice("model.attention", self.attention, names("model.attention"))


@dataclass
class ModelConfig(ComputeConfig):
    """Group `model`: the shape of an OLMo2 model (`num_experts=0`) or a FlexOlmo mixture, and how it is computed."""

    linear: str = opt("torch", "the blocks' linear layers in pretraining: torch or te_fp8 (transformer-engine, fp8)")
    hidden_size: int = opt(MISSING, "width of the residual stream, D")
    num_layers: int = opt(MISSING, "decoder blocks, L")
    num_heads: int = opt(MISSING, "attention heads")
    num_kv_heads: int | None = opt(None, "key/value heads; null: as many as heads")
    intermediate_size: int = opt(MISSING, "FFN width, F")
    vocab_size: int | None = opt(None, "rows of the embedding; null: the tokenizer's, padded to a multiple of 128")
    max_sequence_length: int = opt(4096, "longest context, tokens")
    num_experts: int = opt(0, "experts, E; 0: a dense model")
    active_experts: int = opt(1, "experts that run for each token, k")
    router_bias: bool = opt(False, "the router has a bias, at most 0")
    rms_norm_eps: float = opt(1e-6, "epsilon of every RMSNorm")
    rope_theta: float = opt(500_000.0, "base of the rotary frequencies")
    initializer_range: float = opt(0.02, "standard deviation of the initial weights")

    def computed_as(self, run: ComputeConfig) -> "ModelConfig":
        """This shape, computed as `run` says."""
        return replace(self, **{field.name: getattr(run, field.name) for field in fields(ComputeConfig)})

    @property
    def is_accelerated(self) -> bool:
        """Whether other modules than PyTorch's and ours compute a part of it."""
        return (self.norm, self.attention, self.linear) != ("torch", "sdpa", "torch")

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def vocab(self) -> int:
        """Rows of the embedding; asserts that the tokenizer has been consulted."""
        assert self.vocab_size is not None, "vocab_size is set from the tokenizer before a model is built"
        return self.vocab_size

    def num_ffn_params(self) -> int:
        """Parameters of one expert (or of the dense FFN) over all layers."""
        return self.num_layers * 3 * self.hidden_size * self.intermediate_size

    def num_trunk_params(self) -> int:
        """Parameters of everything but FFNs and routers: what every expert shares."""
        width, kv_width = self.hidden_size, self.kv_heads * self.head_dim
        attention = 2 * width * width + 2 * width * kv_width
        norms = width + kv_width + 2 * width
        return 2 * self.vocab * width + self.num_layers * (attention + norms) + width

    def num_router_params(self) -> int:
        return self.num_layers * self.num_experts * (self.hidden_size + int(self.router_bias))

    def num_params(self) -> int:
        return self.num_trunk_params() + max(1, self.num_experts) * self.num_ffn_params() + self.num_router_params()

    def num_active_params(self) -> int:
        """Parameters that take part in one token: `active_experts` of the experts, and all of the rest."""
        active = min(self.active_experts, self.num_experts) if self.num_experts else 1
        return self.num_trunk_params() + active * self.num_ffn_params() + self.num_router_params()

    def check(self) -> None:
        super().check()
        check_choice("model.linear", self.linear, names("model.linear"))
        check_positive("model", self, "hidden_size", "num_layers", "num_heads", "num_kv_heads", "intermediate_size")
        check_positive("model", self, "vocab_size", "max_sequence_length", "active_experts")
        check_positive("model", self, "rms_norm_eps", "rope_theta", "initializer_range")
        require(
            self.hidden_size % self.num_heads == 0,
            f"model.hidden_size={self.hidden_size} does not divide by model.num_heads={self.num_heads}",
        )
        require(
            self.head_dim % 2 == 0,
            f"model.hidden_size / model.num_heads = {self.head_dim} must be even for rotary embeddings",
        )
        require(
            self.num_heads % self.kv_heads == 0,
            f"model.num_heads={self.num_heads} does not divide by model.num_kv_heads={self.kv_heads}",
        )
        require(self.num_experts >= 0, f"model.num_experts={self.num_experts} must be 0 (dense) or more")
        if self.num_experts:
            require(
                self.active_experts <= self.num_experts,
                f"model.active_experts={self.active_experts} is more than model.num_experts={self.num_experts}",
            )


@dataclass
class OptimConfig(Lockable):
    """Group `optim`: AdamW and its schedule. A learning rate is per step, tokens do not scale it."""

    adam: str = opt("torch", "what computes AdamW: torch or, on CUDA, te (transformer-engine) or apex (one process)")
    lr: float = opt(9e-4, "peak learning rate")
    router_lr: float | None = opt(None, "peak learning rate of router rows and biases; null: optim.lr")
    betas: list[float] = opt([0.9, 0.95], "AdamW's decay rates")
    eps: float = opt(1e-8, "AdamW's epsilon")
    weight_decay: float = opt(0.1, "decoupled weight decay; never on embeddings")
    grad_clip: float | None = opt(1.0, "largest global gradient norm; null: no clipping")
    schedule: str = opt("cosine", "cosine, linear or constant, after the warm-up")
    warmup_steps: int = opt(2000, "steps of linear warm-up from 0")
    final_lr_ratio: float = opt(0.1, "learning rate at the horizon, as a share of the peak")
    horizon_steps: int | None = opt(
        None, "step at which the schedule ends, which may lie beyond the run's end; null: the run's last step"
    )

    def check(self) -> None:
        check_choice("optim.adam", self.adam, names("optim.adam"))
        check_choice("optim.schedule", self.schedule, ("cosine", "linear", "constant"))
        check_positive("optim", self, "lr", "router_lr", "eps", "grad_clip", "horizon_steps")
        check_not_negative("optim", self, "weight_decay", "warmup_steps", "final_lr_ratio")
        require(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            f"optim.betas={self.betas} must be two numbers in [0, 1)",
        )


@dataclass
class ParallelConfig(Lockable):
    """Group `parallel`: how one stage uses the machine, or many processes that torchrun or srun started."""

    threads: int | None = opt(None, "CPU threads of a process; null: PyTorch's choice")
    tensor: int = opt(1, "processes that share attention heads, FFN width and vocabulary on the same sequences")
    sequence: bool = opt(False, "in training with tensor > 1: these share the positions of the residual stream, too")
    expert: int = opt(1, "processes that share the experts; an expert job's share both experts' FFN width")
    expert_tensor: int | None = opt(None, "processes that share each expert's FFN width; null: as tensor")
    data: int = opt(-1, "processes, or tensor groups, with other sequences, which share optimiser state; -1: the rest")
    replicas: int = opt(1, "in training: copies of the sharded state (hybrid sharding), as one on each node")
    timeout: float = opt(600.0, "seconds to wait for the other processes: to meet them, and in each collective")

    def check(self) -> None:
        check_positive("parallel", self, "threads", "tensor", "expert", "expert_tensor", "replicas", "timeout")
        require(self.data == -1 or self.data > 0, f"parallel.data={self.data} must be positive, or -1 for the rest")


@dataclass
class MonitorConfig(Lockable):
    """Group `monitor`: what is told while a stage runs. `metrics.jsonl` is written whatever is set here."""

    log_interval: int = opt(10, "steps between two lines of progress")
    wandb: str = opt(
        "auto", "off, offline, online, or auto: online with WANDB_API_KEY, offline without, off uninstalled"
    )
    project: str = opt("flexpert", "W&B project")
    entity: str | None = opt(None, "W&B entity (team or user)")
    group: str | None = opt(None, "W&B group; a pipeline sets its own name")
    profile_steps: list[int] | None = opt(
        None, "[FIRST,LAST]: trace these steps with PyTorch's profiler into output_dir/profile; null: none"
    )
    memory_snapshot: bool = opt(
        False,
        "write the history of CUDA memory up to the end of profile_steps, or else of the third step, or up to a "
        "failure, to output_dir/profile",
    )

    def check(self) -> None:
        check_positive("monitor", self, "log_interval")
        check_choice("monitor.wandb", self.wandb, WANDB_MODES)
        steps = self.profile_steps
        require(
            steps is None or (len(steps) == 2 and 1 <= steps[0] <= steps[1]),
            f"monitor.profile_steps={steps} must be [FIRST,LAST], the first step and the last; steps count from 1",
        )


@dataclass
class TrainDataConfig(Lockable):
    """Group `data` of training: one data set, or a mixture of several."""

    dir: str = opt("", "data set written by `flexpert prepare`; give this or data.dirs", path="data")
    dirs: dict[str, str] = opt(
        {},
        "data sets to mix: {web:DIR,code:DIR}; the valid split and the router's start are the first one's",
        path="data",
    )
    weights: dict[str, float] = opt({}, "share of each of data.dirs in the sequences: {web:3,code:1}; any scale")
    max_epochs: dict[str, float] = opt({}, "times that each of data.dirs may be read at most: {code:2}; otherwise 4")
    intra_document_attention: bool = opt(False, "no token attends to another document in its window")

    def __post_init__(self) -> None:
        if self.dirs and not self.dir:
            self.dir = next(iter(self.dirs.values()))  # it stands for all where one data set is looked at

    def check(self) -> None:
        require(self.dir != "", "training needs data.dir=DIR or data.dirs={NAME:DIR,…}")
        first = next(iter(self.dirs.values()), self.dir)
        require(self.dir == first, "give either data.dir=DIR or data.dirs={NAME:DIR,…}, not both")
        for key, values in (("weights", self.weights), ("max_epochs", self.max_epochs)):
            for name, value in values.items():
                require(name in self.dirs, f"data.{key}.{name} is of none of data.dirs={[*self.dirs]}")
                require(0 < value < math.inf, f"data.{key}.{name}={value} must be positive")
        missing = [f"data.weights.{name}=…" for name in self.dirs if name not in self.weights]
        require(not missing, f"data.dirs needs {', '.join(missing)}: the share of each data set")


@dataclass
class TrainConfig(Lockable):
    """What every training stage shares. A step is one optimiser update over `batch_tokens` tokens."""

    steps: int | None = opt(None, "optimiser steps; give exactly one of this and train.tokens")
    tokens: int | None = opt(
        None, "training tokens, rounded up to whole steps; give exactly one of this and train.steps"
    )
    batch_tokens: int = opt(4_194_304, "tokens in one optimiser step")
    sequence_length: int = opt(4096, "tokens in one sequence")
    microbatch_sequences: int = opt(
        1, "sequences in one forward pass, at most; a step accumulates over its microbatches"
    )
    z_loss: float = opt(1e-5, "weight of the squared log-normaliser of the output distribution")
    router_z_loss: float = opt(
        1e-3, "weight of the squared log-normaliser of each router's centred logits, summed over layers"
    )
    loss_chunk_tokens: int = opt(1024, "tokens whose logits are held at one time")
    evaluation_interval: int | None = opt(None, "steps between two evaluations on the valid split; null: none")
    evaluation_sequences: int = opt(64, "sequences of one such evaluation")
    spike_threshold: float | None = opt(
        10.0,
        "a step is skipped where its loss or gradient norm is so many robust standard deviations above those of the "
        "steps before; null: only where it is not finite",
    )
    max_skipped: int = opt(20, "skipped steps in a row after which the run stops, with a checkpoint")
    step_timeout: float | None = opt(
        None,
        "seconds that a step may take, with compiling, evaluation and saving; a process that takes longer prints where "
        "each of its threads is and ends; null: no limit",
    )
    device: str = opt("auto", "cpu, cuda, or auto: cuda where there is one")
    compile: str = opt(
        "auto",
        "true, false, or auto: compile the model where the run is long enough to earn back half a minute (above 1e14 "
        "operations on a CPU, 1e17 on a GPU) and there is a C++ compiler, for a GPU Triton",
    )

    recompute: str = opt(
        "none",
        "what the backward pass computes again, to hold less: none; selective: all but products, attention and "
        "collectives; full: all of a block but its input",
    )

    def check(self) -> None:
        check_choice("train.recompute", self.recompute, ("none", "selective", "full"))
        check_choice("train.compile", self.compile, ("auto", "true", "false"))
        check_positive("train", self, "steps", "tokens", "batch_tokens", "sequence_length", "microbatch_sequences")
        check_positive("train", self, "loss_chunk_tokens", "evaluation_interval", "evaluation_sequences")
        check_positive("train", self, "spike_threshold", "max_skipped", "step_timeout")
        check_not_negative("train", self, "z_loss", "router_z_loss")
        require((self.steps is None) != (self.tokens is None), "give exactly one of train.steps and train.tokens")
        require(
            self.batch_tokens % self.sequence_length == 0,
            f"train.batch_tokens={self.batch_tokens} does not divide by train.sequence_length={self.sequence_length}",
        )
        require(
            self.batch_sequences % self.microbatch_sequences == 0,
            f"the {self.batch_sequences} sequences of a step (train.batch_tokens / train.sequence_length) do not "
            f"divide by train.microbatch_sequences={self.microbatch_sequences}",
        )

    @property
    def batch_sequences(self) -> int:
        return self.batch_tokens // self.sequence_length

    @property
    def num_steps(self) -> int:
        if self.steps is not None:
            return self.steps
        assert self.tokens is not None
        return -(-self.tokens // self.batch_tokens)


@dataclass
class CheckpointConfig(Lockable):
    interval: int | None = opt(500, "steps between two training checkpoints; null: none")
    keep: int = opt(2, "newest checkpoints that are kept; where the disk is too full for the next one, fewer")
    keep_every: int | None = opt(None, "also keep the checkpoints of steps that divide by this; null: none")
    timeout: float = opt(3600.0, "seconds that a process waits for the others to write their part of one")

    def check(self) -> None:
        check_positive("checkpoint", self, "interval", "keep", "keep_every", "timeout")


@dataclass
class RouterConfig(Lockable):
    """How an expert's router row starts. Rows are stored relative to the public row, which is 0."""

    init: str = opt("mean", "mean, unit_mean, discriminant or random")
    embedding: str = opt(
        "stream",
        "stream: the public model's own at every layer; a sentence-transformers directory; or a .npy vector",
        path="file",
    )
    public_embedding: str | None = opt(
        None, "the public documents' .npy vector, where router.embedding is one", path="file"
    )
    projection: str = opt(
        "none",
        "how vectors get the model's width; none: they have it or are refused; random: by a Gaussian random "
        "projection, the same for every owner",
    )
    documents: int = opt(1000, "documents that the statistics are taken from, own and public each")
    bias: bool = opt(False, "train a bias, at most 0; the assembled model then needs Flexpert to load it")
    calibration_steps: int = opt(
        0, "steps after training in which row and bias alone are fitted, on own text mixed with public text"
    )
    calibration_public_share: float = opt(0.25, "share of public sequences in those steps")
    calibration_lr: float = opt(2e-2, "peak learning rate of those steps; falls linearly to 0")

    def check(self) -> None:
        check_choice("router.init", self.init, ("mean", "unit_mean", "discriminant", "random"))
        check_positive("router", self, "documents", "calibration_lr")
        share = self.calibration_public_share
        require(0 < share < 1, f"router.calibration_public_share={share} must lie between 0 and 1")
        require(self.calibration_steps >= 0, f"router.calibration_steps={self.calibration_steps} must not be negative")
        check_choice("router.projection", self.projection, ("none", "random"))
        if self.init == "discriminant":
            require(self.embedding == "stream", "router.init=discriminant needs router.embedding=stream")
        if self.source == "file":
            require(self.public_embedding is not None, "router.embedding=FILE.npy needs router.public_embedding")
        require(
            self.projection == "none" or self.source in ("file", "sentence-transformers"),
            f"router.projection={self.projection} goes with vectors from elsewhere: router.embedding=DIR or FILE.npy",
        )

    @property
    def source(self) -> str | None:
        """The kind of embedding that the start is computed from, without its path; None: it is random."""
        if self.init == "random":
            return None
        if self.embedding == "stream":
            return "stream"
        return "file" if self.embedding.endswith(".npy") else "sentence-transformers"

    @property
    def needs_public_text(self) -> bool:
        return self.source in ("stream", "sentence-transformers")


@dataclass
class PrepareDataConfig(Lockable):
    """Group `data` of `prepare`: where documents come from."""

    documents: str | None = opt(
        None,
        "glob of .jsonl, .jsonl.gz, .jsonl.zst, .parquet or text files, each of which is one document; or demo:NAME",
        path="file",
    )
    text_field: str = opt("text", "field of a JSON line or parquet row that holds the text")
    prompt_field: str | None = opt(
        None, "field with what comes before the text as context only: it is put before it, and carries no loss"
    )
    on_bad_document: str = opt(
        "fail", "what a line or row without text does: fail, or skip: it is left out and counted"
    )
    deduplicate: bool = opt(
        False,
        "keep the first of equal texts, with shard= of those in the same shard; a 16-byte hash of each text is held, "
        "100 bytes of memory a document",
    )
    exclude: list[str] = opt([], "data sets whose held-out documents are kept out of the train split", path="data")
    tokens: str | None = opt(
        None,
        "instead of data.documents, existing token files, used where they are: glob of raw .npy or Megatron files",
        path="file",
    )
    valid_tokens: str | None = opt(None, "the held-out ones of such files; null: all are for training", path="file")
    token_dtype: str | None = opt(None, "type of the ids in raw files without a header: uint16, uint32, int32 or int64")
    license: str | None = opt(None, "licence of the text, as an SPDX expression; kept in the manifest")
    answer_marker: str | None = opt(None, "text before the final answer of a document; evaluation scores what follows")

    def check(self) -> None:
        check_license("data.license", self.license)
        check_choice("data.on_bad_document", self.on_bad_document, ("fail", "skip"))
        if self.token_dtype is not None:
            check_choice("data.token_dtype", self.token_dtype, ("uint16", "uint32", "int32", "int64"))
        for key in ("valid_tokens", "token_dtype"):
            require(getattr(self, key) is None or self.tokens is not None, f"data.{key} goes with data.tokens=GLOB")
        if self.tokens is not None:
            for key in ("prompt_field", "deduplicate", "exclude"):
                value = getattr(self, key)
                require(not value, f"data.{key}={value} needs text: it does not go with data.tokens")


@dataclass
class PrepareParallelConfig(Lockable):
    num_workers: int | None = opt(
        None, "processes that tokenise; null: a process per core that may be used; 0 or 1: none beside this one"
    )

    def check(self) -> None:
        check_not_negative("parallel", self, "num_workers")


@dataclass
class TrainTokenizerConfig(Lockable):
    vocab_size: int | None = opt(
        None, "train a byte-level BPE of this size on the documents; give exactly one of this and tokenizer"
    )

    def check(self) -> None:
        require(
            self.vocab_size is None or self.vocab_size >= 300,
            f"train_tokenizer.vocab_size={self.vocab_size} is too small: a byte-level BPE has 256 bytes to start with",
        )


@dataclass
class EvaluateDataConfig(Lockable):
    dirs: dict[str, str] = opt(MISSING, "data sets to evaluate on: {news:DIR,math:DIR}", path="data")
    split: str = opt("valid", "valid or train")
    max_documents: int | None = opt(None, "documents of each data set; null: all of the split")

    def check(self) -> None:
        check_choice("data.split", self.split, ("valid", "train"))
        require(len(self.dirs) > 0, "data.dirs={NAME:DIR,…} names no data set")
        check_positive("data", self, "max_documents")


@dataclass
class BaselinesConfig(Lockable):
    """What an assembled model is compared with: the owners' dense fine-tunes, alone and combined."""

    public: str | None = opt(None, "the public model", path="model")
    dense: dict[str, str] = opt({}, "dense fine-tunes of the public model by domain: {news:DIR,…}", path="model")
    soup: bool = opt(True, "average of the public model's and all dense fine-tunes' weights")
    btm: bool = opt(True, "Branch-Train-Merge: ensemble weighted by each model's likelihood of the text so far")
    btm_temperature: float = opt(1.0, "temperature of those weights, in nats of evidence")

    def check(self) -> None:
        check_positive("baselines", self, "btm_temperature")
