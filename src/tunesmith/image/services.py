"""The containers as typed values: what each runs, sees and offers. `compose.py` writes them down as YAML.

Inside every container the folders lie below /workspace as they lie below the caller's folder, so that the
relative paths of a recipe mean the same on both sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal

from tunesmith.core.errors import UserError
from tunesmith.core.units import GIB

Gpus = Literal["cdi", "nvidia", "none"]
Ipc = Literal["private", "host"]

WORKSPACE = PurePosixPath("/workspace")
SECRETS = PurePosixPath("/run/secrets")
NAMES = ("lab", "train", "serve")
LAB_PORT = 8888
SERVE_PORT = 8000
SERVE_CLOSING_S = 7  # after the last of the running requests
NOTEBOOK = "quickstart.ipynb"
SHM_SHARE = 4
MAX_SHM_GIB = 64

# Taken over from the caller's environment when the containers start; never written into the file.
PASSED_ON = ("HF_ENDPOINT", "HF_HUB_OFFLINE", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")


@dataclass(frozen=True, kw_only=True)
class Mount:
    """A folder (or file) of the host at a place in the container. `name` says what it holds."""

    name: str
    source: Path
    target: PurePosixPath
    read_only: bool = False


@dataclass(frozen=True, kw_only=True)
class Secret:
    """A file of the host that only the container's user can read, at /run/secrets/NAME."""

    name: str
    file: Path

    @property
    def target(self) -> PurePosixPath:
        return SECRETS / self.name


@dataclass(frozen=True, kw_only=True)
class Health:
    """GET `path` on `port` inside the container must answer 200; it may take `start_s` seconds to begin."""

    port: int
    path: str
    start_s: int


@dataclass(frozen=True, kw_only=True)
class Port:
    """`bind`:`host` of the host leads to `container` inside."""

    bind: str
    host: int
    container: int


@dataclass(frozen=True, kw_only=True)
class Service:
    """One container. `grace_s`: seconds between SIGTERM and SIGKILL."""

    name: str
    about: str
    image: str
    command: tuple[str, ...]
    mounts: tuple[Mount, ...]
    port: Port | None = None
    health: Health | None = None
    environment: dict[str, str] = field(default_factory=dict)
    secrets: tuple[Secret, ...] = ()
    restart: Literal["no", "unless-stopped"] = "no"
    grace_s: int = 10


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the caller wants, and what the host has.

    Folders are absolute paths of the host. `recipe` is needed by train; `run` (a run folder, or a model's
    name) by serve. `serve_grace_s`: what serve gives running requests when it ends. `shm_gib`: shared memory
    of each container, else `shm_size_gib` of the host's memory.
    `host_network`: no network of their own; the programs inside then listen on `bind` themselves.
    """

    images: dict[str, str]
    models: Path
    data: Path
    runs: Path
    notebooks: Path
    secrets: Path
    home: Path
    uid: int
    gid: int
    memory_bytes: int
    gpus: Gpus = "none"
    selinux: bool = False
    recipe: Path | None = None
    run: str | None = None
    bind: str = "127.0.0.1"
    lab_port: int = LAB_PORT
    serve_port: int = SERVE_PORT
    serve_grace_s: float = 8.0
    lab_password: bool = False
    host_network: bool = False
    ipc: Ipc = "private"
    shm_gib: int | None = None

    def __post_init__(self) -> None:
        for name in ("lab_port", "serve_port"):
            if not 1 <= getattr(self, name) <= 65535:
                raise UserError(f"{name}: {getattr(self, name)} is not a TCP port", hint="take 1 to 65535")

    @property
    def shm(self) -> int:
        """GiB of shared memory."""
        return self.shm_gib or shm_size_gib(self.memory_bytes)


def shm_size_gib(memory_bytes: int) -> int:
    """Shared memory for a host: a quarter of its memory in whole GiB, at least 1 and at most 64.

    Docker's own 64 MiB kill data loader workers and NCCL with a bus error (pytorch issue 5040). It is a
    limit, not a reservation: what is not used costs nothing.
    """
    return max(1, min(MAX_SHM_GIB, memory_bytes // SHM_SHARE // GIB))


def make_services(names: Sequence[str], options: Options) -> list[Service]:
    """The services of these names, in the order lab, train, serve.

    Raises UserError for an unknown name, and for train without a recipe or serve without a run.
    """
    makers = {"lab": _lab, "train": _train, "serve": _serve}
    for name in names:
        if name not in makers:
            raise UserError(f"'{name}' is not a service", hint=f"take {', '.join(NAMES)}")
    return [makers[name](options) for name in NAMES if name in names]


def _lab(options: Options) -> Service:
    token = Secret(name="lab_token", file=options.secrets / "lab_token")
    password = Secret(name="lab_password.json", file=options.secrets / "lab_password.json")
    port = options.lab_port if options.host_network else LAB_PORT
    command = [
        *("python3", "-m", "jupyterlab", "--no-browser"),
        f"--ServerApp.ip={_inner_bind(options)}",
        f"--ServerApp.port={port}",
        "--ServerApp.port_retries=0",
        f"--ServerApp.root_dir={WORKSPACE}",
        f"--LabApp.default_url=/lab/tree/notebooks/{NOTEBOOK}",
        *([f"--config={password.target}"] if options.lab_password else []),
        *(["--allow-root"] if options.uid == 0 else []),
    ]
    home = Mount(name="home", source=options.home, target=WORKSPACE / ".home")
    notebooks = Mount(name="notebooks", source=options.notebooks, target=WORKSPACE / "notebooks")
    return Service(
        name="lab",
        about="JupyterLab; its token is the file secrets/lab_token",
        image=options.images["lab"],
        command=tuple(command),
        mounts=(notebooks, *_shared(options), home),
        port=_port(options, options.lab_port, LAB_PORT),
        health=Health(port=port, path="/api", start_s=60),
        environment=_environment(home=home.target) | {"JUPYTER_TOKEN_FILE": str(token.target)},
        secrets=(token, password) if options.lab_password else (token,),
        restart="unless-stopped",
    )


def _train(options: Options) -> Service:
    if options.recipe is None:
        raise UserError(
            "the service train has no recipe", hint="give --recipe FILE: what 'tunesmith train' takes"
        )
    mounts = _shared(options)
    recipe, more = _inside(options.recipe, mounts, options.recipe.name)
    return Service(
        name="train",
        about="one training run; starting it again resumes it where it stopped",
        image=options.images["train"],
        command=("tunesmith", "train", str(recipe)),
        mounts=(*mounts, *more),
        environment=_environment(),
        grace_s=120,
    )


def _serve(options: Options) -> Service:
    if options.run is None:
        raise UserError(
            "the service serve has no model", hint="give --run: a run folder, or what model.path takes"
        )
    mounts, model = _shared(options), options.run
    more: tuple[Mount, ...] = ()
    if Path(options.run).expanduser().exists():
        folder = Path(options.run).expanduser().absolute()
        place, more = _inside(folder, mounts, f"served/{folder.name}")
        model = str(place)
    key = Secret(name="api_key", file=options.secrets / "api_key")
    port = options.serve_port if options.host_network else SERVE_PORT
    command = ("tunesmith", "serve", model, "--host", _inner_bind(options), "--port", str(port))
    return Service(
        name="serve",
        about="the OpenAI-compatible API; its key is the file secrets/api_key",
        image=options.images["serve"],
        command=(*command, "--api-key-file", str(key.target)),
        mounts=(*mounts, *more),
        port=_port(options, options.serve_port, SERVE_PORT),
        # /ready, not /health: the latter answers 200 while the model is still loading.
        health=Health(port=port, path="/ready", start_s=600),
        environment=_environment(),
        secrets=(key,),
        restart="unless-stopped",
        grace_s=int(options.serve_grace_s) + SERVE_CLOSING_S,
    )


def _shared(options: Options) -> tuple[Mount, ...]:
    return (
        Mount(name="data", source=options.data, target=WORKSPACE / "data"),
        Mount(name="runs", source=options.runs, target=WORKSPACE / "runs"),
        Mount(name="models", source=options.models, target=WORKSPACE / "models"),
    )


def _environment(home: PurePosixPath = PurePosixPath("/tmp")) -> dict[str, str]:
    """Without HOME a uid that is not in the image's /etc/passwd would have '/', where it may not write."""
    models = WORKSPACE / "models"
    return {"HOME": str(home), "TUNESMITH_CACHE": str(models), "HF_HOME": str(models / "huggingface")}


def _inner_bind(options: Options) -> str:
    return options.bind if options.host_network else "0.0.0.0"


def _port(options: Options, host: int, container: int) -> Port | None:
    return None if options.host_network else Port(bind=options.bind, host=host, container=container)


def _inside(path: Path, mounts: tuple[Mount, ...], otherwise: str) -> tuple[PurePosixPath, tuple[Mount, ...]]:
    """Where `path` lies in the container, and the mount that it needs when no other one holds it."""
    path = path.expanduser().absolute()
    for mount in mounts:
        if path.is_relative_to(mount.source):
            return mount.target / path.relative_to(mount.source), ()
    target = WORKSPACE / otherwise
    return target, (Mount(name=path.name, source=path, target=target, read_only=True),)
