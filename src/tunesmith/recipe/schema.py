"""The recipe: what a user writes, typed and frozen. One sentence and one unit per field.

`"auto"` stands for a value that `recipe.resolve` works out from the model, the data and the machine; the
resolved recipe has the same shape and no `"auto"` left, but for `serve.engine`, which the machine that serves
decides.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tunesmith.recipe.compat import Compat
from tunesmith.recipe.section import Auto, Section
from tunesmith.recipe.serving import Serve

Format = Literal[
    "alpaca", "sharegpt", "messages", "prompt_completion", "text", "preference", "turns", "guanaco", "moss",
]  # fmt: skip
TooLong = Literal["drop", "truncate", "error"]
Precision = Literal["fp32", "bf16", "bf16-pure", "fp16"]
Optimizer = Literal["adamw", "adamw-8bit", "adamw-offload"]
Checkpointing = Literal["none", "selective", "full"]


class Model(Section):
    """The model to start from."""

    path: str = Field(
        description="A local folder, a hub id (owner/name), a GGUF file, a run folder, or the built-in "
        "name smollm2-135m-instruct."
    )
    revision: str | None = Field(
        None, description="Branch, tag or commit of a hub id; the lock keeps the commit."
    )
    endpoint: list[str] | None = Field(
        None,
        description="Hub endpoints to try in order, such as a mirror; default: $HF_ENDPOINT, else the hub.",
    )
    offline: bool = Field(False, description="Use only what is in the cache; also on with $HF_HUB_OFFLINE=1.")
    trust_remote_code: bool = Field(
        False, description="Run Python code that comes with the model. Off by default."
    )
    chat_template: str | None = Field(
        None,
        description="A Jinja file in place of the model's own chat template, in training and serving alike.",
    )
    new_tokens: list[str] = Field(
        default_factory=list,
        description="Texts that are one token each from now on, in rows, templates and answers; their "
        "embeddings start as the mean of the others and are trained, with LoRA too.",
    )


class Source(Section):
    """One source of rows."""

    path: str = Field(
        description="A file (json, jsonl, csv, parquet, arrow), a folder of them, a folder saved by "
        "datasets, or a hub id."
    )
    format: Format | Auto = Field("auto", description="How the rows are written; auto looks at the columns.")
    columns: dict[str, str] = Field(
        default_factory=dict, description="Our name of a column: the name it has in the file."
    )
    split: str = Field("train", description="Split of a hub data set or a saved data set.")
    subset: str | None = Field(None, description="Part (configuration) of a hub data set that has several.")
    system: str | None = Field(
        None, description="A system message for this source's rows that have none, in place of data.system."
    )
    weight: float = Field(
        1.0, gt=0, description="Share of the rows used in each epoch: 0.5 takes half, 2 takes each row twice."
    )


class Data(Section):
    """The rows to learn from."""

    sources: list[Source] = Field(min_length=1, description="Where the rows come from.")
    system: str | None = Field(
        None, description="A system message for rows that have none; null leaves that to the chat template."
    )
    max_length: Annotated[int, Field(ge=8)] | Auto = Field(
        "auto",
        description="Most tokens of one row, and the size of a pack; auto: the model's limit, at most 2048.",
    )
    too_long: TooLong = Field(
        "drop", description="What happens to a row of more than max_length tokens; always counted."
    )
    duplicates: Literal["keep", "drop"] = Field(
        "keep", description="What happens to a row seen before; always counted."
    )
    packing: bool = Field(
        True, description="Lay whole rows end to end in packs of max_length tokens, each seeing only itself."
    )
    eval_fraction: float = Field(
        0.05, ge=0, lt=1, description="Share of rows held out, chosen by each row's hash. 0 holds out none."
    )
    eval_sources: list[Source] = Field(
        default_factory=list,
        description="Held-out rows from files of their own; then eval_fraction is not used.",
    )
    workers: Annotated[int, Field(ge=1)] | Auto = Field("auto", description="Processes that tokenise.")


class Method(Section):
    """What is trained."""

    type: Literal["full", "lora", "qlora", "auto"] = Field(
        "lora",
        description="full: all weights; lora: low-rank adapters; qlora: adapters over a base in 4 bits; "
        "auto: the first of them that fits the memory with a margin.",
    )
    rank: int = Field(16, ge=1, description="Rank of the adapters.")
    alpha: float | Auto = Field(
        "auto", description="Scale numerator: adapters are scaled by alpha / rank; auto: 2 x rank."
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout before the adapters.")
    targets: list[str] | Literal["all-linear"] = Field(
        "all-linear",
        description="Names of the linear layers that get an adapter; all-linear leaves out the head.",
    )
    rslora: bool = Field(False, description="Scale by alpha / sqrt(rank) instead (rank-stabilised LoRA).")
    dora: bool = Field(
        False, description="Train the weights' magnitudes beside their directions (DoRA); slower than LoRA."
    )
    lora_plus_ratio: float | None = Field(
        None, ge=1, description="Learning rate of the B matrices over that of the A matrices (LoRA+)."
    )
    modules_to_save: list[str] = Field(
        default_factory=list,
        description="Names of modules that are trained whole beside the adapters, such as embed_tokens.",
    )
    double_quant: bool = Field(True, description="qlora: quantise the quantisation constants too.")
    freeze: list[str] = Field(
        default_factory=list,
        description="full: parameters that stay as they are, by name with * for any part, such as "
        "'model.embed_tokens.*' or 'model.layers.0.*'.",
    )
    neftune_alpha: float | None = Field(
        None, gt=0, description="Strength of the noise added to embeddings in training (NEFTune); null: none."
    )


class Objective(Section):
    """What is minimised."""

    type: Literal["sft", "dpo", "orpo", "kto"] = Field(
        "sft",
        description="sft: cross-entropy of the answers; dpo, orpo, kto: preferences, from rows with a chosen "
        "and a rejected answer.",
    )
    beta: float = Field(
        0.1, gt=0, description="dpo, kto: how closely the model is held to the reference; orpo: weight of "
        "the odds ratio."
    )  # fmt: skip
    loss: Literal["sigmoid", "hinge", "ipo"] = Field("sigmoid", description="dpo: form of the loss.")
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="dpo with sigmoid: share of pairs believed to be the wrong way round."
    )
    sft_weight: float = Field(
        0.0, ge=0, description="dpo: weight of the chosen answer's mean cross-entropy added to the loss."
    )
    desirable_weight: float = Field(1.0, ge=0, description="kto: weight of the chosen answers' losses.")
    undesirable_weight: float = Field(1.0, ge=0, description="kto: weight of the rejected answers' losses.")


class Train(Section):
    """The optimisation."""

    epochs: float = Field(1.0, gt=0, description="Passes over the data; not used when max_steps is given.")
    max_steps: int | None = Field(None, ge=1, description="Optimizer steps after which training ends.")
    micro_batch_size: Annotated[int, Field(ge=1)] | Auto = Field(
        1,
        description="Packs (rows without packing) in one forward pass; auto: as many as fit and still make "
        "it faster, and a grad_accumulation that is given is the packs of a whole step, divided by them.",
    )
    grad_accumulation: int = Field(1, ge=1, description="Forward passes in one optimizer step.")
    lr: Annotated[float, Field(gt=0)] | Auto = Field(
        "auto", description="Peak learning rate; auto: 2e-4 for lora, 2e-5 for full."
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="Course of the learning rate after warm-up."
    )
    warmup_ratio: float = Field(
        0.03, ge=0, lt=1, description="Share of the optimizer steps spent in linear warm-up."
    )
    warmup_steps: int | None = Field(
        None, ge=0, description="Optimizer steps of warm-up; overrides warmup_ratio."
    )
    min_lr_ratio: float = Field(
        0.0, ge=0, le=1, description="Learning rate at the end, as a share of the peak."
    )
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay, on matrices only.")
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW's two decay rates.")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon.")
    max_grad_norm: float | None = Field(
        1.0, gt=0, description="Gradients are scaled down to this L2 norm; null: never."
    )
    precision: Precision | Auto = Field(
        "auto",
        description="fp32; bf16 (compute in bf16, trained weights in fp32); bf16-pure (everything bf16); "
        "fp16 (with loss scaling). auto: bf16 where the hardware multiplies it, else fp16 on a GPU and "
        "fp32 on a CPU.",
    )
    memory: Literal["normal", "low", "smallest"] = Field(
        "normal",
        description="What the other memory settings default to. low: bf16 weights with stochastic rounding, "
        "optimizer states of 8 bits, recomputed activations; smallest: also updates in the backward pass.",
    )
    optimizer: Optimizer | Auto = Field(
        "auto",
        description="adamw; adamw-8bit (its two averages in 8 bits); adamw-offload (averages and fp32 "
        "weights in host memory, updated there). auto: as train.memory says.",
    )
    stochastic_rounding: bool | Auto = Field(
        "auto",
        description="bf16-pure: round weights up or down by chance, so that small updates are not lost. "
        "auto: on with train.memory low or smallest.",
    )
    optimizer_in_backward: bool | Auto = Field(
        "auto",
        description="Update each weight as soon as its gradient is there and free that gradient; needs "
        "grad_accumulation 1 and max_grad_norm null. auto: on with train.memory smallest.",
    )
    gradient_checkpointing: Checkpointing | bool | Auto = Field(
        "auto",
        description="Recompute activations in the backward pass to save memory: none (false), selective "
        "(all but attention and matrix products), full (true). auto: as train.memory says.",
    )
    activation_offload: bool = Field(
        False, description="Keep the activations that are saved for the backward pass in host memory (GPU)."
    )
    compile: bool | Auto = Field(
        "auto",
        description="Compile what in the fused layers is no matrix product, by torch.compile; auto: no.",
    )
    kernels: Literal["torch", "liger"] | Auto = Field(
        "auto",
        description="Fused kernels: torch (our own) or liger (GPU); auto: liger on a GPU that has it.",
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of weights, dropout and the order of rows.")
    save_every: Annotated[int, Field(ge=1)] | Auto = Field(
        "auto", description="Optimizer steps between checkpoints; auto: five a run, at least 10 steps apart."
    )
    keep_checkpoints: int = Field(2, ge=1, description="Newest checkpoints to keep.")
    log_every: int = Field(1, ge=1, description="Optimizer steps between logged losses.")
    tensorboard: bool = Field(False, description="Also write TensorBoard files into the run folder.")


class Eval(Section):
    """Held-out loss during training."""

    every: Annotated[int, Field(ge=0)] | Auto = Field(
        "auto", description="Optimizer steps between evaluations; 0: only at the end; auto: four a run."
    )
    max_rows: int | None = Field(None, ge=1, description="Most held-out rows used for the loss; null: all.")


class Samples(Section):
    """Answers generated during training, so that a person sees it learn."""

    every: Annotated[int, Field(ge=0)] | Auto = Field(
        "auto", description="Optimizer steps between samples; 0: never; auto: with each evaluation."
    )
    prompts: list[str] = Field(default_factory=list, description="User messages to answer; none: no samples.")
    max_new_tokens: int = Field(64, ge=1, description="Most tokens of an answer.")
    temperature: float = Field(0.0, ge=0, description="0: greedy.")


class Parallel(Section):
    """Several processes, one a GPU."""

    engine: Literal["single", "ddp", "fsdp", "deepspeed"] | Auto = Field(
        "auto",
        description="ddp: every process holds the model; fsdp: it is sharded (FSDP2); deepspeed: ZeRO. "
        "auto: single for one process, ddp for several.",
    )
    zero_stage: Literal[2, 3] = Field(
        3, description="fsdp and deepspeed: 2 shards gradients and optimizer states, 3 also the weights."
    )
    offload: Literal["none", "optimizer", "parameters"] = Field(
        "none", description="fsdp and deepspeed: keep optimizer states, or weights too, in host memory."
    )


class Hardware(Section):
    """The machine."""

    processes: Annotated[int, Field(ge=1)] | Auto = Field(
        "auto", description="Processes on this machine; auto: one a GPU, and one without GPUs."
    )

    device: Literal["cpu", "cuda"] | Auto = Field(
        "auto", description="Where to compute; auto: a GPU when there is one."
    )
    threads: Annotated[int, Field(ge=1)] | Auto = Field(
        "auto", description="CPU threads; auto: the physical cores."
    )


class Recipe(Section):
    """One file from data to endpoint."""

    name: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="Name of the run; default: the recipe file's name.",
    )
    output_dir: str = Field(
        "runs", description="Folder that holds the run folders, relative to where you call."
    )
    model: Model
    data: Data
    method: Method = Method()
    objective: Objective = Objective()
    train: Train = Train()
    eval: Eval = Eval()
    samples: Samples = Samples()
    serve: Serve = Serve()
    parallel: Parallel = Parallel()
    hardware: Hardware = Hardware()
    compat: Compat | None = Field(
        None,
        description="Token ids, labels, packs, order and learning rates of another tool, for comparison; "
        "xtuner is short for its defaults.",
    )
