"""Who is compared, and the environments they run in."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.core import proc
from tunesmith.core.errors import UserError
from tunesmith.core.progress import say
from tunesmith.workflows.shipped import shipped

RUNNERS = "bench/train"
OURS = "tunesmith"
REFERENCE = "plain"


@dataclass(frozen=True)
class Contender:
    """env: the environment's name, None for the one that runs this; precision: fixed, or None for the
    benchmark's; options: for the runner; gpu: runs on a GPU only."""

    what: str
    script: str
    env: str | None = None
    packed: bool = False
    precision: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    gpu: bool = False

    @property
    def runner(self) -> Path:
        return shipped(f"{RUNNERS}/{self.script}")


REFERENCE_LOOP = Contender(
    "transformers and peft in fp32, padded: the reference", "run_plain.py", precision="fp32"
)
PEERS = {
    REFERENCE: Contender("transformers and peft, padded, all logits", "run_plain.py"),
    "trl": Contender("TRL's SFTTrainer, padded", "run_trl.py", "trl"),
    "trl-packed": Contender("TRL's SFTTrainer, padding-free", "run_trl.py", "trl", packed=True),
    "llamafactory": Contender("LLaMA-Factory, padded", "run_llamafactory.py", "llamafactory"),
    "llamafactory-packed": Contender(
        "LLaMA-Factory, neat packing", "run_llamafactory.py", "llamafactory", packed=True
    ),
    "torchtune": Contender("torchtune, padded", "run_torchtune.py", "torchtune"),
    "torchtune-packed": Contender("torchtune, packed", "run_torchtune.py", "torchtune", packed=True),
    "xtuner": Contender("xtuner 0.1, padded", "run_xtuner.py", "xtuner"),
    "trl-liger": Contender(
        "TRL with Liger's kernels", "run_trl.py", "trl", packed=True, options={"liger": True}, gpu=True
    ),
    "unsloth": Contender("Unsloth", "run_unsloth.py", "unsloth", gpu=True),
}  # fmt: skip


def peer(name: str) -> Contender:
    """Raises UserError for a name that is not in the table."""
    if name not in PEERS:
        raise UserError(f"--peer {name}: there is no such peer", hint=f"peers are {', '.join(PEERS)}")
    return PEERS[name]


def python_of(contender: Contender, name: str, envs: Path, *, install: bool) -> str:
    """The Python that runs a contender. Raises UserError when its environment is missing."""
    if contender.env is None:
        return sys.executable
    folder = envs / contender.env
    python = folder / "bin" / "python"
    if not python.exists() and install:
        make_environment(folder, requirements(contender.env))
    if not python.exists():
        raise UserError(
            f"--peer {name}: its environment {folder} is not there",
            hint=f"--install makes it from {requirements(contender.env)}; --envs names another folder",
        )
    return str(python)


def requirements(env: str) -> Path:
    return shipped(f"{RUNNERS}/requirements-{env}.txt")


def make_environment(folder: Path, wanted: Path) -> None:
    """A virtual environment with what the file names; `# python: 3.10` in it asks for that Python."""
    version = next(
        (
            line.split(":")[1].strip()
            for line in wanted.read_text().splitlines()
            if line.startswith("# python:")
        ),
        None,
    )
    python = sys.executable if version is None else f"python{version}"
    say(f"making {folder} from {wanted.name}; this can take minutes")
    proc.run([python, "-m", "venv", str(folder)])
    done = proc.show([str(folder / "bin" / "python"), "-m", "pip", "install", "-q", "-r", str(wanted)])
    if done:
        raise UserError(
            f"{folder}: pip ended with code {done}", hint=f"see its messages above; the file is {wanted}"
        )
