"""The training loop, for full fine-tuning and LoRA alike.

    batches -> forward -> loss -> backward -> clip -> step -> log -> evaluate, sample, save when due

What a step computes depends on its number alone: its rows, its learning rate and its random numbers are
functions of (seed, step). So a run that goes on from a checkpoint does exactly what it would have done.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from tunesmith.core.errors import Interrupted, RunFailed
from tunesmith.core.events import EventLog
from tunesmith.core.progress import Meter, say
from tunesmith.core.run_folder import RunFolder
from tunesmith.core.stop import SIGNALS, StopRequest
from tunesmith.core.units import bytes_text
from tunesmith.model.batch import Batch
from tunesmith.recipe.schema import Recipe
from tunesmith.train import checkpoint, faults
from tunesmith.train.checkpoint import SaveFailed, State
from tunesmith.train.engine import Engine, Share, SingleEngine
from tunesmith.train.evaluate import evaluate
from tunesmith.train.metrics import TensorBoard, peak_gib
from tunesmith.train.objective import Objective, Supervised, Tally
from tunesmith.train.optim import make_schedule
from tunesmith.train.precision import first_scale
from tunesmith.train.seeds import seed_everything, seed_of
from tunesmith.train.speed import speed_up


@dataclass(frozen=True, kw_only=True)
class Task:
    """All that a run is made of.

    recipe: resolved; model: trained weights require gradients, attention installed; batches: the
    micro-batches of a 0-based step over all processes; longest: the largest micro-batch of the run;
    epochs_after: passes over the data after so many steps; sample: answers of the model, as events;
    resume_command: what a person types to go on; objective: what is minimised; lr: learning rate of a 0-based
    step, if it is not the recipe's schedule.
    """

    recipe: Recipe
    run: RunFolder
    model: Any
    total_steps: int
    batches: Callable[[int], list[Batch]]
    longest: Batch
    epochs_after: Callable[[int], float]
    eval_batches: Sequence[Batch] = ()
    sample: Callable[[Any], list[dict[str, Any]]] | None = None
    resume_command: str = "tunesmith train RECIPE"
    objective: Objective = field(default_factory=Supervised)
    lr: Callable[[int], float] | None = None


@dataclass(frozen=True)
class StepResult:
    loss: float
    lr: float
    grad_norm: float
    skipped: bool
    tokens: int
    supervised_tokens: int
    seconds: float
    measures: dict[str, float] = field(default_factory=dict)


class Trainer:
    """Runs a task from a checkpoint (or the beginning) to its end: `Trainer(task, events).run()`."""

    def __init__(self, task: Task, events: EventLog, engine: Engine | None = None) -> None:
        self.task, self.events, self.objective = task, events, task.objective
        self.settings = task.recipe.train
        assert self.settings.precision != "auto"
        self.precision = self.settings.precision
        self.speed = speed_up(task.model, self.settings)
        self.engine = engine or SingleEngine(task.model, task.objective, task.recipe)
        self.device = self.engine.device
        self.lr = task.lr or make_schedule(self.settings, task.total_steps).lr
        self.state = State(scale=first_scale(self.precision))
        self.board: TensorBoard | None = None
        self.limits: dict[int, int] = {}
        self.eval_tokens: int | None = None  # what held-out batches are cut to in this process

    def restore(self, folder: Any) -> None:
        """Go on from a checkpoint that has been found whole."""
        self.state = checkpoint.restore(folder, self.engine)
        self.events.write("resume", step=self.state.step, checkpoint=str(folder))

    def run(self) -> State:
        """Train to the last step. Raises RunFailed or Interrupted; the last checkpoint is good then."""
        try:
            return self.train()
        except RunFailed as error:
            self.events.write("end", status="failed", step=self.state.step, what=error.what)
            raise

    def train(self) -> State:
        self.events.write("speed", **self.speed.as_dict())
        self.engine.model.train()
        self.limits = faults.earlier_limits(self.engine, self.task.run.events, self.state.step)
        self.prepare_objective()
        self.try_longest_batch()
        with StopRequest() as stop, self.progress() as meter:
            began = time.perf_counter() - self.state.train_s
            if self.state.step == 0:
                self.duties(begun=False)
            while self.state.step < self.task.total_steps:
                result = self.step(self.task.batches(self.state.step))
                self.state.train_s = time.perf_counter() - began
                self.log(result, meter)
                asked = self.agreed(stop.signal_number)
                self.duties(stop=asked is not None)
                self.state.train_s = time.perf_counter() - began
                if asked and self.state.step < self.task.total_steps:
                    raise self.interrupted(asked)
        return self.state

    def prepare_objective(self) -> None:
        """What the objective needs of the model as it is, before it is trained."""
        prepare = partial(self.objective.prepare, self.engine, self.task.run, begun=self.state.step > 0)
        prepared = faults.attempt(prepare)
        if isinstance(prepared, faults.NoMemory):
            raise faults.no_room_for_reference(prepared.reason, self.task.recipe)

    def agreed(self, signal_number: int | None) -> int | None:
        """The signal that asked any process to stop: all of them stop after the same step."""
        if self.engine.num_ranks == 1:
            return signal_number
        numbers, count = self.engine.sum([float(signal_number or 0), float(signal_number is not None)])
        if not count:
            return None
        same = int(numbers / count)
        return same if same in SIGNALS and same * count == numbers else signal.SIGTERM

    # -- one step --------------------------------------------------------------------------------------

    def step(self, batches: list[Batch]) -> StepResult:
        """One optimizer step on the micro-batches' summed gradients; its loss is the mean over all units."""
        began = time.perf_counter()
        lr = self.lr(self.state.step)
        loss, measures = self.within_memory(batches, lr=lr)
        self.check_finite("loss", loss, batches)
        self.watch(loss, batches)
        norm = self.update(batches)
        self.engine.drop_gradients()
        tokens = sum(batch.num_tokens for batch in batches)
        supervised = sum(batch.num_supervised for batch in batches)
        seconds = time.perf_counter() - began
        self.count(loss, tokens, supervised, seconds)
        return StepResult(loss, lr, norm, not math.isfinite(norm), tokens, supervised, seconds, measures)

    def within_memory(self, batches: Sequence[Batch], lr: float | None) -> tuple[float, dict[str, float]]:
        """`backward` on the batches, again with smaller ones as long as memory runs out.

        lr: of the step; None for a trial that no update follows. Returns the loss and the measures, means
        over all units. Raises RunFailed when a single document is too much.
        """
        units = max(1, sum(self.objective.units(batch) for batch in batches))
        state = self.state
        state.max_tokens = self.limits.pop(state.step + 1, state.max_tokens)
        while True:
            pieces = faults.cut(batches, state.max_tokens)
            if lr is not None:
                self.engine.begin(lr, seed_of(self.settings.seed, state.step, -1))
            tally = Tally(self.objective)
            reason = self.backward(pieces, units, tally)
            if self.engine.sum([float(reason is not None)])[0] == 0:
                return tally.mean(self.engine, units)
            self.make_room(pieces, reason or "another process ran out of memory")

    def backward(self, batches: Sequence[Batch], units: int, tally: Tally) -> str | None:
        """Add the gradients of all micro-batches. Returns what was said when memory ran out."""
        shares = self.engine.shares(batches)
        for share in shares:
            last = share is shares[-1]
            found = faults.attempt(partial(self.add_gradients, share, units, tally, last=last))
            if not isinstance(found, faults.NoMemory):
                continue
            if not self.engine.retries or share.batch.num_documents == 1:
                raise faults.too_large(share.batch, found.reason, self.task.recipe, self.state.step + 1)
            return found.reason
        return None

    def add_gradients(self, share: Share, units: int, tally: Tally, *, last: bool) -> None:
        seed_everything(self.settings.seed, self.state.step, share.number)
        loss = self.engine.forward(share.batch)
        factor = self.state.scale.scale / units if share.counts else 0.0
        self.engine.backward(loss * factor, last=last)
        tally.add(loss, counts=share.counts)

    def make_room(self, batches: Sequence[Batch], reason: str) -> None:
        """After a step that ran out of memory, in this process or another: smaller micro-batches from now."""
        self.engine.drop_gradients()
        self.objective.drain()
        faults.release_memory()
        step, largest = self.state.step + 1, max(batch.num_tokens for batch in batches)
        limit = self.state.max_tokens = faults.smaller(batches)
        self.events.write("out_of_memory", step=step, tokens=largest, max_tokens=limit, what=reason)
        say(
            f"step {step}: out of memory with micro-batches of up to {largest:,} tokens: those of more than "
            f"{limit:,} are cut from now on, and the same rows are taken again"
        )

    def update(self, batches: list[Batch]) -> float:
        """Clip and take the optimizer step. Returns the gradients' norm before it, infinite if skipped."""
        scale = self.state.scale
        update = partial(self.engine.update, divide_by=scale.scale, max_norm=self.settings.max_grad_norm)
        norm = faults.attempt(update)
        if isinstance(norm, faults.NoMemory):
            raise self.half_updated(norm.reason)
        if not math.isfinite(norm) and scale.can_fall:
            scale.overflowed()
            return math.inf
        self.check_finite("gradient norm", norm, batches)
        scale.went_well()
        return norm

    def half_updated(self, reason: str) -> RunFailed:
        self.engine.model.zero_grad(set_to_none=True)  # room to look for the last checkpoint
        faults.release_memory()
        last = self.task.run.latest_checkpoint()
        return faults.no_room_for_update(reason, self.task.recipe, self.state.step + 1, last)

    def check_finite(self, what: str, value: float, batches: Sequence[Batch]) -> None:
        """Stop before the weights are touched."""
        if math.isfinite(value):
            return
        measure = faults.row_losses if what == "loss" else faults.row_gradients
        rows = measure(self.engine, self.objective, batches)
        step, last = self.state.step + 1, self.task.run.latest_checkpoint()
        self.warn(step, f"the {what} is {value}", rows)
        raise RunFailed(
            f"step {step}: the {what} is {value}; its rows, the worst first: {faults.rows_text(rows)}. "
            f"{self.untouched(what)}" + (f"; the last good checkpoint is {last}" if last else ""),
            hint="look at those rows, lower train.lr (half of it), set train.max_grad_norm: 1.0, or use "
            "precision bf16 or fp32; then train with --fresh",
        )

    def untouched(self, what: str) -> str:
        """What has become of the weights when a step ends on a value that is not finite."""
        if self.settings.optimizer_in_backward is True and what != "loss":
            return "Weights whose gradients came before it are updated already, and nothing of them is saved"
        return "The weights were not touched"

    def watch(self, loss: float, batches: Sequence[Batch]) -> None:
        """Name the rows of a loss that stands out."""
        if faults.is_spike(loss, self.state.recent):
            rows = faults.row_losses(self.engine, self.objective, batches)
            usual = faults.usual(self.state.recent)
            self.warn(self.state.step + 1, f"the loss is {loss:.4f}, where {usual:.4f} is usual", rows)
        self.state.recent = faults.remember(loss, self.state.recent)

    def warn(self, step: int, what: str, rows: Sequence[faults.Measured] = ()) -> None:
        named = {"rows": [asdict(row) for row in rows]} if rows else {}
        self.events.write("warning", step=step, what=what, **named)
        worst = f"; its rows, the worst first: {faults.rows_text(rows)}" if rows else ""
        say(f"warning: step {step}: {what}{worst}")

    def count(self, loss: float, tokens: int, supervised: int, seconds: float) -> None:
        state = self.state
        state.step, state.loss = state.step + 1, loss
        state.tokens += tokens
        state.supervised_tokens += supervised
        state.step_s += seconds

    # -- around the steps ------------------------------------------------------------------------------

    def try_longest_batch(self) -> None:
        """Forward and backward on the largest micro-batch, so that memory ends now or not at all."""
        try:
            self.within_memory([self.task.longest] * self.engine.num_ranks, lr=None)
        finally:
            self.engine.drop_gradients()

    def duties(self, *, begun: bool = True, stop: bool = False) -> None:
        """Evaluate, sample and save when due. Saving comes last: what stands before it is done by then."""
        recipe, step = self.task.recipe, self.state.step
        last = step == self.task.total_steps
        if self.task.eval_batches and (not begun or last or _is_due(recipe.eval.every, step)):
            self.evaluate()
        if (
            self.task.sample
            and recipe.samples.every
            and (not begun or last or _is_due(recipe.samples.every, step))
        ):
            self.show_samples(self.task.sample)
        if not begun or last or stop or _is_due(self.settings.save_every, step):
            self.save(must=not begun or last or stop)

    def evaluate(self) -> None:
        began = time.perf_counter()
        engine, before = self.engine, self.eval_tokens
        found = evaluate(
            self.objective, engine, self.task.eval_batches, max_tokens=before, can_cut=not engine.lockstep
        )
        self.eval_tokens = found.max_tokens
        if engine.sum([float(found.max_tokens != before)])[0]:
            self.warn(self.state.step, faults.CUT_TO_EVALUATE)
        fields: dict[str, Any] = {"loss": found.loss, "supervised_tokens": found.supervised_tokens}
        fields |= {"seconds": time.perf_counter() - began} | found.measures
        self.events.write("eval", step=self.state.step, **fields)
        self.plot([("eval/loss", found.loss), *((f"eval/{k}", v) for k, v in found.measures.items())])
        told = "".join(f", {name} {value:.4f}" for name, value in found.measures.items())
        say(f"step {self.state.step}: held-out loss {found.loss:.4f}{told}")

    def show_samples(self, sample: Callable[[Any], list[dict[str, Any]]]) -> None:
        answers = faults.attempt(partial(self.answers, sample))
        if isinstance(answers, faults.NoMemory):
            if self.engine.lockstep and self.engine.num_ranks > 1:
                raise faults.no_room_for_samples(answers.reason)
            self.warn(self.state.step, faults.samples_left_out(answers.reason))
            return
        for answer in answers:
            self.events.write("sample", step=self.state.step, **answer)
            say(f"step {self.state.step}: {answer['prompt']!r} -> {answer['answer']!r}")

    def answers(self, sample: Callable[[Any], list[dict[str, Any]]]) -> list[dict[str, Any]]:
        with self.engine.whole_model() as model:
            return sample(model)

    def save(self, *, must: bool) -> None:
        """Raises SaveFailed if it `must` be; otherwise training goes on to the next save."""
        began, run, keep = time.perf_counter(), self.task.run, self.settings.keep_checkpoints
        try:
            folder = checkpoint.save(run, self.state, self.engine, keep=keep)
        except SaveFailed as error:
            if must:
                raise
            last = run.latest_checkpoint()
            self.warn(self.state.step, f"{error.what}; training goes on, and the last good one is {last}")
            return
        if self.engine.rank > 0:
            return
        size, seconds = checkpoint.folder_bytes(folder), time.perf_counter() - began
        self.events.write("checkpoint", step=self.state.step, path=str(folder), bytes=size, seconds=seconds)

    def log(self, result: StepResult, meter: Meter) -> None:
        rate = result.tokens / result.seconds
        mean_rate = self.state.tokens / self.state.step_s
        meter.advance(1, f"loss {result.loss:.4f}  {mean_rate:,.0f} tokens/s")
        last = self.state.step == self.task.total_steps
        if not (last or result.skipped or _is_due(self.settings.log_every, self.state.step)):
            return
        fields = {
            "step": self.state.step,
            "epoch": self.task.epochs_after(self.state.step),
            "loss": result.loss,
            "lr": result.lr,
            "grad_norm": result.grad_norm,
            "tokens": result.tokens,
            "supervised_tokens": result.supervised_tokens,
            "tokens_per_s": round(rate, 1),
            "step_s": round(result.seconds, 4),
            "peak_gib": round(peak_gib(self.device), 3),
            **result.measures,
        }
        overflow = {"skipped": True, "loss_scale": self.state.scale.scale} if result.skipped else {}
        self.events.write("step", **fields, **overflow)
        self.plot([(f"train/{name}", fields[name]) for name in ("loss", "lr", "grad_norm", "tokens_per_s")])

    def plot(self, values: list[tuple[str, Any]]) -> None:
        if not self.settings.tensorboard or self.engine.rank > 0:
            return
        if self.board is None:
            self.board = TensorBoard(self.task.run.path / "tensorboard", first_step=self.state.step)
        self.board.add(self.state.step, values)

    def progress(self) -> Meter:
        return Meter("train", total=self.task.total_steps, done=self.state.step)

    def interrupted(self, signal_number: int) -> Interrupted:
        state, total = self.state, self.task.total_steps
        folder = self.task.run.checkpoint(state.step)
        self.events.write("end", status="interrupted", step=state.step, signal=signal_number)
        return Interrupted(
            signal_number,
            f"stopped by signal {signal_number} after step {state.step} of {total}; saved as {folder} "
            f"({bytes_text(checkpoint.folder_bytes(folder))})",
            hint=f"go on with: {self.task.resume_command}",
        )


def _is_due(every: int | str, step: int) -> bool:
    return isinstance(every, int) and every > 0 and step % every == 0
