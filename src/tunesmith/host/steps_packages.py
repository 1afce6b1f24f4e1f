"""Steps that bring packages: repositories, docker, NVIDIA's toolkit; from the network or from a bundle.

Sources: docs.docker.com/engine/install, NVIDIA's install guide of the container toolkit 1.20. CentOS 8 is
served by vault.centos.org since January 2022, CentOS 7 since July 2024.
"""

from __future__ import annotations

from pathlib import Path

from tunesmith.core.errors import UserError
from tunesmith.host.distro import Distro
from tunesmith.host.packages import DOCKER_RPM, TOOLKIT, TOOLKIT_VERSION, bundled_packages
from tunesmith.host.steps_types import NVIDIA_REPOSITORY as NVIDIA_REPOSITORY
from tunesmith.host.steps_types import Action, Command, Copy, DockerSource, SetupOptions, Step, Write

NVIDIA_KEY = "/usr/share/keyrings/nvidia-container-toolkit-keyring"
NVIDIA_LIST = "/etc/apt/sources.list.d/nvidia-container-toolkit.list"
NVIDIA_REPO = "/etc/yum.repos.d/nvidia-container-toolkit.repo"
DOCKER_KEY = "/etc/apt/keyrings/docker.asc"

# Unattended upgrades hold dpkg for minutes on a server that has just booted.
APT_WAIT = ("-o", "DPkg::Lock::Timeout=300")
APT_ENV = {"DEBIAN_FRONTEND": "noninteractive"}
UPLOADED = "/var/tmp/tunesmith-packages"

# The last release of the toolkit while NVIDIA still listed the distribution: CentOS 7 and Ubuntu 18.04 left
# the list in February 2025 (1.17), Ubuntu 20.04 in May 2026 (1.19).
LAST_TOOLKIT = {
    ("centos", "7"): "1.17.8-1",
    ("rhel", "7"): "1.17.8-1",
    ("ubuntu", "18.04"): "1.17.8-1",
    ("ubuntu", "20.04"): "1.19.1-1",
}


def toolkit_version(distro: Distro) -> str:
    """The pinned release of the NVIDIA Container Toolkit: an older one where the newest is not supported."""
    for version in (distro.version, str(distro.major)):
        if (distro.id, version) in LAST_TOOLKIT:
            return LAST_TOOLKIT[distro.id, version]
    return TOOLKIT_VERSION


def docker_source(distro: Distro, options: SetupOptions) -> DockerSource:
    """docker.io of the distribution where there is one that is new enough, else Docker's own docker-ce."""
    if distro.is_rpm and options.docker == "docker.io":
        raise UserError(
            f"--docker docker.io: {distro.name} has no such package",
            hint="leave the option out: docker-ce comes from Docker's own repository",
        )
    too_old = distro.id == "debian" and distro.major < 12
    return options.docker or ("docker-ce" if distro.is_rpm or too_old else "docker.io")


def is_end_of_life_centos(distro: Distro) -> bool:
    return distro.id == "centos" and distro.major in (7, 8)


def vault_step() -> Step:
    # Not https: an old CentOS 7 does not know the root certificate; rpm checks every package's signature.
    edit = (
        "sed", "-i.before-tunesmith", "-e", "s|^mirrorlist=|#mirrorlist=|",
        "-e", "s|^#\\{0,1\\} *baseurl=http://mirror.centos.org|baseurl=http://vault.centos.org|",
    )  # fmt: skip
    find = ("find", "/etc/yum.repos.d", "-name", "CentOS-*.repo", "-exec", *edit, "{}", "+")
    return Step(
        "package-sources",
        "Point the CentOS repositories to vault.centos.org",
        "This CentOS is past its end of life: mirrorlist.centos.org is gone, and every install fails.",
        (find,),
    )


def old_sources_step(files: tuple[str, ...]) -> Step:
    moves = tuple(("mv", "-f", path, f"{path}.disabled") for path in files)
    return Step(
        "old-nvidia-sources",
        "Switch old NVIDIA package sources off",
        "apt refuses to work when two files name NVIDIA's repository with different keys (Signed-By).",
        moves,
    )


def prerequisites_step(distro: Distro) -> Step:
    packages = ("ca-certificates", "curl", "gnupg") if distro.family == "apt" else ("curl",)
    return Step(
        "prerequisites",
        "Install what fetches and checks package keys",
        "The repositories below are added with their signing keys.",
        install(distro, *packages, refresh=True),
    )


def install(distro: Distro, *packages: str, refresh: bool = False) -> tuple[Command, ...]:
    """The commands that install packages; `refresh`: read the package lists of apt first."""
    if distro.family != "apt":
        # containerd.io takes the place of podman's runc; without this the transaction is refused.
        erase = ("--allowerasing",) if distro.family == "dnf" and "docker-ce" in packages else ()
        return ((distro.tool, "install", "-y", *erase, *packages),)
    update = (("apt-get", "update", *APT_WAIT),) if refresh else ()
    return (*update, ("apt-get", "install", "-y", "--no-install-recommends", *APT_WAIT, *packages))


def docker_repository_step(distro: Distro, mirror: str) -> Step:
    base = mirror.rstrip("/")
    via = "" if base == "https://download.docker.com" else f" by way of {base}"
    actions: tuple[Action, ...]
    if distro.is_rpm:
        actions = (Write("/etc/yum.repos.d/docker-ce.repo", _docker_repo_file(distro, base)),)
    else:
        linux = f"{base}/linux/{_docker_apt_id(distro)}"
        line = f"deb [signed-by={DOCKER_KEY}] {linux} {distro.codename} stable\n"
        actions = (
            ("mkdir", "-p", "/etc/apt/keyrings"),
            ("curl", "-fsSL", "--retry", "3", f"{linux}/gpg", "-o", DOCKER_KEY),
            ("chmod", "0644", DOCKER_KEY),
            Write("/etc/apt/sources.list.d/docker.list", line),
            ("apt-get", "update", *APT_WAIT),
        )
    why = f"docker-ce comes from Docker's own repository{via}; packages are checked against its key."
    return Step("docker-repository", "Add Docker's package repository", why, actions)


def _docker_apt_id(distro: Distro) -> str:
    if not distro.codename:
        raise UserError(
            f"{distro.name}: its codename is not known, so Docker's repository for it cannot be named",
            hint="install docker by hand, then run setup again",
        )
    return "debian" if distro.id == "debian" else "ubuntu"


def _docker_repo_file(distro: Distro, base: str) -> str:
    own = distro.id == "fedora" or (distro.id == "rhel" and distro.major >= 8)
    linux = f"{base}/linux/{distro.id if own else 'centos'}"
    return (
        "[docker-ce-stable]\n"
        "name=Docker CE Stable - $basearch\n"
        f"baseurl={linux}/{distro.major}/$basearch/stable\n"
        "enabled=1\n"
        "gpgcheck=1\n"
        f"gpgkey={linux}/gpg\n"
    )


def docker_packages(distro: Distro, source: DockerSource) -> tuple[str, ...]:
    """docker, and what `docker compose` and `docker build` need, as the distribution names them."""
    if source == "docker-ce":
        return DOCKER_RPM
    compose = compose_packages(distro, source)
    # Debian 13 has the client in a package of its own, and docker.io does not pull it in.
    client = ("docker-cli",) if distro.id == "debian" and distro.major >= 13 else ()
    # Where the kernel has AppArmor, no container starts without apparmor's parser.
    return ("docker.io", *client, *compose, "apparmor", "ca-certificates")


def compose_packages(distro: Distro, source: DockerSource) -> tuple[str, ...]:
    if source == "docker-ce":
        return ("docker-buildx-plugin", "docker-compose-plugin")
    if distro.id == "debian":
        return ("docker-compose",) if distro.major < 13 else ("docker-compose", "docker-buildx")
    return ("docker-compose-v2", "docker-buildx")


def docker_step(distro: Distro, source: DockerSource, *, refresh: bool, replace: bool) -> Step:
    origin = "the distribution" if source == "docker.io" else "Docker's repository"
    why = f"Images are built and run with docker; {source} from {origin}, with compose."
    if replace:
        why = f"The docker here is older than 20.10.10 and breaks new images (clone3). {why}"
    if distro.family == "dnf":
        why += " podman's runc gives way to containerd.io where it is installed."
    return Step(
        "docker",
        "Install docker" if not replace else "Replace the old docker",
        why,
        install(distro, *docker_packages(distro, source), refresh=refresh),
    )


def compose_step(distro: Distro, source: DockerSource) -> Step:
    return Step(
        "docker-compose",
        "Install docker compose",
        "tunesmith up starts the containers from a compose file.",
        install(distro, *compose_packages(distro, source), refresh=True),
    )


def toolkit_repository_step(distro: Distro, mirror: str = NVIDIA_REPOSITORY) -> Step:
    """NVIDIA's repository, or a mirror of it with the same layout."""
    base = mirror.rstrip("/")
    actions: tuple[Action, ...]
    if distro.is_rpm and base != NVIDIA_REPOSITORY:
        actions = (Write(NVIDIA_REPO, _nvidia_repo_file(base)),)
    elif distro.is_rpm:
        url = f"{NVIDIA_REPOSITORY}/stable/rpm/nvidia-container-toolkit.repo"
        actions = (("curl", "-fsSL", "--retry", "3", url, "-o", NVIDIA_REPO),)
    else:
        key, armoured = f"{NVIDIA_KEY}.gpg", f"{NVIDIA_KEY}.asc"
        line = f"deb [signed-by={key}] {base}/stable/deb/$(ARCH) /\n"
        actions = (
            ("curl", "-fsSL", "--retry", "3", f"{base}/gpgkey", "-o", armoured),
            ("gpg", "--batch", "--yes", "--dearmor", "-o", key, armoured),
            ("chmod", "0644", key),
            Write(NVIDIA_LIST, line),
            ("apt-get", "update", *APT_WAIT),
        )
    return Step(
        "nvidia-repository",
        "Add NVIDIA's package repository",
        "The container toolkit comes from NVIDIA; packages are checked against its key.",
        actions,
    )


def _nvidia_repo_file(base: str) -> str:
    """As NVIDIA's own file: the list of packages is signed, and names the hash of each."""
    return (
        "[nvidia-container-toolkit]\n"
        "name=nvidia-container-toolkit\n"
        f"baseurl={base}/stable/rpm/$basearch\n"
        "repo_gpgcheck=1\n"
        "gpgcheck=0\n"
        "enabled=1\n"
        f"gpgkey={base}/gpgkey\n"
    )


def toolkit_step(distro: Distro) -> Step:
    version, sign = toolkit_version(distro), "=" if distro.family == "apt" else "-"
    names = (TOOLKIT[3], TOOLKIT[2], TOOLKIT[1], TOOLKIT[0])
    return Step(
        "nvidia-toolkit",
        f"Install the NVIDIA Container Toolkit {version}",
        "It hands GPUs to containers. All four packages have the same pinned version.",
        install(distro, *(f"{name}{sign}{version}" for name in names)),
    )


def bundled_steps(distro: Distro, options: SetupOptions, *, docker: bool, toolkit: bool) -> list[Step]:
    """The packages of a bundle as steps without network.

    Raises UserError when the bundle has none for this distribution, or not those that are needed.
    """
    assert options.bundle is not None
    files = bundled_packages(options.bundle, distro)
    nvidia = [path for path in files if _is_toolkit(path)]
    others = [path for path in files if not _is_toolkit(path)]
    has_docker = any(path.name.startswith(("docker.io_", "docker-ce_", "docker-ce-")) for path in others)
    for needed, there, what in (
        (docker, has_docker, "docker"),
        (toolkit, len(nvidia) >= len(TOOLKIT), "the NVIDIA Container Toolkit"),
    ):
        if needed and not there:
            raise UserError(
                f"{options.bundle}: its packages for {distro.label} lack {what}",
                hint="make the bundle again on a machine with network",
            )
    steps = []
    if docker:
        title, why = (
            "Install docker from the bundle",
            "Images are built and run with docker; no network is used.",
        )
        steps.append(Step("docker", title, why, _install_files(distro, others, options.upload, update=True)))
    if toolkit:
        title, why = (
            "Install the NVIDIA Container Toolkit from the bundle",
            "It hands GPUs to containers. The four packages go in so that each finds what it needs.",
        )
        steps.append(Step("nvidia-toolkit", title, why, _install_files(distro, nvidia, options.upload)))
    return steps


def _is_toolkit(path: Path) -> bool:
    return path.name.startswith(("libnvidia-container", "nvidia-container-toolkit"))


def _install_files(
    distro: Distro, files: list[Path], upload: bool, *, update: bool = False
) -> tuple[Action, ...]:
    places = [f"{UPLOADED}/{path.name}" if upload else str(path.absolute()) for path in files]
    copies: list[Action] = [Copy(path, place) for path, place in zip(files, places, strict=True) if upload]
    if copies:
        copies.insert(0, ("mkdir", "-p", UPLOADED))
    # Neither replaces a newer package of the host, nor fails over one that is there already.
    how: Command
    if distro.is_rpm:
        how = ("rpm", "-Uvh" if update else "-ivh", "--replacepkgs")
    else:
        how = ("dpkg", "-i", "--skip-same-version", "--refuse-downgrade")
    clean: list[Action] = [("rm", "-rf", UPLOADED)] if upload else []
    return (*copies, (*how, *places), *clean)
