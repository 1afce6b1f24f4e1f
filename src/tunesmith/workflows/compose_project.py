"""The project folder (`.tunesmith`): compose file, secrets, and what must exist before containers start."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from tunesmith.core import proc
from tunesmith.core.errors import TunesmithError, UserError
from tunesmith.core.paths import cache_dir, write_text
from tunesmith.core.progress import say
from tunesmith.core.run_folder import RunFolder, is_run
from tunesmith.image.compose import Written, add_services, compose_yaml, same_service, written_services
from tunesmith.image.services import LAB_PORT, NAMES, SERVE_PORT, Gpus, Ipc, Options, make_services
from tunesmith.recipe.load import load_recipe
from tunesmith.recipe.serving import Serve

FOLDER = Path(".tunesmith")
IMAGES = {"lab": "tunesmith:train", "train": "tunesmith:train", "serve": "tunesmith:serve"}
HOOKS = ("nvidia-container-runtime-hook", "nvidia-cdi-hook")
SECRETS = "secrets"
DEVICE = Path("/dev/nvidiactl")
SELINUX = Path("/sys/fs/selinux/enforce")


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the caller asked for; None where nothing was said.

    user: `UID:GID`, else the caller (behind sudo: who called sudo). bind: the address that the ports are
    published on. `password`: JupyterLab's, needed for a bind address that other machines reach.
    """

    image: str | None = None
    serve_image: str | None = None
    models: Path | None = None
    data: Path | None = None
    runs: Path | None = None
    notebooks: Path | None = None
    recipe: Path | None = None
    run: str | None = None
    user: str | None = None
    bind: str | None = None
    lab_port: int | None = None
    serve_port: int | None = None
    gpus: Literal["auto", "cdi", "nvidia", "none"] | None = None
    host_network: bool | None = None
    ipc: Ipc | None = None
    shm_gib: int | None = None
    password: str | None = field(default=None, repr=False)

    @property
    def said(self) -> list[str]:
        """Names of the options that were given."""
        return [entry.name for entry in fields(self) if getattr(self, entry.name) is not None]


@dataclass(frozen=True)
class Project:
    """The folder that holds the compose file, `secrets/` and JupyterLab's home."""

    folder: Path

    @property
    def compose_file(self) -> Path:
        return self.folder / "compose.yaml"

    @property
    def secrets(self) -> Path:
        return self.folder / SECRETS

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def name(self) -> str:
        """Compose's project name: two folders of the same name are two projects."""
        near = re.sub(r"[^a-z0-9]+", "-", self.folder.parent.name.lower()).strip("-") or "root"
        return f"tunesmith-{near[:30]}-{hashlib.sha256(str(self.folder).encode()).hexdigest()[:6]}"

    def services(self) -> dict[str, Written]:
        """The services of the compose file; none where there is no file."""
        if not self.compose_file.is_file():
            return {}
        return written_services(self.compose_file.read_text(encoding="utf-8"), self.compose_file)


def open_project(folder: Path | None) -> Project:
    """The project in `folder`, or in ./.tunesmith. It need not exist yet."""
    found = (folder or FOLDER).expanduser().absolute()
    if found.exists() and not found.is_dir():
        raise UserError(f"--project {folder}: is a file", hint="give a folder")
    return Project(found)


def render(project: Project, names: Sequence[str], wanted: Wanted) -> str:
    """The text of a new compose file. Raises UserError for what `make_services` or an option refuses."""
    options = make_options(project, wanted)
    return compose_yaml(make_services(names, options), options, base=project.folder)


def update_compose_file(project: Project, names: Sequence[str], wanted: Wanted, *, anew: bool) -> None:
    """Write the compose file, or add to it the services that it lacks; `anew` writes those of `names` again.

    Raises UserError when an option would change a service that is in the file, and `anew` was not asked for.
    """
    held = project.services()
    old = project.compose_file.read_text(encoding="utf-8") if held else None
    missing = [name for name in names if name not in held]
    if old is not None and not anew:
        _refuse_change(project, old, [name for name in names if name in held], wanted)
    due = list(names) if anew else missing
    if not due:
        say(f"uses {project.compose_file} as it is (--render writes it anew)")
        return
    options = make_options(project, wanted)
    text = add_services(old, make_services(due, options), options, base=project.folder)
    if old is not None and anew:
        write_text(project.compose_file.with_name("compose.yaml.old"), old)
    _make_folder(project.folder, options.uid, options.gid)
    write_text(project.compose_file, text)
    write_text(project.folder / ".env", f"COMPOSE_PROJECT_NAME={project.name}\n")
    write_text(project.folder / ".gitignore", f"{SECRETS}/\nhome/\n")
    for path in (project.compose_file, project.folder / ".env", project.folder / ".gitignore"):
        _give(path, options.uid, options.gid)
    say(f"wrote {project.compose_file}: {', '.join(due)}")


def _refuse_change(project: Project, text: str, names: list[str], wanted: Wanted) -> None:
    said = [name for name in wanted.said if name != "password"]
    if not said or not names:
        return
    known = [name for name in names if name in NAMES and _can_make(name, wanted)]
    options = make_options(project, wanted)
    base = project.folder
    changed = [s.name for s in make_services(known, options) if not same_service(text, s, options, base=base)]
    if changed:
        options_said = ", ".join("--" + name.replace("_", "-").replace("-gib", "-size") for name in said)
        raise UserError(
            f"{project.compose_file}: has the service {changed[0]} already and is used as it is; "
            f"with {options_said} it would be another",
            hint="'tunesmith up --render' with the same options writes it anew (the old file is kept as "
            "compose.yaml.old), or change the file by hand",
        )


def _can_make(name: str, wanted: Wanted) -> bool:
    """A train service in the file keeps its recipe when none is given now; likewise the run of serve."""
    return {"train": wanted.recipe, "serve": wanted.run}.get(name, True) is not None


# -- from what the caller said, and this host, to Options -----------------------------------------------


def make_options(project: Project, wanted: Wanted) -> Options:
    """Every value filled in from this host. Raises UserError for what is not there or not allowed."""
    here = Path.cwd()
    uid, gid = caller(wanted.user)
    return Options(
        images=images_of(wanted),
        models=_folder(wanted.models or cache_dir()),
        data=_folder(wanted.data or here / "data"),
        runs=_folder(wanted.runs or here / "runs"),
        notebooks=_folder(wanted.notebooks or here / "notebooks"),
        secrets=project.secrets,
        home=project.home,
        uid=uid,
        gid=gid,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        gpus=_gpus(wanted.gpus or "auto"),
        selinux=SELINUX.is_file() and SELINUX.read_text(encoding="utf-8").strip() == "1",
        recipe=_recipe(wanted.recipe),
        run=wanted.run,
        bind=wanted.bind or "127.0.0.1",
        lab_port=LAB_PORT if wanted.lab_port is None else wanted.lab_port,
        serve_port=SERVE_PORT if wanted.serve_port is None else wanted.serve_port,
        serve_grace_s=_serve_grace_s(wanted.run),
        lab_password=wanted.password is not None,
        host_network=bool(wanted.host_network),
        ipc=wanted.ipc or "private",
        shm_gib=wanted.shm_gib,
    )


def images_of(wanted: Wanted) -> dict[str, str]:
    """The image of each service."""
    return {
        "lab": wanted.image or IMAGES["lab"],
        "train": wanted.image or IMAGES["train"],
        "serve": wanted.serve_image or wanted.image or IMAGES["serve"],
    }


def caller(user: str | None) -> tuple[int, int]:
    """(uid, gid) of `UID:GID`, else of who called; behind sudo, of who called sudo."""
    if user is None:
        if os.getuid() == 0 and os.environ.get("SUDO_UID", "").isdigit():
            return int(os.environ["SUDO_UID"]), int(os.environ.get("SUDO_GID", os.environ["SUDO_UID"]))
        return os.getuid(), os.getgid()
    match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", user)
    if match is None:
        raise UserError(f"--user {user}: is not UID:GID", hint="give two numbers, such as 1000:1000")
    return int(match[1]), int(match[2])


def _folder(path: Path) -> Path:
    path = path.expanduser().absolute()
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: is a file; a folder is mounted here", hint="give a folder")
    return path


def _recipe(path: Path | None) -> Path | None:
    if path is None:
        return None
    if not path.expanduser().is_file():
        raise UserError(f"--recipe {path}: there is no such recipe", hint="give the path of a recipe file")
    return path.expanduser().absolute()


def _serve_grace_s(run: str | None) -> float:
    """Of the recipe of the run that is served. Raises UserError for a run whose recipe asks for TLS."""
    folder = RunFolder(Path(run or "").expanduser())
    if run is None or not is_run(folder.path):
        return Serve().grace_s
    settings = load_recipe(folder.resolved if folder.resolved.is_file() else folder.recipe).serve
    if settings.tls_cert is not None:
        raise UserError(
            f"--run {run}: its recipe has serve.tls_cert, and containers are looked after over plain http",
            hint="put a proxy that has the certificate before the container, and leave serve.tls_cert out",
        )
    return settings.grace_s


def _gpus(wanted: str) -> Gpus:
    if wanted in ("cdi", "nvidia", "none"):
        return wanted  # type: ignore[return-value]
    if not DEVICE.exists():
        return "none"
    info = _docker_info()
    return choose_gpus(info, _cdi_specs(info), any(map(shutil.which, HOOKS)))


def choose_gpus(info: Mapping[str, Any], specs: Sequence[str], hook: bool) -> Gpus:
    """How a host with an NVIDIA GPU gives it to containers; `info` is that of docker, {} without an answer.

    CDI where the daemon reads specifications and one names nvidia.com/gpu: devices injected by the hook are
    lost when systemd reloads (toolkit issue 48). Raises UserError when there is neither CDI nor the hook.
    """
    if info.get("CDISpecDirs") and any("nvidia.com/gpu" in text for text in specs):
        return "cdi"
    if hook or "nvidia" in (info.get("Runtimes") or {}):
        return "nvidia"
    raise UserError(
        "this host has an NVIDIA GPU, but docker cannot give it to containers",
        hint="'tunesmith setup' installs the NVIDIA Container Toolkit; --gpus none goes on without the GPU",
    )


def _docker_info() -> dict[str, Any]:
    try:
        done = proc.run(["docker", "info", "--format", "{{json .}}"], check=False, timeout_s=20)
        found = json.loads(done.stdout)
    except (TunesmithError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _cdi_specs(info: Mapping[str, Any]) -> list[str]:
    folders = [Path(folder) for folder in info.get("CDISpecDirs") or []]
    paths = [path for folder in folders for path in [*folder.glob("*.yaml"), *folder.glob("*.json")]]
    return [path.read_text(encoding="utf-8", errors="replace")[:4096] for path in paths]


# -- what must be there before the containers start ------------------------------------------------------


def prepare(
    project: Project, names: Sequence[str], *, password_config: str | None = None, token: str | None = None
) -> bool:
    """Make the folders and secrets that the services of the compose file need; True when a secret is another.

    password_config: the content of the secret lab_password.json; token: that of lab_token, else a kept or a
    generated one. Folders and secrets belong to the service's user. Raises UserError for a missing read-only
    mount, a folder that the user cannot write, a missing password.
    """
    given = {"lab_password.json": password_config, "lab_token": token}
    changed = False
    for name, service in project.services().items():
        if name not in names:
            continue
        uid, gid = service.user or caller(None)
        for path, read_only in service.mounts:
            _prepare_mount(path, name, uid, gid, read_only)
        for secret, path in service.secrets.items():
            changed |= _prepare_secret(path, uid, gid, secret, given.get(secret))
    return changed


def _prepare_mount(path: Path, service: str, uid: int, gid: int, read_only: bool) -> None:
    if read_only:
        if not path.exists():
            raise UserError(
                f"{path}: the service {service} mounts it, and it is not there", hint="check the path"
            )
        return
    _make_folder(path, uid, gid)
    status = path.stat()
    writable = (
        uid == 0
        or (status.st_uid == uid and status.st_mode & 0o200)
        or (status.st_gid == gid and status.st_mode & 0o020)
        or status.st_mode & 0o002
    )
    if not writable:
        raise UserError(
            f"{path}: belongs to uid {status.st_uid}, and the service {service} runs as uid {uid}: it could "
            "not write there",
            hint=f"sudo chown -R {uid}:{gid} {path}",
        )


def _prepare_secret(path: Path, uid: int, gid: int, name: str, given: str | None) -> bool:
    """True when there was another content before, which a running container still has."""
    _make_folder(path.parent, uid, gid, mode=0o700)
    if path.exists() and (given is None or path.read_text(encoding="utf-8") == given):
        return False
    if given is None and name == "lab_password.json":
        raise UserError("JupyterLab's password is not set", hint="give --password-file FILE")
    before = path.exists()
    write_secret(path, given or secrets.token_urlsafe(32), uid, gid)
    return before


def write_secret(path: Path, text: str, uid: int, gid: int) -> None:
    """Write a file that only its owner reads; it never has a wider mode, not for a moment."""
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)
    handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    _give(part, uid, gid)
    if SELINUX.is_file():
        proc.run(["chcon", "-t", "container_file_t", str(part)], check=False)
    os.replace(part, path)


def _make_folder(path: Path, uid: int, gid: int, mode: int = 0o755) -> None:
    """Make a folder and its missing parents, all owned by the user: docker would make them root's."""
    if path.exists():
        return
    _make_folder(path.parent, uid, gid)
    path.mkdir(mode=mode, exist_ok=True)
    _give(path, uid, gid)


def _give(path: Path, uid: int, gid: int) -> None:
    if (os.geteuid(), os.getegid()) == (uid, gid):
        return
    try:
        os.chown(path, uid, gid)
    except PermissionError:
        raise UserError(
            f"{path}: cannot be given to {uid}:{gid}", hint="only root makes files for another user"
        ) from None
