"""From a recipe file to its plan: for this machine, or for cards that are named."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tunesmith.core.errors import UserError
from tunesmith.model.config import context_length
from tunesmith.model.tokenizer import load_tokenizer
from tunesmith.plan.auto import Choice, has_auto
from tunesmith.plan.changes import applied
from tunesmith.recipe.load import load_recipe
from tunesmith.recipe.resolve import resolve, resolve_steps
from tunesmith.recipe.schema import Recipe
from tunesmith.train.checkpoint import folder_bytes
from tunesmith.train.engines import check_engine
from tunesmith.train.ranks import Ranks
from tunesmith.workflows.plan import RunPlan, case_of, make_plan
from tunesmith.workflows.plan_fit import Case, resolve_auto
from tunesmith.workflows.plan_machine import Machine, facts_on, find_machine
from tunesmith.workflows.plan_model import PlannedModel, find_model
from tunesmith.workflows.plan_steps import timed_steps
from tunesmith.workflows.plan_subject import Subject, new_token_ids
from tunesmith.workflows.run_facts import run_folder
from tunesmith.workflows.train_data import open_data

NO_TOKENIZER = (
    "the model's tokenizer is not here, so rows and tokens are not counted: memory is that of the largest "
    "batch that the recipe allows"
)


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """gpu: name of the card to plan for, None: this machine; gpus: how many; price_per_hour: of the machine;
    real_steps: to be trained for their time; rows: samples to show; model: in place of the recipe's."""

    gpu: str | None = None
    gpus: int | None = None
    price_per_hour: float | None = None
    real_steps: int = 0
    rows: int = 2
    model: str | None = None


def plan_recipe(recipe_path: Path, overrides: list[str], options: PlanOptions | None = None) -> RunPlan:
    """The plan of a recipe. Fetches what lies beside a hub model's weights, and tokenises rows into the
    cache; writes nothing else. Raises UserError for what is wrong with recipe, model or data."""
    options = options or PlanOptions()
    subject = find_subject(recipe_path, overrides, options)
    if options.real_steps:
        subject = replace(subject, measured=tuple(timed_steps(subject, options.real_steps)))
    return make_plan(subject, rows=options.rows)


def find_case(recipe_path: Path, overrides: list[str], options: PlanOptions) -> Case:
    """The recipe as other methods are tried on it."""
    subject = find_subject(recipe_path, overrides, options)
    return case_of(subject, new_token_ids(subject))


def find_subject(recipe_path: Path, overrides: list[str], options: PlanOptions) -> Subject:
    """What there is to plan, for the machine of the options."""
    recipe, notes = _with_options(load_recipe(recipe_path, overrides), options)
    machine = find_machine(recipe, options.gpu, options.gpus)
    subject = open_subject(recipe, run_folder(recipe, recipe_path).path, machine)
    return replace(subject, price_per_hour=options.price_per_hour, notes=(*notes, *subject.notes))


def _with_options(recipe: Recipe, options: PlanOptions) -> tuple[Recipe, list[str]]:
    """The recipe as the options change it, and what to know of that."""
    notes = []
    if options.model is not None:
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": options.model})})
    hardware: dict[str, Any] = {}
    if options.gpu is not None:
        if recipe.hardware.device == "cpu":
            notes.append(f"hardware.device: cpu is not used: the plan is for --gpu {options.gpu}")
        hardware = {"device": "cuda"}
    if options.gpus is not None:
        if recipe.hardware.processes not in ("auto", options.gpus):
            notes.append(
                f"hardware.processes: {recipe.hardware.processes} is not used, --gpus {options.gpus} is"
            )
        hardware["processes"] = options.gpus
    return recipe.model_copy(update={"hardware": recipe.hardware.model_copy(update=hardware)}), notes


def open_subject(recipe: Recipe, run: Path, machine: Machine) -> Subject:
    """Resolve the recipe for the machine, and count its rows where there is a tokenizer."""
    model = find_model(recipe.model)
    choice = settled(recipe, model, machine)
    resolved = resolved_on(choice.recipe, model, machine)
    tokenizer = tokenizer_of(resolved, model)
    data = None if tokenizer is None else open_data(resolved, tokenizer)
    steps = resolved.train.max_steps if data is None else data.steps.total_steps
    return Subject(
        recipe=resolved if steps is None else resolve_steps(resolved, steps),
        written=choice.recipe,
        run=run,
        model=model,
        machine=machine,
        data=data,
        tokenizer=tokenizer,
        gpus=machine.processes,
        present_bytes=folder_bytes(run / "checkpoints"),
        notes=tuple(note for note in (model.note, *choice.reasons) if note)
        + (() if tokenizer is not None else (NO_TOKENIZER,)),
    )


def resolved_on(recipe: Recipe, model: PlannedModel, machine: Machine) -> Recipe:
    """Without "auto", but for what depends on the steps. Raises UserError for settings that cannot work."""
    resolved = resolve(recipe, facts_on(machine, recipe, context_length(model.config)))
    count = resolved.hardware.processes
    assert count != "auto"
    check_engine(resolved, Ranks(size=count, local_size=count))
    return resolved


def settled(recipe: Recipe, model: PlannedModel, machine: Machine) -> Choice:
    """The recipe with what only a memory plan can choose: the method and the micro-batch, if "auto"."""
    if not has_auto(recipe):
        return Choice(recipe=recipe)
    plain: dict[str, Any] = {"train.micro_batch_size": 1} if recipe.train.micro_batch_size == "auto" else {}
    plain |= {"method.type": "lora"} if recipe.method.type == "auto" else {}
    resolved = resolved_on(applied(recipe, plain), model, machine)
    tokenizer = tokenizer_of(resolved, model)
    subject = Subject(
        recipe=resolved,
        written=recipe,
        run=Path(),
        model=model,
        machine=machine,
        data=None if tokenizer is None else open_data(resolved, tokenizer),
        tokenizer=tokenizer,
        gpus=machine.processes,
    )
    return resolve_auto(case_of(subject, new_token_ids(subject)))


def tokenizer_of(recipe: Recipe, model: PlannedModel) -> Any:
    """None where the model has none. Raises UserError for new tokens without one."""
    if model.tokenizer is None:
        if recipe.model.new_tokens:
            raise UserError(
                f"model.new_tokens: {model.name} has no tokenizer to add them to",
                hint="copy the model's tokenizer files into its folder",
            )
        return None
    template = Path(recipe.model.chat_template) if recipe.model.chat_template else None
    return load_tokenizer(
        model.tokenizer,
        chat_template=template,
        trust_remote_code=recipe.model.trust_remote_code,
        new_tokens=recipe.model.new_tokens,
    )
