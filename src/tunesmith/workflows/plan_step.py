"""The training step of a recipe as it is traced: the real model code, loss, engine and optimizer, on fake
tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch

from tunesmith.model import attention
from tunesmith.model.batch import Batch
from tunesmith.model.config import token_bytes
from tunesmith.model.fast_layers import use_fast_layers
from tunesmith.model.generate import evaluating
from tunesmith.model.hardware import pretending
from tunesmith.model.shape import decoder_layers, make_fake, meta_model, quantise_shape
from tunesmith.plan.liger_kernels import imagined_liger
from tunesmith.plan.trace import Trace
from tunesmith.recipe.schema import Recipe
from tunesmith.train import fast_lora
from tunesmith.train.engine import Engine
from tunesmith.train.objective import Objective, Supervised
from tunesmith.train.precision import base_dtype
from tunesmith.train.ranks import Ranks
from tunesmith.workflows.plan_parallel import (
    imagined_group,
    learns_an_order,
    leaves_gradients,
    loaded_on,
    passes_of,
    trace_save,
    traced_engine,
    updating,
)
from tunesmith.workflows.train_model import adapted, finish


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a step is traced on. batch: the largest micro-batch; eval_batch: the largest of held-out rows;
    sample_tokens: of the sample prompts and their answers; new_token_ids: of the recipe's new tokens."""

    batch: Batch
    eval_batch: Batch | None = None
    sample_tokens: int = 0
    new_token_ids: tuple[int, ...] = ()
    objective: Callable[[Any], Objective] = lambda model: Supervised()


class RecipeStep:
    """An optimizer step of a resolved recipe with `layers` decoder layers; evaluation, samples, save."""

    def __init__(
        self, recipe: Recipe, config: Any, work: Work, *, layers: int, device: Literal["cpu", "cuda"]
    ) -> None:
        self.recipe, self.work, self.device = recipe, work, device
        self.model = shape_of(recipe, config, layers=layers, new_token_ids=work.new_token_ids)

    def run(self, trace: Trace) -> None:
        given = len(trace.listeners)
        liger = self.recipe.train.kernels == "liger"
        kernels = imagined_liger(attention.unwrapped(self.model)) if liger else nullcontext()
        with pretending(self.device), imagined_group(self.recipe, trace, self.device) as ranks, kernels:
            engine = self._load(trace, ranks)
            if learns_an_order(self.recipe):
                with _unheard(trace, given):
                    self._begin(trace, engine)
            self._update(trace, engine, self._passes(ranks))
            self._duties(trace, engine)

    def _load(self, trace: Trace, ranks: Ranks) -> Engine:
        model, inner = self.model, attention.unwrapped(self.model)
        with trace.on(loaded_on(self.recipe, self.device)):
            make_fake(model)
        trace.watch(model, inner.config.get_text_config().vocab_size, decoder_layers(inner))
        engine = traced_engine(model, self.work.objective(model), self.recipe, ranks, trace, self.device)
        if self.recipe.train.kernels != "liger":
            use_fast_layers(model)
        fast_lora.speed_up(model)
        model.train()
        return engine

    def _passes(self, ranks: Ranks) -> int:
        """How many micro-batches are traced, gradients of an earlier one in place."""
        if leaves_gradients(self.recipe):
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.empty_like(parameter)
        return passes_of(self.recipe, ranks.size)

    def _begin(self, trace: Trace, engine: Engine) -> None:
        """The trial of the largest batch, what is due before the first step, and that step."""
        self._pass(trace, engine, last=True)
        engine.drop_gradients()
        self._duties(trace, engine)
        self._update(trace, engine, 1)

    def _update(self, trace: Trace, engine: Engine, passes: int) -> None:
        engine.begin(1e-4, 0)
        for number in range(passes):
            self._pass(trace, engine, last=number == passes - 1)
        trace.at("update")
        with updating(engine, self.recipe, trace, self.device):
            engine.update(divide_by=1.0, max_norm=self.recipe.train.max_grad_norm)
        engine.drop_gradients()

    def _duties(self, trace: Trace, engine: Engine) -> None:
        if self.work.eval_batch is not None:
            self._evaluate(trace, engine, self.work.eval_batch)
        self._sample(trace, engine)
        trace_save(engine, trace, self.device)

    def _pass(self, trace: Trace, engine: Engine, *, last: bool) -> None:
        """Forward and backward of one micro-batch."""
        trace.at("forward")
        trace.num_nonzero = self.work.batch.num_supervised
        with trace.saving():
            loss = engine.forward(self.work.batch)
        trace.at("backward", "head")
        engine.backward(loss * 1.0, last=last)

    def _evaluate(self, trace: Trace, engine: Engine, batch: Batch) -> None:
        trace.at("evaluate")
        trace.num_nonzero = batch.num_supervised
        with evaluating(self.model), torch.no_grad():
            engine.forward(batch)

    def _sample(self, trace: Trace, engine: Engine) -> None:
        """The cache of the answers' keys and values, and the pass that fills it."""
        if not self.work.sample_tokens:
            return
        trace.at("sample")
        config = attention.unwrapped(self.model).config
        each = next(self.model.parameters()).element_size()
        cache = torch.empty(self.work.sample_tokens * token_bytes(config, each), dtype=torch.uint8)
        ids = torch.zeros(1, self.work.sample_tokens, dtype=torch.int64)
        positions = torch.arange(self.work.sample_tokens)[None]
        layout = attention.PackedLayout([0, self.work.sample_tokens])
        with engine.whole_model(), evaluating(self.model), torch.no_grad():
            hidden = attention.hidden_states(self.model, ids, positions, layout)
            attention.lm_head(self.model)(hidden[:, -1:])
        del cache


@contextmanager
def _unheard(trace: Trace, given: int) -> Iterator[None]:
    """Keep what goes before the step from the trace's first `given` listeners, who count one step."""
    before = trace.listeners
    trace.listeners = before[given:]
    try:
        yield
    finally:
        trace.listeners = before


def shape_of(recipe: Recipe, config: Any, *, layers: int, new_token_ids: tuple[int, ...] = ()) -> Any:
    """What `train_model.make_model` makes, on the meta device and without a file of weights."""
    method, precision = recipe.method, recipe.train.precision
    assert precision != "auto" and recipe.data.max_length != "auto"
    model = meta_model(
        config,
        base_dtype(precision, full=method.type == "full"),
        layers=layers,
        vocabulary=max(new_token_ids, default=-1) + 1,
        trust_remote_code=recipe.model.trust_remote_code,
    )
    attention.install(model, max_length=recipe.data.max_length)
    if method.type == "qlora":
        quantise_shape(
            model,
            compute_dtype=base_dtype(precision, full=False),
            double_quant=method.double_quant,
            keep=method.modules_to_save,
        )
    if method.type != "full":
        with torch.device("meta"):  # adapters are no exception: nothing is drawn
            model = adapted(model, recipe, list(new_token_ids))
    finish(model, recipe)
    return model


def layer_elements(recipe: Recipe, config: Any) -> int:
    """Elements of one decoder layer of the recipe's model, adapters included."""
    layers = decoder_layers(attention.unwrapped(shape_of(recipe, config, layers=1)))
    return sum(p.numel() for layer in layers for p in layer.parameters())
