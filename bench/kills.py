"""Kill trainings at random instants, and compare what they come to with what was never killed.

    python -m bench.kills [--kills 200] [--seed 0] [--cases full,lora,ddp-lora] [--model FOLDER]

Every case trains one recipe once through; then runs of it are killed with SIGKILL, at any instant from the
first moment of the process on: while it loads, tokenises, trains, evaluates, saves or exports. In a case of
several processes all of them are killed, or the one that started them, or one of its workers. A run that has
got to its end must have the same losses, held-out losses, answers, weights, optimizer state and export,
bit for bit. No process may be left after a kill, and no temporary file after the next run's end. Ends with
code 1 if anything was not so.

Where a case has one process, it is forked from this one, which has loaded the libraries: it is the command
without its first seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

STEPS = 24
# After a kill everything must be gone within a minute.
GONE_S = 60.0
TRAIN = {"max_steps": STEPS, "micro_batch_size": 2, "grad_accumulation": 2, "lr": 1e-3, "save_every": 3}
LORA = {"type": "lora", "rank": 4, "dropout": 0.1}
DDP = {"parallel": {"engine": "ddp"}, "hardware": {"device": "cpu", "threads": 1, "processes": 2}}
CASES: dict[str, dict[str, Any]] = {
    "full": {"method": {"type": "full"}},
    "lora": {"method": LORA},
    "dora": {"method": LORA | {"dora": True}},
    "qlora": {"method": LORA | {"type": "qlora"}},
    "smallest": {
        "method": {"type": "full"},
        "train": {"memory": "smallest", "max_grad_norm": None, "grad_accumulation": 1},
    },
    "dpo": {"method": LORA, "objective": {"type": "dpo"}},
    "dpo-full": {"method": {"type": "full"}, "objective": {"type": "dpo"}},
    "ddp-full": {"method": {"type": "full"}} | DDP,
    "ddp-lora": {"method": LORA} | DDP,
    "fsdp-full": {"method": {"type": "full"}} | DDP | {"parallel": {"engine": "fsdp"}},
}


class Running(Protocol):
    pid: int

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def kill(self) -> None: ...


class Forked:
    """`tunesmith ARGS` in a fork of this process; a subset of subprocess.Popen."""

    def __init__(self, args: list[str], log: Path) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            self._become(args, log)

    @staticmethod
    def _become(args: list[str], log: Path) -> None:
        code = 70
        try:
            handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            from tunesmith.cli.main import main

            main(args)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        finally:
            os._exit(code)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        end = time.monotonic() + (timeout or 600)
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise TimeoutError(f"process {self.pid} did not end")
            time.sleep(0.005)
        return code

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


@dataclass
class Case:
    """One recipe, and what became of its kills."""

    name: str
    folder: Path
    recipe: Path
    draw: random.Random
    fell_into: Counter[str] = field(default_factory=Counter)
    finished: int = 0
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def several(self) -> bool:
        return self.name.startswith(("ddp", "fsdp"))

    @property
    def kills(self) -> int:
        return sum(self.fell_into.values())

    def begin(self, *args: str) -> Running:
        """Start `tunesmith ARGS`."""
        log = self.folder / "log"
        if not self.several:
            return Forked(list(args), log)
        with log.open("ab") as out:
            return subprocess.Popen([sys.executable, "-m", "tunesmith", *args], stdout=out, stderr=out)

    def train(self, name: str) -> Running:
        return self.begin("train", str(self.recipe), "--set", f"name={name}")

    def export(self, name: str) -> Running:
        return self.begin("export", str(self.folder / "runs" / name), "--to", "merged")


def main() -> int:
    args = arguments()
    import torch

    torch.set_num_threads(1)
    import tunesmith.workflows.export
    import tunesmith.workflows.train  # noqa: F401  # loaded once, for all forks

    with tempfile.TemporaryDirectory(prefix="kills-") as name:
        folder = Path(name)
        os.environ["TUNESMITH_CACHE"] = str(folder / "cache")
        model = args.model or tiny_model(folder / "model", folder / "cache")
        wanted = args.cases.split(",") if args.cases else list(CASES)
        share, more = divmod(args.kills, len(wanted))
        done = []
        for number, case_name in enumerate(wanted):
            case = make_case(case_name, folder / case_name, model, args.seed)
            began = time.perf_counter()
            torment(case, share + (number < more))
            case.seconds = time.perf_counter() - began
            print(row_of(case), file=sys.stderr, flush=True)
            done.append(case)
    return report(done)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", help=f"comma-separated, of: {', '.join(CASES)}")
    parser.add_argument("--model", type=Path, help="folder; default: a random model of two layers")
    return parser.parse_args()


# -- one case ----------------------------------------------------------------------------------------------


def torment(case: Case, kills: int) -> None:
    """Kill runs of the case until all kills are used, and compare each with the one that was left alone."""
    from tunesmith.workflows.verify import outcome

    began = time.perf_counter()
    expect(case, case.train("once").wait(), "once through")
    spent = time.perf_counter() - began
    expect(case, case.export("once").wait(), "export")
    from tunesmith.core.run_folder import RunFolder

    runs = case.folder / "runs"
    wanted = outcome(RunFolder(runs / "once")), exported(runs / "once")
    while case.kills < kills and not case.faults:
        name = f"killed-{case.finished}"
        finish_under_fire(case, name, kills, spent)
        case.finished += 1
        if (outcome(RunFolder(runs / name)), exported(runs / name)) != wanted:
            case.faults.append(f"{name} is not the run that was left alone")
        case.faults += [f"left: {path}" for path in leftovers(case.folder)]
        shutil.rmtree(runs / name)


def finish_under_fire(case: Case, name: str, kills: int, spent: float) -> None:
    """Train and export a run, killed now and then on its way."""
    for start, longest, chance in ((case.train, spent, 0.9), (case.export, spent / 8, 0.4)):
        while True:
            process = start(name)
            allowed = case.kills < kills and case.draw.random() < chance
            if allowed and strike(case, process, name, case.draw.uniform(0, longest)):
                continue
            if expect(case, process.wait(), f"{name} ended"):
                break
            return


def strike(case: Case, process: Running, name: str, after_s: float) -> bool:
    """Kill a process so long after its start. False if it had ended by then."""
    from tunesmith.workflows.verify import descendants, is_alive, kill_all

    try:
        process.wait(after_s)
        return False
    except (TimeoutError, subprocess.TimeoutExpired):
        pass
    phase, family = phase_of(case.folder / "runs" / name), [process.pid, *descendants(process.pid)]
    victim = case.draw.choice(["all", "first", "worker"]) if len(family) > 1 else "all"
    if victim == "all":
        kill_all(process)  # type: ignore[arg-type]
    elif victim == "first":
        process.kill()
    else:
        os.kill(case.draw.choice(family[1:]), signal.SIGKILL)
    process.wait(GONE_S)
    end = time.monotonic() + GONE_S
    while left := [pid for pid in family[1:] if is_alive(pid)]:
        if time.monotonic() > end:
            case.faults.append(f"processes left after a kill ({victim}): {left}")
            break
        time.sleep(0.05)
    case.fell_into[phase] += 1
    return True


def expect(case: Case, code: int, what: str) -> bool:
    if code:
        tail = (case.folder / "log").read_text(errors="replace").splitlines()[-12:]
        case.faults.append(f"{what}: exit code {code}\n" + "\n".join(tail))
    return code == 0


def phase_of(run: Path) -> str:
    """What a run is doing, by its files."""
    from tunesmith.core.events import read_events

    last = None
    for event in read_events(run / "events.jsonl"):
        last = event
    if any((run / "checkpoints").glob(".*")):
        return "save"
    if last is None or last["event"] in ("start", "data", "plan", "resume", "warning"):
        return "start"
    if last["event"] == "end":
        return "export" if last.get("status") == "finished" else "start"
    evaluates = last["event"] == "step" and last["step"] % 4 == 0
    return "evaluation" if evaluates else "steps"


def exported(run: Path) -> dict[str, str]:
    """File: hash of what was exported, but for the card and the manifest, which have paths and times."""
    from tunesmith.core.paths import sha256_file

    files = sorted((run / "export").rglob("*.safetensors"))
    return {str(path.relative_to(run)): sha256_file(path) for path in files}


def leftovers(folder: Path) -> list[Path]:
    """Temporary files of the case's runs and of the cache."""
    places = [folder / "runs", folder.parent / "cache"]
    found = [path for place in places for path in place.rglob(".*") if not path.name.endswith(".lock")]
    return found


# -- what is trained ---------------------------------------------------------------------------------------


def make_case(name: str, folder: Path, model: Path, seed: int) -> Case:
    folder.mkdir()
    draw = random.Random(f"{seed} {name}")
    sections = CASES[name]
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row(draw, "objective" in sections)) + "\n" for _ in range(48)))
    recipe: dict[str, Any] = {
        "model": {"path": str(model)},
        "data": {"sources": [{"path": str(rows)}], "max_length": 192, "eval_fraction": 0.1},
        "eval": {"every": 4},
        "samples": {"every": 8, "prompts": ["Add 1 and 2."], "max_new_tokens": 4},
        "hardware": {"device": "cpu", "threads": 1},
        "output_dir": str(folder / "runs"),
    }
    for key, section in sections.items():
        recipe[key] = recipe.get(key, {}) | section
    recipe["train"] = {"precision": "fp32"} | TRAIN | sections.get("train", {})
    if sections.get("train", {}).get("memory"):
        del recipe["train"]["precision"]
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe, indent=1))  # JSON is YAML
    return Case(name, folder, path, draw)


def row(draw: random.Random, preference: bool) -> dict[str, Any]:
    numbers = [str(draw.randint(0, 99)) for _ in range(draw.randint(2, 20))]
    question = f"Add {' and '.join(numbers)}."
    answer, worse = " ".join(numbers[: draw.randint(1, 10)]), " ".join(reversed(numbers))
    if preference:
        return {"prompt": question, "chosen": answer, "rejected": worse}
    said = {"role": "user", "content": question}, {"role": "assistant", "content": answer}
    return {"messages": list(said)}


def tiny_model(folder: Path, cache: Path) -> Path:
    """A random Llama of two layers with the tokenizer of the built-in model."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from tunesmith.hub.sources import resolve_model

    given = os.environ.get("TUNESMITH_TEST_SMOL")
    source = Path(given) if given else resolve_model("smollm2-135m-instruct").folder
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 49152}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "tie_word_embeddings": True}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, **tokens)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


# -- the table ---------------------------------------------------------------------------------------------

PHASES = ("start", "steps", "evaluation", "save", "export")
HEAD = ("case", "kills", *PHASES, "runs", "exact", "minutes")


def row_of(case: Case) -> str:
    cells = [case.name, case.kills, *(case.fell_into[phase] for phase in PHASES)]
    return line([*cells, case.finished, "NO" if case.faults else "yes", f"{case.seconds / 60:.1f}"])


def line(cells: list[Any] | tuple[str, ...]) -> str:
    return "| " + " | ".join(f"{cell!s:>10}" for cell in cells) + " |"


def report(cases: list[Case]) -> int:
    print(line(HEAD))
    print("|" + (" " + "-" * 10 + " |") * len(HEAD))
    for case in cases:
        print(row_of(case))
    kills, runs = sum(case.kills for case in cases), sum(case.finished for case in cases)
    faults = [f"{case.name}: {fault}" for case in cases for fault in case.faults]
    print(f"\n{kills} kills in {runs} runs; {len(faults) or 'no'} faults")
    print("\n".join(faults))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
