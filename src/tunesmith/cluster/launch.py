"""The commands of a training on several hosts: one torchrun on each of them. Nothing is run here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from tunesmith.cluster.inventory import Host, Inventory
from tunesmith.core.errors import UserError
from tunesmith.recipe.schema import Recipe

# For `sh -c`: go into the folder, then run the rest.
ENTER = 'cd "$0" && exec "$@"'
MEET_S = 120
COMMAND = "TUNESMITH_COMMAND"
"""Variable of the training's processes: what a person types to go on with it."""


@dataclass(frozen=True)
class Launch:
    """What is trained where. recipe: its text; file: the name of its file; folder: where the hosts work, else
    their user's home; command: what the user typed; processes: on each host."""

    cluster: Inventory
    recipe: str
    file: str
    overrides: tuple[str, ...]
    fresh: bool
    folder: Path | None
    command: str
    processes: tuple[int | str, ...]

    @property
    def carried_to(self) -> str:
        """Where the recipe lies on each host, below the folder it works in."""
        return f".tunesmith/{sha256(self.recipe.encode()).hexdigest()[:12]}/{self.file}"

    def train_args(self) -> list[str]:
        """Of the program that torchrun starts in each process."""
        args = ["tunesmith", "train", self.carried_to, "--json"]
        args += [part for override in self.overrides for part in ("--set", override)]
        return args + ["--fresh"] * self.fresh

    def torchrun_args(self, number: int) -> list[str]:
        """Of torchrun on host `number`."""
        head = self.cluster.head.reached_at
        return [
            *("--nnodes", str(len(self.cluster.hosts)), "--node-rank", str(number)),
            *("--nproc-per-node", str(self.processes[number])),
            *("--master-addr", head, "--master-port", str(self.cluster.port)),
            *("--rdzv-conf", f"timeout={MEET_S}", "-m"),
            *self.train_args(),
        ]

    def on_host(self, number: int) -> list[str]:
        """The command that trains on host `number`."""
        args = ["-m", "tunesmith.cluster.torchrun", *self.torchrun_args(number)]
        return self.python(number, args, {COMMAND: self.command})

    def python(self, number: int, args: Sequence[str], env: dict[str, str] | None = None) -> list[str]:
        """A command of host `number`: its Python, in the folder and with the variables of the training."""
        there = ["sh", "-c", ENTER, str(self.folder)] if self.folder else []
        named = [f"{name}={value}" for name, value in (self.variables() | (env or {})).items()]
        return [*there, "env", *named, self.cluster.python_on(self.cluster.hosts[number]), *args]

    def variables(self) -> dict[str, str]:
        """Of the training's processes: those of the file, and the network interface."""
        interface = self.cluster.interface
        names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if interface else ()
        return dict.fromkeys(names, str(interface)) | self.cluster.env


def make_launch(
    recipe: Recipe, path: Path, overrides: Sequence[str], cluster: Inventory, *, fresh: bool, command: str,
    here: Path,
) -> Launch:  # fmt: skip
    """The training of the recipe in file `path` on a cluster. here: the folder that the user is in.

    Raises UserError when the hosts have no place for the run that all of them can read.
    """
    return Launch(
        cluster=cluster,
        recipe=path.read_text(encoding="utf-8"),
        file=path.name,
        overrides=(*overrides, *_own_overrides(recipe, cluster)),
        fresh=fresh,
        folder=_folder(cluster, here),
        command=command,
        processes=tuple(processes_on(host, recipe) for host in cluster.hosts),
    )


def processes_on(host: Host, recipe: Recipe) -> int | str:
    """Training processes of a host: as cluster.yaml says, else the recipe, else one for each of its GPUs
    ("auto" when only the host knows them), and one without any."""
    if host.processes != "auto":
        return host.processes
    if recipe.hardware.processes != "auto":
        return recipe.hardware.processes
    if recipe.hardware.device == "cpu" or recipe.parallel.engine == "single":
        return 1
    return host.processes_known or "auto"


def _own_overrides(recipe: Recipe, cluster: Inventory) -> list[str]:
    """hardware.processes is told by torchrun; where the hosts share a store, the run goes there."""
    found = ["hardware.processes=auto"] if recipe.hardware.processes != "auto" else []
    if cluster.shared and cluster.shared_folder is None and "://" not in recipe.output_dir:
        found.append(f"output_dir={cluster.shared.rstrip('/')}/{recipe.output_dir.strip('/')}")
    return found


def _folder(cluster: Inventory, here: Path) -> Path | None:
    """Where the hosts work: this very folder if they share it, else the one that they share."""
    shared = cluster.shared_folder
    if shared is None:
        if cluster.shared is None and len(cluster.hosts) > 1:
            raise UserError(
                f"the cluster of {len(cluster.hosts)} hosts names no 'shared' folder, where all of them find "
                "the data and the checkpoints",
                hint="mount one folder on every host (NFS, for example) and name it: shared: /mnt/shared",
            )
        return None
    return here if here.is_relative_to(shared) else shared
