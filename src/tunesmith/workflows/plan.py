"""The plan of a run: what it learns from, memory, time and disk, and a refusal where it cannot work.

`tunesmith plan` and `tunesmith train` make it with the same function, before a weight is read.
"""

from __future__ import annotations

import os
import shlex
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tunesmith.core.errors import PlanRefused, TunesmithError, UserError
from tunesmith.core.units import bytes_text
from tunesmith.plan.disk import DiskPlan
from tunesmith.plan.duration import TimePlan
from tunesmith.plan.memory import MemoryPlan
from tunesmith.plan.warnings import Warning
from tunesmith.recipe.resolve import resolve_steps
from tunesmith.workflows.data import ShownRow
from tunesmith.workflows.plan_course import warnings_on
from tunesmith.workflows.plan_duration import Ear, Run, time_of
from tunesmith.workflows.plan_files import disk_of, published_bytes
from tunesmith.workflows.plan_fit import Case, Remedy, Traced, find_remedy, target_of
from tunesmith.workflows.plan_machine import Machine, Verdict
from tunesmith.workflows.plan_memory import plan_memory
from tunesmith.workflows.plan_model import Size, size_of
from tunesmith.workflows.plan_serving import ServingPlan, plan_serving
from tunesmith.workflows.plan_step import Work
from tunesmith.workflows.plan_subject import (
    Subject,
    WorkPlan,
    counts_of,
    new_token_ids,
    samples_of,
    traced_work,
    work_of,
)

T = TypeVar("T")
# Of plan.json: what takes a trace of the step, or a probe.
PREDICTED = ("memory", "duration", "serving", "notes")


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """See `make_plan`. unknown: what is not predicted, and why; remedy: what makes it fit; earlier: the plan,
    as plan.json has it, whose predictions hold still."""

    subject: Subject
    size: Size
    work: WorkPlan
    disk: DiskPlan
    memory: MemoryPlan | None
    unknown: tuple[str, ...] = ()
    duration: TimePlan | None = None
    serving: ServingPlan | None = None
    remedy: Remedy | None = None
    samples: list[ShownRow] = field(default_factory=list)
    warnings: list[Warning] = field(default_factory=list)
    earlier: Mapping[str, Any] | None = None

    @property
    def verdict(self) -> Verdict:
        if self.earlier is not None:
            known: Verdict = self.earlier["verdict"]
            return known
        return self.subject.machine.verdict(self.memory)

    @property
    def works(self) -> bool:
        """False for a run that memory cannot hold, or this machine's disk where the plan is for it."""
        return self.verdict != "does not fit" and (self.disk.fits or not self.subject.machine.here)

    def as_dict(self) -> dict[str, Any]:
        subject, data = self.subject, self.subject.data
        found: dict[str, Any] = {
            "run": str(subject.run),
            "model": {"name": subject.model.name} | self.size.as_dict(),
            "machine": subject.machine.as_dict(),
            "data": None if data is None else data.prepared.as_dict() | counts_of(data),
            "samples": [row.as_dict() for row in self.samples],
            "work": self.work.as_dict() | self.size.as_dict(),
            "memory": None if self.memory is None else self.memory.as_dict(),
            "duration": None if self.duration is None else self.duration.as_dict(),
            "disk": self.disk.as_dict(),
            "serving": None if self.serving is None else self.serving.as_dict(),
            "remedy": None if self.remedy is None else self.remedy.as_dict(),
            "warnings": [warning.as_dict() for warning in self.warnings],
            "notes": [*subject.notes, *self.unknown],
            "verdict": self.verdict,
            "works": self.works,
        }
        return found | {key: self.earlier[key] for key in PREDICTED if self.earlier is not None}


def make_plan(subject: Subject, *, rows: int = 0, earlier: Mapping[str, Any] | None = None) -> RunPlan:
    """Plan a run. rows: samples to show; earlier: the same run's plan, which `holds_still`: memory and time
    are not predicted again.

    Raises UserError for what the recipe asks of the model and the model has not.
    """
    new_ids = new_token_ids(subject)
    size = size_of(subject.recipe, subject.model.config, new_token_ids=new_ids)
    work = work_of(subject)
    if earlier is not None:
        return RunPlan(
            subject=subject,
            size=size,
            work=work,
            disk=disk_of(subject, size, work),
            memory=None,
            samples=samples_of(subject, rows),
            warnings=warnings_on(subject, work),
            earlier=earlier,
        )
    ear, traced = Ear(), traced_work(subject, new_ids)
    memory, note = _memory(subject, traced, ear)
    disk = disk_of(subject, size, work)
    remedy, fits = None, subject.machine.verdict(memory) != "does not fit"
    if not fits:
        remedy = find_remedy(_known(case_of(subject, new_ids), memory, ear, traced))
    duration, late = None, ""
    if memory is not None and (fits or not subject.machine.here):  # what cannot run is not measured
        duration, late = _tried("time", lambda: duration_of(subject, traced, ear, size, disk))
    serving, unserved = _serving(subject)
    return RunPlan(
        subject=subject,
        size=size,
        work=work,
        disk=disk,
        memory=memory,
        unknown=tuple(text for text in (note, late, unserved) if text),
        duration=duration,
        serving=serving,
        remedy=remedy,
        samples=samples_of(subject, rows),
        warnings=warnings_on(subject, work),
    )


def holds_still(plan: Mapping[str, Any], machine: Machine) -> bool:
    """Whether what plan.json predicts is of this machine, and the run works on it."""
    now, then = machine.as_dict(), plan["machine"]
    passing = {"free_bytes", "base_bytes"}
    return bool(plan["works"]) and all(then.get(key) == now[key] for key in now.keys() - passing)


def refuse(plan: RunPlan) -> None:
    """Raise PlanRefused, with the remedy, for a run that cannot work."""
    full = plan.disk.full
    if full is not None and plan.subject.machine.here:
        raise PlanRefused(
            f"{full.folder}: the run needs {bytes_text(full.needed_bytes)} of disk and "
            f"{bytes_text(full.free_bytes)} are free",
            hint="free space, set output_dir to another disk, or lower train.keep_checkpoints "
            f"(each checkpoint takes {bytes_text(plan.disk.checkpoint_bytes)})",
        )
    if plan.verdict == "does not fit":
        raise memory_refusal(plan)


def memory_refusal(plan: RunPlan) -> PlanRefused:
    machine, memory = plan.subject.machine, plan.memory
    assert memory is not None
    return PlanRefused(
        f"the run needs {bytes_text(machine.needed_bytes(memory))} of memory ({memory.binding.phase}), and "
        f"{machine.name} has {bytes_text(machine.capacity_bytes)}",
        hint=remedy_text(plan.remedy),
    )


def remedy_text(remedy: Remedy | None) -> str:
    """The changes that make a plan fit, as a difference of the recipe and as arguments."""
    if remedy is None or remedy.fix is None:
        least = remedy.least if remedy is not None else None
        told = "" if least is None else f" (the least: {least.text()})"
        return f"no change of the recipe makes it fit{told}: {_elsewhere(remedy)}"
    fix = remedy.fix
    arguments = shlex.join(part for text in fix.set_arguments for part in ("--set", text))
    return f"this fits ({fix.text()}):\n{fix.diff()}\nor: {arguments}"


def _elsewhere(remedy: Remedy | None) -> str:
    card, model = (remedy.card, remedy.model) if remedy is not None else (None, None)
    found = [f"with it the smallest card is {card}"] if card else []
    found += [f"the largest known model that fits here is {model}"] if model else []
    return "; ".join(found) or "take a smaller model or a larger machine"


def case_of(subject: Subject, new_ids: tuple[int, ...] = ()) -> Case:
    """The subject as the search for settings takes it."""
    return Case(
        recipe=subject.written,
        machine=subject.machine,
        config=subject.model.config,
        work=traced_work(subject, new_ids),
        data=subject.data,
        gpus=subject.gpus,
    )


def _known(case: Case, memory: MemoryPlan | None, ear: Ear, traced: Work) -> Case:
    """The case, in which the recipe as it stands need not be traced again."""
    if memory is not None:
        key = target_of(case).resolve(case.recipe).model_dump_json()
        case.traces[key] = Traced(memory=memory, ear=ear, work=traced)
    return case


def _memory(subject: Subject, traced: Work, ear: Ear) -> tuple[MemoryPlan | None, str]:
    """The memory plan, or why there is none: an architecture may do what fake tensors cannot."""
    machine = subject.machine
    more: dict[str, Any] = {} if machine.context_bytes is None else {"context_bytes": machine.context_bytes}

    def found() -> MemoryPlan:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about shapes without numbers
            return plan_memory(
                subject.recipe,
                subject.model.config,
                traced,
                device=machine.device,
                exact=False,
                listen=ear,
                **more,
            )

    return _tried("memory", found)


def _tried(what: str, predict: Callable[[], T]) -> tuple[T | None, str]:
    """A prediction, or why there is none: a plan must not stop what would work."""
    try:
        return predict(), ""
    except TunesmithError:
        raise
    except Exception as error:
        if os.environ.get("TUNESMITH_DEBUG"):
            raise
        why = (str(error).strip().splitlines() or [""])[0][:200]
        return None, f"{what} is not predicted: the step cannot be followed ({type(error).__name__}: {why})"


def _serving(subject: Subject) -> tuple[ServingPlan | None, str]:
    """What the recipe's engine serves where the run was planned for, or why that is not known."""
    machine, serve, method = subject.machine, subject.recipe.serve, subject.recipe.method
    apart = method.type != "full" and not serve.merge
    try:
        found = plan_serving(
            subject.model.config,
            total_bytes=machine.capacity_bytes,
            card=machine.card,
            device=machine.device,
            context_bytes=machine.context_bytes or 0,
            precision=serve.weights or serve.precision,
            max_length=serve.max_length,
            requests=serve.max_concurrent,
            engine="local" if serve.engine == "auto" else serve.engine,
            adapters=int(apart),
            adapter_rank=method.rank,
        )
    except UserError as error:
        return None, f"serving is not planned: {error.what}"
    except AttributeError as error:  # a configuration of another shape
        return None, f"serving is not planned: {error}"
    return found, ""


def duration_of(subject: Subject, traced: Work, ear: Ear, size: Size, disk: DiskPlan) -> TimePlan:
    """Of the run; where its rows are not known, of steps of the largest micro-batches."""
    machine, recipe, data = subject.machine, subject.recipe, subject.data
    saves: dict[str, Any] = {
        "save_bytes": disk.checkpoint_bytes,
        "start_bytes": size.base_parameters * published_bytes(subject.model),
    }
    if data is None:
        count = recipe.train.grad_accumulation
        steps = recipe.train.max_steps or 1
        batch = traced.batch
        run = Run(
            recipe=resolve_steps(recipe, steps),
            steps=steps,
            batches=lambda step: [batch] * count,
            tokens=steps * count * batch.num_tokens,
            labels=steps * count * batch.num_supervised,
            **saves,
        )
    else:
        totals = data.steps.totals()
        run = Run(
            recipe=recipe,
            steps=data.steps.total_steps,
            batches=data.steps,
            tokens=totals.tokens,
            labels=totals.supervised,
            eval_batches=data.eval_batches,
            **saves,
        )
    return time_of(
        run,
        traced,
        ear,
        subject.model.config,
        device=machine.device,
        card=None if machine.here else machine.card,
        folder=subject.run if machine.here and subject.run.is_dir() else None,
        price_per_hour=subject.price_per_hour,
        measured=subject.measured,
    )
