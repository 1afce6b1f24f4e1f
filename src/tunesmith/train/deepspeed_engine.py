"""DeepSpeed's ZeRO, stages 2 and 3, with offload to host memory (Rajbhandari et al. 2020, arXiv:1910.02054).

DeepSpeed keeps the weights in fp32 here, as the other engines do, and products are in 16 bits by autocast:
the same numbers, and the same checkpoint files. Its optimizer is torch's AdamW on a CPU too, so that no
compiler is needed.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from tunesmith.core.errors import MissingExtra
from tunesmith.core.optional import load
from tunesmith.model.attention import lm_head, unwrapped
from tunesmith.model.batch import Batch
from tunesmith.recipe.schema import Recipe
from tunesmith.train import gathered, states
from tunesmith.train.activations import OffloadedActivations
from tunesmith.train.engine import Share
from tunesmith.train.group import sum_over
from tunesmith.train.objective import Objective
from tunesmith.train.optim import begin_step, parameter_groups
from tunesmith.train.parallel import shares_of
from tunesmith.train.precision import autocast
from tunesmith.train.ranks import Ranks

# Gradients that are summed at a time: 200 MB in fp32, where DeepSpeed's default takes 2 GB of every process.
BUCKET_ELEMENTS = 50_000_000
MOMENTS = ("exp_avg", "exp_avg_sq")


class DeepSpeedEngine:
    """ZeRO: stage 2 shards gradients and optimizer states, 3 also the weights, layer by layer."""

    retries = False
    lockstep = True  # the processes gather weights together: none can take a step again alone

    def __init__(self, model: Any, objective: Objective, recipe: Recipe, ranks: Ranks) -> None:
        assert recipe.train.precision != "auto"
        self.model, self.ranks, self.rank, self.num_ranks = model, ranks, ranks.rank, ranks.size
        self.precision, self.stage = recipe.train.precision, recipe.parallel.zero_stage
        self.offload = OffloadedActivations(model) if recipe.train.activation_offload else None
        self.deepspeed = _import_deepspeed(recipe)
        if self.stage == 3:
            _gather_by_layer(self.deepspeed, model)
        self.zero = self._initialize(_Total(model, objective), recipe)
        self.device = torch.device(self.zero.device)
        self.optimizer = self.zero.optimizer.optimizer
        self._allocate()
        self._begun = False

    def _initialize(self, module: _Total, recipe: Recipe) -> Any:
        if self.stage == 3:
            head = lm_head(module.model)
            for parameter in head.parameters():  # the loss reads it without calling the head
                self.deepspeed.zero.register_external_parameter(module, parameter)
        train, method = recipe.train, recipe.method
        groups = parameter_groups(module.model, train.weight_decay, method.lora_plus_ratio or 1.0)
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=train.betas, eps=train.eps, fused=True)
        os.environ.setdefault("LOCAL_RANK", str(self.ranks.local_rank))  # read at every turn; srun sets none
        return self.deepspeed.initialize(model=module, optimizer=optimizer, config=_config(recipe))[0]

    def _flat(self) -> list[Tensor]:
        """What the optimizer updates: this process's parts of all trained weights, laid flat."""
        zero = self.zero.optimizer
        found: list[Tensor] = (
            zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups
        )
        return found

    def _allocate(self) -> None:
        """Averages before the first step, so that there is something to save and to read into."""
        for flat in self._flat():
            state = self.optimizer.state[flat]
            state["step"] = torch.zeros((), device=flat.device)
            for name in MOMENTS:
                state[name] = torch.zeros_like(flat)
        if self.stage == 2:
            self.zero.optimizer._lazy_init_hp_params_optimizer_state()

    def shares(self, batches: Sequence[Batch]) -> list[Share]:
        return shares_of(batches, self.ranks, even=True)

    def begin(self, lr: float, seed: int) -> None:
        begin_step(self.optimizer, lr, seed)
        self._begun = True

    def forward(self, batch: Batch) -> Tensor:
        saved: AbstractContextManager[object] = self.offload.context() if self.offload else nullcontext()
        with autocast(self.precision, self.device), saved:
            total: Tensor = self.zero(batch)
        return total

    def backward(self, loss: Tensor, *, last: bool) -> None:
        # DeepSpeed averages over the processes. It drops gradients only as an overflow: that is what a pass
        # without `begin`, which no update may follow, is made into.
        self.zero.backward(loss * (self.num_ranks if self._begun else math.nan))

    def update(self, *, divide_by: float, max_norm: float | None) -> float:
        assert divide_by == 1.0, "its clipping knows no other loss scale"
        self.zero.step()
        self._begun = False
        return float(self.zero.get_global_grad_norm())

    def drop_gradients(self) -> None:
        if self.zero._unmanaged_backward_count:
            self.zero.step()
        self._begun = False

    def sum(self, values: Sequence[float]) -> list[float]:
        return sum_over(self.ranks, values)

    @contextmanager
    def whole_model(self) -> Iterator[Any]:
        with self._gathered(list(self.model.parameters())):
            yield self.model

    def _gathered(self, parameters: list[Any]) -> AbstractContextManager[object]:
        found: AbstractContextManager[object] = (
            self.deepspeed.zero.GatheredParameters(parameters) if self.stage == 3 else nullcontext()
        )
        return found

    def num_bytes(self) -> int:
        adapted = hasattr(self.model, "peft_config")
        sizes = [(getattr(p, "ds_numel", p.numel()), p) for p in self.model.parameters()]
        weights = sum(n * p.element_size() for n, p in sizes if p.requires_grad or not adapted)
        return weights + sum(n * 4 * len(MOMENTS) for n, p in sizes if p.requires_grad)

    def write(self, folder: Path | None) -> None:
        adapted = hasattr(self.model, "peft_config")
        named = {n: p for n, p in self.model.named_parameters() if p.requires_grad or not adapted}
        with gathered.gathering(folder) as copies:
            weights = {name: self._weight(p, copies) for name, p in named.items()}
            moments = {
                name: {key: copies.take(self._moment(p, key)) for key in MOMENTS}
                for name, p in named.items()
                if p.requires_grad
            }
        step = self.optimizer.state[self._flat()[0]]["step"]
        if folder is not None:
            moments = {name: {"step": step.clone(), **values} for name, values in moments.items()}
            gathered.write_files(folder, self.model, named, weights, moments)

    def _weight(self, parameter: nn.Parameter, copies: gathered.HostCopies) -> Tensor:
        with self._gathered([parameter]):
            return copies.take(parameter.data)

    def _moment(self, parameter: nn.Parameter, key: str) -> Tensor:
        whole: Tensor = self.deepspeed.utils.safe_get_full_optimizer_state(parameter, key)
        return whole

    def read(self, folder: Path) -> None:
        """The optimizer's state; weights were read before they were sharded."""
        named = dict(self.model.named_parameters())
        with safe_open(folder / states.OPTIMIZER, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                kind, _, name = key.partition("/")
                if kind in MOMENTS:
                    self._set_moment(named[name], kind, file.get_tensor(key))
                else:
                    for flat in self._flat():
                        self.optimizer.state[flat][kind].copy_(file.get_tensor(key))

    def _set_moment(self, parameter: Any, kind: str, value: Tensor) -> None:
        if self.stage == 2:
            self.deepspeed.utils.safe_set_full_optimizer_state(parameter, value, kind)
            return
        # DeepSpeed's own setter takes only tensors that divide evenly among the processes.
        held, _ = self.zero.optimizer._get_fp32_opt_state_partition(parameter, False, kind)
        part = value.flatten()[held.numel() * self.rank :][: held.numel()]
        held[: part.numel()].copy_(part)


class _Total(nn.Module):
    """The objective as a forward pass: DeepSpeed gathers weights around that of the module it is given."""

    def __init__(self, model: Any, objective: Objective) -> None:
        super().__init__()
        self.model: Any = model
        self.objective = objective

    def forward(self, batch: Batch) -> Tensor:
        return self.objective.total(self.model, batch)


def _import_deepspeed(recipe: Recipe) -> Any:
    """The package, quiet: it logs to stdout. Raises MissingExtra."""
    if recipe.hardware.device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        deepspeed = load("deepspeed")
    except ImportError:
        raise MissingExtra("deepspeed", "deepspeed") from None
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed


def _gather_by_layer(deepspeed: Any, model: Any) -> None:
    """Gather a decoder layer as a whole: its parts are also read without being called."""
    inner = unwrapped(model)
    kinds = {type(layer) for layer in inner.get_decoder().layers}
    deepspeed.utils.set_z3_leaf_modules(model, list(kinds))
    # A layer's gradients are sent once those of its inputs are there: with frozen embeddings those of the
    # first layer would be sent before they are computed.
    inner.enable_input_require_grads()


def _config(recipe: Recipe) -> dict[str, Any]:
    train, parallel = recipe.train, recipe.parallel
    on_gpu = recipe.hardware.device == "cuda"
    host = {"device": "cpu", "pin_memory": on_gpu}
    zero: dict[str, Any] = {
        "stage": parallel.zero_stage,
        "overlap_comm": on_gpu,
        "reduce_bucket_size": BUCKET_ELEMENTS,
    }
    if parallel.offload != "none":
        zero["offload_optimizer"] = host
    if parallel.offload == "parameters":
        zero["offload_param"] = host
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": train.max_grad_norm or 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        "steps_per_print": None,
    }
