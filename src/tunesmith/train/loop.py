"""The training loop, for full fine-tuning and LoRA alike.

    batches -> forward -> loss -> backward -> clip -> step -> log -> evaluate, sample, save when due

What a step computes depends on its number alone: its rows, its learning rate and its random numbers are
functions of (seed, step). So a run that goes on from a checkpoint does exactly what it would have done.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tunesmith.core.errors import Interrupted, RunFailed
from tunesmith.core.events import EventLog
from tunesmith.core.progress import Meter, say
from tunesmith.core.run_folder import RunFolder
from tunesmith.core.units import bytes_text
from tunesmith.model import attention
from tunesmith.model.batch import Batch
from tunesmith.recipe.schema import Recipe
from tunesmith.train import checkpoint
from tunesmith.train.checkpoint import State
from tunesmith.train.evaluate import evaluation_loss
from tunesmith.train.fast_lora import speed_up
from tunesmith.train.loss import loss_sum
from tunesmith.train.metrics import TensorBoard, peak_gib
from tunesmith.train.optim import gradients, make_optimizer, make_schedule, scale_and_clip
from tunesmith.train.precision import autocast, first_scale
from tunesmith.train.stop import StopRequest


@dataclass(frozen=True, kw_only=True)
class Task:
    """All that a run is made of.

    recipe: resolved; model: trained weights require gradients, attention installed; batches: the
    micro-batches of a 0-based step; longest: the largest micro-batch of the run; epochs_after: passes over
    the data after so many steps; sample: answers of the model, as events; resume_command: what a person
    types to go on.
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


@dataclass(frozen=True)
class StepResult:
    loss: float
    lr: float
    grad_norm: float
    skipped: bool
    tokens: int
    supervised_tokens: int
    seconds: float


class Trainer:
    """Runs a task from a checkpoint (or the beginning) to its end: `Trainer(task, events).run()`."""

    def __init__(self, task: Task, events: EventLog) -> None:
        self.task, self.events, self.model = task, events, task.model
        self.settings = task.recipe.train
        assert self.settings.precision != "auto"
        self.precision = self.settings.precision
        speed_up(task.model)
        self.device = next(task.model.parameters()).device
        self.optimizer = make_optimizer(task.model, self.settings)
        self.schedule = make_schedule(self.settings, task.total_steps)
        self.state = State(scale=first_scale(self.precision))
        self.board: TensorBoard | None = None

    def restore(self, folder: Any) -> None:
        """Go on from a checkpoint that has been found whole."""
        self.state = checkpoint.restore(folder, self.model, self.optimizer)
        self.events.write("resume", step=self.state.step, checkpoint=str(folder))

    def run(self) -> State:
        """Train to the last step. Raises RunFailed or Interrupted; the last checkpoint is good then."""
        self.model.train()
        self.try_longest_batch()
        with StopRequest() as stop, self.progress() as meter:
            began = time.perf_counter() - self.state.train_s
            if self.state.step == 0:
                self.duties(begun=False)
            while self.state.step < self.task.total_steps:
                result = self.step(self.task.batches(self.state.step))
                self.state.train_s = time.perf_counter() - began
                self.log(result, meter)
                self.duties(stop=stop.signal_number is not None)
                self.state.train_s = time.perf_counter() - began
                if stop.signal_number and self.state.step < self.task.total_steps:
                    raise self.interrupted(stop.signal_number)
        return self.state

    # -- one step --------------------------------------------------------------------------------------

    def step(self, batches: list[Batch]) -> StepResult:
        """One optimizer step on the micro-batches' summed gradients; its loss is the mean over all labels."""
        began = time.perf_counter()
        supervised = sum(batch.num_supervised for batch in batches)
        loss = sum(self.backward(batch, micro, supervised) for micro, batch in enumerate(batches))
        self.check_finite("loss", loss, batches)
        lr = self.schedule.lr(self.state.step)
        norm = self.update(lr, batches)
        self.optimizer.zero_grad(set_to_none=True)
        tokens = sum(batch.num_tokens for batch in batches)
        seconds = time.perf_counter() - began
        self.count(loss, tokens, supervised, seconds)
        return StepResult(loss, lr, norm, not math.isfinite(norm), tokens, supervised, seconds)

    def backward(self, batch: Batch, micro: int, supervised: int) -> float:
        """Add the gradient of one micro-batch; its share of the step's loss."""
        seed_everything(self.settings.seed, self.state.step, micro)
        with autocast(self.precision, self.device):
            total = self.forward(batch)
        (total * (self.state.scale.scale / supervised)).backward()
        return float(total.detach()) / supervised

    def forward(self, batch: Batch) -> Tensor:
        """The summed loss over a micro-batch's labels."""
        input_ids = torch.from_numpy(batch.input_ids).to(self.device)[None]
        positions = torch.from_numpy(batch.positions).to(self.device)[None]
        layout = attention.PackedLayout(batch.starts)
        hidden = attention.hidden_states(self.model, input_ids, positions, layout)
        return loss_sum(attention.lm_head(self.model), hidden, torch.from_numpy(batch.labels).to(self.device))

    def update(self, lr: float, batches: list[Batch]) -> float:
        """Clip and take the optimizer step. Returns the gradients' norm before it, infinite if skipped."""
        scale = self.state.scale
        norm = scale_and_clip(
            gradients(self.optimizer), divide_by=scale.scale, max_norm=self.settings.max_grad_norm
        )
        if not math.isfinite(norm) and scale.can_fall:
            scale.overflowed()
            return math.inf
        self.check_finite("gradient norm", norm, batches)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        scale.went_well()
        return norm

    def check_finite(self, what: str, value: float, batches: list[Batch]) -> None:
        """Stop before the weights are touched."""
        if math.isfinite(value):
            return
        step = self.state.step + 1
        rows = sorted({row for batch in batches for row in batch.rows})
        shown = ", ".join(map(str, rows[:20])) + (f" and {len(rows) - 20} more" if len(rows) > 20 else "")
        self.events.write("warning", step=step, what=f"{what} is {value}", rows=rows)
        last = self.task.run.latest_checkpoint()
        raise RunFailed(
            f"step {step}: the {what} is {value}; the step's rows are {shown}. The weights were not touched"
            + (f"; the last good checkpoint is {last}" if last else ""),
            hint="look at those rows with 'tunesmith data show', lower train.lr (half of it), set "
            "train.max_grad_norm: 1.0, or use precision bf16 or fp32; then train with --fresh",
        )

    def count(self, loss: float, tokens: int, supervised: int, seconds: float) -> None:
        state = self.state
        state.step, state.loss = state.step + 1, loss
        state.tokens += tokens
        state.supervised_tokens += supervised
        state.step_s += seconds

    # -- around the steps ------------------------------------------------------------------------------

    def try_longest_batch(self) -> None:
        """Forward and backward on the largest micro-batch, so that memory ends now or not at all."""
        longest = self.task.longest
        try:
            self.backward(longest, 0, max(1, longest.num_supervised))
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            raise self.out_of_memory(error) from error
        finally:
            self.optimizer.zero_grad(set_to_none=True)

    def out_of_memory(self, error: BaseException) -> RunFailed:
        train, longest = self.settings, self.task.longest
        remedies = [
            *(["train.micro_batch_size=1"] if train.micro_batch_size > 1 else []),
            *(["train.gradient_checkpointing=true"] if not train.gradient_checkpointing else []),
            "a smaller data.max_length",
            *(["method.type=lora"] if self.task.recipe.method.type == "full" else []),
        ]
        return RunFailed(
            f"the longest batch ({longest.num_tokens} tokens) does not fit into the memory of {self.device}: "
            f"{str(error).splitlines()[0]}",
            hint=f"try, in this order: {', '.join(remedies)}",
        )

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
            self.save()

    def evaluate(self) -> None:
        began = time.perf_counter()
        with autocast(self.precision, self.device):
            loss, tokens = evaluation_loss(self.model, self.task.eval_batches)
        seconds = time.perf_counter() - began
        self.events.write("eval", step=self.state.step, loss=loss, supervised_tokens=tokens, seconds=seconds)
        self.plot([("eval/loss", loss)])
        say(f"step {self.state.step}: held-out loss {loss:.4f}")

    def show_samples(self, sample: Callable[[Any], list[dict[str, Any]]]) -> None:
        for answer in sample(self.model):
            self.events.write("sample", step=self.state.step, **answer)
            say(f"step {self.state.step}: {answer['prompt']!r} -> {answer['answer']!r}")

    def save(self) -> None:
        began = time.perf_counter()
        folder = checkpoint.save(self.task.run, self.state, self.model, self.optimizer)
        checkpoint.prune(self.task.run, self.settings.keep_checkpoints)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        seconds = time.perf_counter() - began
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
        }
        overflow = {"skipped": True, "loss_scale": self.state.scale.scale} if result.skipped else {}
        self.events.write("step", **fields, **overflow)
        self.plot([(f"train/{name}", fields[name]) for name in ("loss", "lr", "grad_norm", "tokens_per_s")])

    def plot(self, values: list[tuple[str, Any]]) -> None:
        if not self.settings.tensorboard:
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
            f"({bytes_text(sum(p.stat().st_size for p in folder.rglob('*') if p.is_file()))})",
            hint=f"go on with: {self.task.resume_command}",
        )


def _is_due(every: int | str, step: int) -> bool:
    return isinstance(every, int) and every > 0 and step % every == 0


def seed_everything(seed: int, step: int, micro: int) -> None:
    """Give torch the random state of one micro-batch: a function of its numbers, whatever came before."""
    digest = hashlib.sha256(f"{seed} {step} {micro}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _is_out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text
