"""The same rows, model and method by tunesmith and by its peers, each in a process of its own.

The token ids of every step are made once and handed to all, so that all compute the same losses; contenders
take turns, so that a machine that is busy for a while is busy for all of them.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from ruamel.yaml import YAML

from tunesmith.core.cpu import physical_cores
from tunesmith.core.errors import RunFailed, UserError
from tunesmith.core.paths import cache_dir, write_json, write_text
from tunesmith.core.progress import say
from tunesmith.core.run_folder import RunFolder
from tunesmith.data.prepare import prepare
from tunesmith.hub.sources import resolve_model
from tunesmith.model.hardware import pick_device, pick_training_precision
from tunesmith.model.tokenizer import load_tokenizer
from tunesmith.recipe.load import load_recipe
from tunesmith.recipe.schema import Recipe
from tunesmith.workflows.bench_flops import flops_per_token
from tunesmith.workflows.bench_measure import Measured, figures, watch
from tunesmith.workflows.bench_peers import OURS, REFERENCE_LOOP, Contender, peer, python_of
from tunesmith.workflows.bench_report import REFERENCE_RUN, curves_svg, summary, table
from tunesmith.workflows.bench_rows import alpaca_rows
from tunesmith.workflows.data import step_plan

METHODS = ("lora", "full")
PRECISIONS = ("auto", "fp32", "bf16")
LOG_LINES = 12


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What `tunesmith bench train` is asked for; see its --help."""

    model: str = "smollm2-135m-instruct"
    data: Path | None = None
    methods: tuple[str, ...] = METHODS
    peers: tuple[str, ...] = ()
    envs: Path | None = None
    install: bool = False
    rows: int = 72
    rows_per_step: int = 8
    max_length: int = 512
    rank: int = 8
    lr: float = 1e-4
    precision: str = "auto"
    device: str = "auto"
    threads: int | None = None
    repeat: int = 3
    reference: bool = True
    seed: int = 0
    output: Path = Path("bench-train")
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Bench:
    """The options worked out. pythons: contender -> its Python; work: for the runs, removed at the end."""

    options: BenchOptions
    contenders: dict[str, Contender]
    pythons: dict[str, str]
    model: Path
    rows: Path
    work: Path
    device: str
    precision: str
    threads: int


@dataclass(frozen=True)
class Steps:
    """One method's work: tokens [S] of every step, and the file with their rows for the runners."""

    method: str
    recipe: Path
    rows: Path
    tokens: list[int]


def bench_train(options: BenchOptions) -> dict[str, Any]:
    """Run everything; what was found, as plain values, also in `output`/results.json and curves.svg.

    Raises UserError for options that cannot be run, RunFailed when tunesmith itself fails. A peer that fails
    is told and left out.
    """
    bench = get_ready(options)
    runs: list[Measured] = []
    for method in options.methods:
        steps = steps_of(bench, method)
        runs += run_method(bench, steps)
    found = report(bench, runs)
    shutil.rmtree(bench.work)
    return found


def get_ready(options: BenchOptions) -> Bench:
    """Everything that can be wrong with the options is found here, before the first run."""
    check_options(options)
    place = pick_device(options.device)  # type: ignore[arg-type]
    contenders = {name: peer(name) for name in options.peers}
    for name, one in contenders.items():
        if one.gpu and place.type == "cpu":
            raise UserError(f"--peer {name}: runs on a GPU only", hint="leave it out on this machine")
    if options.reference:
        contenders[REFERENCE_RUN] = REFERENCE_LOOP
    envs = options.envs or cache_dir() / "bench"
    pythons = {name: python_of(one, name, envs, install=options.install) for name, one in contenders.items()}
    precision = pick_training_precision(options.precision, place)  # type: ignore[arg-type]
    work = options.output.absolute() / "work"
    if work.exists():
        shutil.rmtree(work)
    work.mkdir(parents=True)
    return Bench(
        options=options,
        contenders=contenders,
        pythons=pythons,
        model=resolve_model(options.model).folder,
        rows=(options.data or write_rows(work / "rows.json", options)).absolute(),
        work=work,
        device=place.type,
        precision=precision if precision in PRECISIONS else "fp32",
        threads=options.threads or physical_cores(),
    )


def check_options(options: BenchOptions) -> None:
    for method in options.methods:
        if method not in METHODS:
            raise UserError(f"--method {method}: cannot be compared", hint=f"take {' or '.join(METHODS)}")
    if options.precision not in PRECISIONS:
        raise UserError(
            f"--precision {options.precision}: is not one of the benchmark's", hint="take fp32 or bf16"
        )
    if options.device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {options.device}: is not a device", hint="take cpu or cuda")
    if options.rows < 2 * options.rows_per_step:
        raise UserError(
            f"--rows {options.rows}: makes fewer than two steps of {options.rows_per_step} rows",
            hint=f"take at least {2 * options.rows_per_step}: the first step warms up and is not counted",
        )
    if options.data is not None and not options.data.is_file():
        raise UserError(f"--data {options.data}: there is no such file", hint="check the path")


def write_rows(path: Path, options: BenchOptions) -> Path:
    """Made-up rows, some more than needed: those too long for max_length are left out."""
    count = options.rows + options.rows // 4 + 8
    write_text(path, json.dumps(list(alpaca_rows(count, options.seed))))
    return path


# -- the steps --------------------------------------------------------------------------------------------


def steps_of(bench: Bench, method: str) -> Steps:
    """The rows of every step as our recipe takes them, written down for the runners."""
    recipe_path = bench.work / f"{method}.yaml"
    out = io.StringIO()
    YAML(typ="safe", pure=True).dump(recipe_values(bench, method), out)
    write_text(recipe_path, out.getvalue())
    recipe = load_recipe(recipe_path, list(bench.options.overrides))
    chosen = chosen_rows(recipe, bench)
    path = bench.work / f"{method}-rows.json"
    write_text(path, json.dumps(chosen))
    tokens = [sum(len(row["input_ids"]) for row in step) for step in chosen]
    say(f"{method}: {len(tokens)} steps of {bench.options.rows_per_step} rows, {sum(tokens):,} tokens")
    return Steps(method, recipe_path, path, tokens)


def recipe_values(bench: Bench, method: str) -> dict[str, Any]:
    options = bench.options
    steps = options.rows // options.rows_per_step
    return {
        "model": {"path": str(bench.model)},
        "data": {
            "sources": [{"path": str(bench.rows)}],
            "max_length": options.max_length,
            "packing": False,
            "eval_fraction": 0.0,
        },
        "method": {"type": method} | ({"rank": options.rank} if method == "lora" else {}),
        "train": {
            "max_steps": steps,
            "micro_batch_size": options.rows_per_step,
            "lr": options.lr,
            "schedule": "constant",
            "warmup_ratio": 0.0,
            "precision": bench.precision,
            "save_every": steps,
            "keep_checkpoints": 1,
            "seed": options.seed,
        },
        "eval": {"every": 0},
        "hardware": {"device": bench.device, "threads": bench.threads},
        "output_dir": str(bench.work / "runs"),
    }


def chosen_rows(recipe: Recipe, bench: Bench) -> list[list[dict[str, list[int]]]]:
    """input_ids and labels of every row of every step, in the order that tunesmith trains them in."""
    prepared = prepare(
        recipe.data, load_tokenizer(resolve_model(recipe.model.path).tokenizer), cache_dir=cache_dir()
    )
    rows = bench.options.rows
    if len(prepared.train) < rows:
        raise UserError(
            f"{bench.rows}: only {len(prepared.train)} rows fit {bench.options.max_length} tokens",
            hint=f"--rows {rows}: take fewer, or a higher --max-length",
        )
    plan = step_plan(prepared, recipe.data, recipe.train, recipe.objective)
    found = []
    for step in range(plan.total_steps):
        batches = plan(step)
        found.append(
            [
                {"input_ids": batch.input_ids[a:b].tolist(), "labels": batch.labels[a:b].tolist()}
                for batch in batches
                for a, b in itertools.pairwise(batch.starts.tolist())
            ]
        )
    return found


# -- the runs ---------------------------------------------------------------------------------------------


def run_method(bench: Bench, steps: Steps) -> list[Measured]:
    """The reference once, then all contenders in turns."""
    names = [name for name in bench.contenders if name != REFERENCE_RUN]
    runs = [run_peer(bench, steps, REFERENCE_RUN, 0)] if bench.options.reference else []
    for number in range(bench.options.repeat):
        runs.append(run_ours(bench, steps, number))
        for name in names:
            if not any(run.failure for run in runs if run.contender == name):
                runs.append(run_peer(bench, steps, name, number))
    return runs


def run_ours(bench: Bench, steps: Steps, number: int) -> Measured:
    name = f"{steps.method}-{OURS}-{number + 1}"
    overrides = [f"name={name}", *bench.options.overrides]
    args = [sys.executable, "-m", "tunesmith", "train", str(steps.recipe)]
    args += [part for override in overrides for part in ("--set", override)]
    found = measured(bench, steps, OURS, number, args, RunFolder(bench.work / "runs" / name).events)
    shutil.rmtree(bench.work / "runs" / name, ignore_errors=True)
    if found.failure:
        raise RunFailed(f"tunesmith train failed: {found.failure}", hint=f"its log is {log_of(bench, name)}")
    return found


def run_peer(bench: Bench, steps: Steps, name: str, number: int) -> Measured:
    contender = bench.contenders[name]
    folder = bench.work / f"{steps.method}-{name}-{number + 1}"
    folder.mkdir()
    job = {
        "model": str(bench.model),
        "method": steps.method,
        "rank": bench.options.rank,
        "alpha": 2 * bench.options.rank,
        "lr": bench.options.lr,
        "precision": contender.precision or bench.precision,
        "device": bench.device,
        "threads": bench.threads,
        "seed": bench.options.seed,
        "packed": contender.packed,
        "options": contender.options,
        "folder": str(folder),
        "log": str(folder / "events.jsonl"),
        "rows": str(steps.rows),
    }
    write_json(folder / "job.json", job)
    args = [bench.pythons[name], str(contender.runner), str(folder / "job.json")]
    found = measured(bench, steps, name, number, args, folder / "events.jsonl")
    shutil.rmtree(folder)
    return found


def measured(bench: Bench, steps: Steps, name: str, number: int, args: list[str], events: Path) -> Measured:
    """One run and its figures; `failure` is set when it did not do its steps."""
    log = log_of(bench, f"{steps.method}-{name}-{number + 1}")
    log.parent.mkdir(exist_ok=True)
    log.unlink(missing_ok=True)
    usage = watch(args, log=log, env=environment(bench))
    what = f"{steps.method} {name} {number + 1}"
    try:
        if usage.code:
            raise ValueError(f"it ended with code {usage.code}")
        values = figures(usage, events, steps.tokens)
    except ValueError as error:
        tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
        say("\n".join([f"{what}: {error}; {log} ends with:", *tail]))
        return Measured(name, steps.method, number, failure=str(error))
    found = Measured(name, steps.method, number, **values)
    say(f"{what}: {found.tokens_per_s:,.0f} tokens/s, {found.peak_gib:.2f} GiB")
    return found


def environment(bench: Bench) -> dict[str, str]:
    """Every contender's: the same threads, no network, no GPU in a comparison on the CPU."""
    count = str(bench.threads)
    own = {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
    no_gpu = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"} if bench.device == "cpu" else {}
    return {**os.environ, **own, **no_gpu}


def log_of(bench: Bench, name: str) -> Path:
    return bench.options.output.absolute() / "logs" / f"{name}.log"


# -- what came --------------------------------------------------------------------------------------------


def report(bench: Bench, runs: list[Measured]) -> dict[str, Any]:
    flops = {m: flops_per_token(bench.model, m) for m in bench.options.methods}
    gpu = torch.cuda.get_device_name() if bench.device == "cuda" else None
    found = {
        "machine": {
            "cores": os.cpu_count(),
            "threads": bench.threads,
            "gpu": gpu,
            "load_1min": os.getloadavg()[0],
        },
        "work": {
            "model": bench.options.model,
            "rows": bench.options.rows,
            "rows_per_step": bench.options.rows_per_step,
            "max_length": bench.options.max_length,
            "rank": bench.options.rank,
            "precision": bench.precision,
            "flops_per_token": flops,
        },
        "methods": {
            m: summary([r for r in runs if r.method == m], flops[m], gpu) for m in bench.options.methods
        },
        "runs": [asdict(run) for run in runs],
    }
    found["table"] = table(found)
    write_json(bench.options.output / "results.json", found)
    write_text(bench.options.output / "curves.svg", curves_svg(found))
    say(f"results: {bench.options.output / 'results.json'}")
    return found
