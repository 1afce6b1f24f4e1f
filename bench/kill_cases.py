"""What `bench.kills` trains: the recipes, their rows, a tiny model, and how the command is started."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from bench.kill_phases import Duties, Running

DUTIES = Duties(evals=4, samples=8, saves=3, steps=24)
TRAIN = {"max_steps": DUTIES.steps, "micro_batch_size": 2, "grad_accumulation": 2, "lr": 1e-3}
LORA = {"type": "lora", "rank": 4, "dropout": 0.1}
FULL = {"type": "full"}
DPO = {"objective": {"type": "dpo"}}
DDP = {"parallel": {"engine": "ddp"}, "hardware": {"device": "cpu", "threads": 1, "processes": 2}}
CASES: dict[str, dict[str, Any]] = {
    "full": {"method": FULL},
    "lora": {"method": LORA},
    "dora": {"method": LORA | {"dora": True}},
    "qlora": {"method": LORA | {"type": "qlora"}},
    "smallest": {
        "method": FULL,
        "train": {"memory": "smallest", "max_grad_norm": None, "grad_accumulation": 1},
    },
    "dpo": {"method": LORA} | DPO,
    "dpo-full": {"method": FULL} | DPO,
    "ddp-full": {"method": FULL} | DDP,
    "ddp-lora": {"method": LORA} | DDP,
    "fsdp-full": {"method": FULL} | DDP | {"parallel": {"engine": "fsdp"}},
    "pool": {"method": LORA, "data": {"workers": 2}},
}
# Files from this size on are tokenised in processes: reached by a column that nothing reads.
POOL_BYTES = 33 * 2**20
ROWS = 400


# -- recipes -----------------------------------------------------------------------------------------------


def write_recipe(name: str, folder: Path, model: Path) -> Path:
    """The recipe of a case and its rows, in a new folder; the same rows whatever the seed of the kills."""
    folder.mkdir()
    sections, draw = CASES[name], random.Random(name)
    rows = folder / "rows.jsonl"
    padding = {"unread": "x" * (POOL_BYTES // ROWS)} if name == "pool" else {}
    with rows.open("w") as file:
        for _ in range(ROWS):
            file.write(json.dumps(row(draw, "objective" in sections) | padding) + "\n")
    recipe: dict[str, Any] = {
        "model": {"path": str(model)},
        "data": {"sources": [{"path": str(rows)}], "max_length": 192, "eval_fraction": 0.1},
        "eval": {"every": DUTIES.evals, "max_rows": 12},
        "samples": {"every": DUTIES.samples, "prompts": ["Add 1 and 2.", "Add 3."], "max_new_tokens": 24},
        "hardware": {"device": "cpu", "threads": 1},
        "train": {"precision": "fp32", "save_every": DUTIES.saves} | TRAIN,
        "output_dir": str(folder / "runs"),
    }
    for key, section in sections.items():
        recipe[key] = recipe.get(key, {}) | section
    if sections.get("train", {}).get("memory"):
        del recipe["train"]["precision"]
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe, indent=1))  # JSON is YAML
    return path


def row(draw: random.Random, preference: bool) -> dict[str, Any]:
    numbers = [str(draw.randint(0, 99)) for _ in range(draw.randint(2, 12))]
    question = f"Add {' and '.join(numbers)}."
    answer, worse = " ".join(numbers[: draw.randint(1, 6)]), " ".join(reversed(numbers))
    if preference:
        return {"prompt": question, "chosen": answer, "rejected": worse}
    said = {"role": "user", "content": question}, {"role": "assistant", "content": answer}
    return {"messages": list(said)}


def tiny_model(folder: Path) -> Path:
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


# -- processes ---------------------------------------------------------------------------------------------


def begin(args: Sequence[str], log: Path, env: Mapping[str, str], *, cold: bool) -> Running:
    """Start `tunesmith ARGS` as the leader of a session of its own: what it starts is known by that.

    cold: a program of its own; else a fork of this process, which has loaded the libraries.
    """
    with log.open("ab") as out:
        if not cold:
            return Forked(args, out=out, errors=out, env=env, leads=True)
        command = [sys.executable, "-m", "tunesmith", *args]
        return subprocess.Popen(command, stdout=out, stderr=out, env=env, start_new_session=True)


class Forked:
    """`tunesmith ARGS` in a fork of this process; as much of subprocess.Popen as its callers use."""

    def __init__(
        self,
        args: Sequence[str],
        *,
        out: IO[bytes],
        errors: IO[bytes] | None,
        env: Mapping[str, str],
        leads: bool = False,
    ) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            self._become(args, out, errors, env, leads)

    @staticmethod
    def _become(
        args: Sequence[str], out: IO[bytes], errors: IO[bytes] | None, env: Mapping[str, str], leads: bool
    ) -> None:
        code = 70
        try:
            if leads:
                os.setsid()
            os.dup2(out.fileno(), 1)
            if errors is not None:
                os.dup2(errors.fileno(), 2)
            _as_if_new(env)
            import torch

            # A fork's first use of torch's threads makes them anew; two threads at once would find none.
            torch.set_num_threads(torch.get_num_threads())
            from tunesmith.cli.main import main
            from tunesmith.workflows import launch

            vars(launch)["spawn"] = spawn_forked
            main(list(args))
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
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
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 600)
            time.sleep(0.002)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _as_if_new(env: Mapping[str, str]) -> None:
    """What a new program would find: its environment, the default handlers."""
    os.environ.clear()
    os.environ.update(env)
    tempfile.tempdir = None
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def spawn_forked(
    args: Sequence[str], *, out: IO[bytes], errors: IO[bytes] | None, env: Mapping[str, str]
) -> Forked:
    """In place of `core.proc.spawn` in a forked launcher: [python, -m, tunesmith, ...] is forked too."""
    return Forked(args[3:], out=out, errors=errors, env=env)


def session_of(pid: int) -> list[int]:
    """The living processes of the session that `pid` leads."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:  # it has ended
            continue
        if int(session) == pid and state not in "ZX":
            found.append(int(path.parent.name))
    return sorted(found)
