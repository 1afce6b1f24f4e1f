"""The servers that are compared: how each is started, and what is particular to it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tunesmith.core import proc
from tunesmith.core.errors import UserError
from tunesmith.core.net import free_port
from tunesmith.workflows.bench_peers import make_environment

HERE = Path(__file__).parent
OURS = "tunesmith"
MODEL = "bench"
CONTEXT = 512  # tokens of prompt and answer: every server gets room for this, times its clients
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


@dataclass(frozen=True)
class System:
    """One way to run a contender.

    commands: its processes in the order of their start; ready: the path that answers 200 when it is up; way:
    what it computes in, for the reader; model: its name there; ignore_eos: whether it knows that field.
    """

    commands: list[list[str]]
    ready: str
    way: str
    model: str = MODEL
    ignore_eos: bool = True
    env: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all have in common. folder: the model's; most: clients at the highest level; scratch: for files
    that a peer needs made once."""

    folder: Path
    precision: str
    threads: int
    most: int
    envs: Path
    install: bool = False
    llama_server: str | None = None
    gguf: str | None = None
    serve_args: tuple[str, ...] = ()

    @property
    def scratch(self) -> Path:
        return self.envs / "models"

    def program(self, env: str, name: str) -> str:
        """Of a peer's environment, which is made when it is missing and may be."""
        found = self.envs / env / "bin" / name
        if not found.exists() and self.install:
            make_environment(self.envs / env, HERE / f"requirements-{env}.txt")
        if not found.exists():
            raise UserError(f"{found} is not there", hint="--install makes the environment")
        return str(found)


def ours(setting: Setting, port: int, *more: str) -> list[System]:
    args = ["serve", str(setting.folder), "--port", str(port), "--model-name", MODEL]
    args += ["--threads", str(setting.threads), "--max-length", str(CONTEXT)]
    args += ["--max-concurrent", str(setting.most), "--weights", setting.precision, "--keys-file", "none"]
    way = " ".join([f"{setting.precision} weights", *more])
    return [System([[sys.executable, "-m", "tunesmith", *args, *setting.serve_args, *more]], "/ready", way)]


def transformers(setting: Setting, port: int) -> list[System]:
    """Cache and step as large as the load needs: left alone, they take most of the memory that is free."""
    program = setting.program("transformers", "transformers")
    args = ["serve", "--host", "127.0.0.1", "--port", str(port), "--continuous-batching"]
    args += ["--dtype", DTYPES[setting.precision], "--cb-max-batch-tokens", str(CONTEXT)]
    args += ["--cb-block-size", "32", "--cb-num-blocks", str((setting.most + 1) * CONTEXT // 32)]
    way = f"{setting.precision}, --continuous-batching, cache and step limited"
    return [System([[program, *args]], "/health", way, model=str(setting.folder), ignore_eos=False)]


def fastchat(setting: Setting, port: int) -> list[System]:
    python = setting.program("fastchat", "python")
    controller, worker = free_port(), free_port()
    told = f"http://127.0.0.1:{controller}"
    commands = [
        ["controller", "--port", str(controller)],
        [
            "model_worker", "--model-path", str(for_transformers_4(setting)), "--device", "cpu", "--dtype",
            DTYPES[setting.precision], "--controller-address", told, "--port", str(worker),
            "--worker-address", f"http://127.0.0.1:{worker}", "--model-names", MODEL,
            "--limit-worker-concurrency", str(setting.most),
        ],
        ["openai_api_server", "--controller-address", told, "--port", str(port)],
    ]  # fmt: skip
    started = [[python, "-m", f"fastchat.serve.{name}", *args] for name, *args in commands]
    env = {"LOGDIR": ""}  # no files where it is started
    return [System(started, "/v1/models", f"{setting.precision}, HF worker", ignore_eos=False, env=env)]


def for_transformers_4(setting: Setting) -> Path:
    """The model with rope_theta where transformers 4 looks for it: without, it silently takes another."""
    config = json.loads((setting.folder / "config.json").read_text())
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in config or "rope_theta" not in rope:
        return setting.folder
    made = setting.scratch / f"{setting.folder.name}-transformers4"
    made.mkdir(parents=True, exist_ok=True)
    for file in setting.folder.iterdir():
        link = made / file.name
        if file.name != "config.json" and not link.exists():
            link.symlink_to(file.absolute())
    changed = config | {"rope_theta": rope["rope_theta"], "torch_dtype": config.get("dtype")}
    (made / "config.json").write_text(json.dumps(changed, indent=1))
    return made


def vllm(setting: Setting, port: int) -> list[System]:
    """All cores compute (left alone it keeps one free), and its cache is what the load needs at most."""
    args = ["serve", str(setting.folder), "--host", "127.0.0.1", "--port", str(port)]
    args += ["--served-model-name", MODEL, "--dtype", DTYPES[setting.precision]]
    args += ["--max-model-len", str(CONTEXT), "--max-num-seqs", str(setting.most)]
    cores = sorted(os.sched_getaffinity(0))[: setting.threads]
    env = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_NO_USAGE_STATS": "1",
    }
    command = [setting.program("vllm", "vllm"), *args]
    return [
        System([command], "/health", f"{setting.precision}, compiled", env=env),
        System([[*command, "--enforce-eager"]], "/health", f"{setting.precision}, --enforce-eager", env=env),
    ]


def llamacpp(setting: Setting, port: int) -> list[System]:
    if not (setting.llama_server and setting.gguf):
        raise UserError("llamacpp: where is it?", hint="give --llama-server and --gguf")
    args = ["-m", setting.gguf, "--host", "127.0.0.1", "--port", str(port), "--alias", MODEL]
    args += ["-np", str(setting.most), "-c", str(CONTEXT * setting.most), "-t", str(setting.threads)]
    return [System([[setting.llama_server, *args]], "/health", Path(setting.gguf).name)]


def openvino(setting: Setting, port: int) -> list[System]:
    python = setting.program("openvino", "python")
    args = [str(openvino_export(setting)), "--port", str(port), "--threads", str(setting.threads)]
    command = [python, str(HERE / "openvino_server.py"), *args, "--most", str(setting.most)]
    return [System([command], "/health", "bf16 weights, our HTTP around it")]


def openvino_export(setting: Setting) -> Path:
    """In the number format of the model's own weights; made once."""
    made = setting.scratch / f"{setting.folder.name}-openvino"
    if not (made / "openvino_model.bin").exists():
        program = setting.program("openvino", "optimum-cli")
        args = ["export", "openvino", "--model", str(setting.folder)]
        proc.run([program, *args, "--task", "text-generation-with-past", str(made)], timeout_s=1200)
    return made


PEERS: dict[str, Callable[[Setting, int], list[System]]] = {
    "llamacpp": llamacpp,
    "openvino": openvino,
    "vllm": vllm,
    "transformers": transformers,
    "fastchat": fastchat,
}
SLOW = {"transformers", "fastchat"}
PACKAGES = {
    OURS: ("tunesmith", "torch", "transformers"),
    "openvino": ("openvino", "openvino-genai"),
    "vllm": ("vllm-cpu", "vllm", "torch"),
    "transformers": ("transformers", "torch"),
    "fastchat": ("fschat", "transformers", "torch"),
}


def versions(name: str, setting: Setting) -> dict[str, str]:
    """Of the packages that a contender is made of."""
    if name == "llamacpp":
        done = proc.run([setting.llama_server or "llama-server", "--version"], check=False, timeout_s=30)
        return {"llama.cpp": (done.stdout + done.stderr).strip().partition("\n")[0].removeprefix("version: ")}
    python = sys.executable if name == OURS else setting.program(name, "python")
    code = (
        "import json, sys\nfrom importlib.metadata import distributions\n"
        "names = {d.name: d.version for d in distributions()}\n"
        "print(json.dumps({n: names[n] for n in sys.argv[1:] if n in names}))"
    )
    found: dict[str, str] = json.loads(proc.run([python, "-c", code, *PACKAGES[name]]).stdout)
    return found
