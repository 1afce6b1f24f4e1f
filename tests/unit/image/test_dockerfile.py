"""The Dockerfile's text, and what never gets into it."""

from __future__ import annotations

import json
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tunesmith.core.errors import UserError
from tunesmith.image.bases import Base, choose_base
from tunesmith.image.dockerfile import ImageSpec, quoted, render

CPU = choose_base(None)
NGC = choose_base("580.95.05")
WHEEL = "tunesmith-0.1.0-py3-none-any.whl"


def spec(**values: Any) -> ImageSpec:
    return ImageSpec(**{"base": CPU, "wheel": WHEEL, "uid": 1000, "gid": 1000} | values)


def steps(text: str) -> list[str]:
    """The instructions, each on one line, without comments."""
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    return [line for line in lines.replace("\\\n", " ").splitlines() if line]


def stage(text: str, name: str) -> list[str]:
    """The instructions of one stage."""
    found = steps(text)
    start = next(
        i for i, line in enumerate(found) if line.startswith("FROM") and line.endswith(f" AS {name}")
    )
    return [found[start], *(_until_from(found[start + 1 :]))]


def _until_from(lines: list[str]) -> list[str]:
    end = next((i for i, line in enumerate(lines) if line.startswith("FROM")), len(lines))
    return lines[:end]


def pip_commands(text: str) -> list[list[str]]:
    runs = [json.loads(line[4:]) for line in steps(text) if line.startswith("RUN [")]
    return [command for command in runs if "install" in command]


def test_stages_in_order_and_nothing_that_needs_buildkit() -> None:
    text = render(spec())
    names = [line.rpartition(" ")[2] for line in steps(text) if line.startswith("FROM")]
    assert names == ["base", "train-env", "train", "serve-env", "serve"]
    assert "--mount" not in text and "<<" not in text and not text.startswith("# syntax")


def test_one_stage_is_rendered_alone() -> None:
    """The legacy builder builds every stage before the wanted one."""
    text = render(spec(stages=("serve",)))
    assert " AS serve" in text and "train" not in text.replace("target train", "")


def test_final_stages_run_as_the_caller_and_hold_no_build_files() -> None:
    for name in ("train", "serve"):
        final = stage(render(spec(uid=1234, gid=567)), name)
        assert final[-2] == "USER 1234:567"
        assert not any("/build" in line or line.startswith("RUN") for line in final)
        assert final[1] == f"COPY --from={name}-env /opt/tunesmith /opt/tunesmith"


def test_a_root_caller_stays_root() -> None:
    text = render(spec(uid=0, gid=0))
    assert "useradd" not in text and "USER 0:0" in text and "HOME=/root" in text


def test_health_is_checked_where_something_is_served() -> None:
    text = render(spec())
    assert not any(line.startswith("HEALTHCHECK") for line in stage(text, "train"))
    (check,) = [line for line in stage(text, "serve") if line.startswith("HEALTHCHECK")]
    command = json.loads(check.partition("CMD ")[2])
    assert command[:2] == ["python3", "-c"] and "/ready" in command[2]
    compile(command[2], "healthcheck", "exec")


def test_ngc_packages_are_seen_and_pip_has_their_pins() -> None:
    text = render(spec(base=NGC))
    env = stage(text, "train-env")
    venv = json.loads(next(line for line in env if '"venv"' in line)[4:])
    assert "--system-site-packages" in venv
    order = [
        i
        for i, line in enumerate(env)
        if "pins.py" in line or "PIP_CONSTRAINT" in line or '"install"' in line
    ]
    assert order == sorted(order) and "write" in env[order[0]] and "check" in env[order[-1]]
    assert "PIP_CONSTRAINT=/build/pins.txt" in env[order[1]]


def test_vllm_has_an_environment_of_its_own() -> None:
    text = render(spec(base=NGC, vllm="0.33.0"))
    env = stage(text, "serve-env")
    freed = env.index("ENV PIP_CONSTRAINT=")
    assert all("/opt/tunesmith/bin" not in line for line in env[freed:] if "install" in line)
    vllm = pip_commands(text)[-1]
    assert vllm[-1] == "vllm==0.33.0" and "/opt/vllm/bin/python" in vllm
    assert not any("vllm" in line for line in stage(text, "train"))
    assert "COPY --from=serve-env /opt/vllm /opt/vllm" in stage(text, "serve")
    assert "vllm" not in render(spec())


def test_index_and_hosts_go_to_every_pip() -> None:
    text = render(
        spec(
            pip_index="https://your.mirror/simple",
            torch_index="https://your.mirror/torch/cpu",
            trusted_hosts=("your.mirror:8443",),
        )
    )
    for command in pip_commands(text):
        at = command.index("--index-url")
        assert command[at : at + 6] == [
            "--index-url", "https://your.mirror/simple", "--extra-index-url", "https://your.mirror/torch/cpu",
            "--trusted-host", "your.mirror:8443",
        ]  # fmt: skip


def test_a_wheelhouse_leaves_no_index() -> None:
    for command in pip_commands(render(spec(wheelhouse=True, pip_index="https://your.mirror/simple"))):
        assert "--no-index" in command and "--index-url" not in command


def test_extras_of_the_stages_and_of_the_caller() -> None:
    train, serve = pip_commands(render(spec()))
    assert train[-1] == f"/build/{WHEEL}[train,serve,host]" and serve[-1] == f"/build/{WHEEL}[serve]"
    assert {command[-1] for command in pip_commands(render(spec(extras=("base",))))} == {f"/build/{WHEEL}"}


def test_apt_packages_and_mirror() -> None:
    text = render(spec(apt_packages=("git",), apt_mirror="http://your.mirror"))
    change, install = [line for line in stage(text, "base") if line.startswith("RUN")][:2]
    assert "sed" in change and "http://your.mirror" in change
    assert "install" in install and install.count(" git ") == 1
    assert "apt-get" not in render(spec())


def test_the_mirror_takes_the_place_of_the_archives_alone(tmp_path: Path) -> None:
    """The very sed of the Dockerfile, on sources as Debian and Ubuntu images have them."""
    text = render(spec(apt_packages=("git",), apt_mirror="https://your.mirror/"))
    change = next(line for line in stage(text, "base") if line.startswith("RUN sed"))
    expression = shlex.split(change)[4]
    sources = tmp_path / "sources.list"
    sources.write_text(
        "deb http://some.archive/ubuntu/ noble main\n"
        "deb http://other.archive/debian-security bookworm-security main\n"
        "URIs: http://some.archive/debian\n"
        "deb https://developer.example/compute/cuda/repos/ubuntu2404/x86_64 /\n"
    )
    subprocess.run(["sed", "-i", "-E", expression, sources], check=True)
    assert sources.read_text() == (
        "deb https://your.mirror/ubuntu/ noble main\n"
        "deb https://your.mirror/debian-security bookworm-security main\n"
        "URIs: https://your.mirror/debian\n"
        "deb https://developer.example/compute/cuda/repos/ubuntu2404/x86_64 /\n"
    )


def test_nvidia_cuda_images_get_python_and_a_compiler() -> None:
    text = render(spec(base=choose_base("580.95.05", family="cuda")))
    assert "python3-venv" in text and " gcc " in text


def test_minor_compatibility_lifts_the_start_check_and_says_why() -> None:
    assert "NVIDIA_DISABLE_REQUIRE=true" in render(spec(base=choose_base("550.54.14")))
    assert "NVIDIA_DISABLE_REQUIRE" not in render(spec(base=NGC))
    assert "minor version compatibility" in render(spec(base=choose_base("550.54.14")))


def test_pips_torch_is_refused_where_the_driver_has_no_cuda_13() -> None:
    base = choose_base("570.124.06", family="cuda")
    with pytest.raises(UserError, match="built for CUDA 13") as caught:
        spec(base=base)
    assert caught.value.hint and "--family ngc" in caught.value.hint
    spec(base=base, torch_index="https://your.mirror/torch/cu128")
    spec(base=base, extras=("base",))


def test_a_digest_pins_the_base() -> None:
    digest = "sha256:" + "a" * 64
    text = render(spec(base=replace(CPU, digest=digest)))
    assert f"FROM python:3.11-slim@{digest} AS base" in text
    assert f'org.opencontainers.image.base.digest="{digest}"' in text


def test_labels_are_quoted_so_that_nothing_is_replaced() -> None:
    text = render(spec(labels={"org.tunesmith.note": 'a "b" $PATH \\ c'}))
    assert r'org.tunesmith.note="a \"b\" \$PATH \\ c"' in text
    assert quoted("plain") == '"plain"'


@pytest.mark.parametrize(
    "values",
    [
        {"pip_index": "https://your.mirror/simple\nRUN evil"},
        {"pip_index": "https://your.mirror/simple --extra-index-url http://evil"},
        {"pip_index": "file:///etc/passwd"},
        {"pip_index": "https://me:secret@your.mirror/simple"},
        {"torch_index": "ftp://your.mirror"},
        {"apt_mirror": "http://your.mirror'; evil #"},
        {"apt_mirror": "http://your.mirror#g;e evil"},
        {"apt_packages": ("git\nUSER root",)},
        {"apt_packages": ("-o=evil",)},
        {"apt_packages": ("git; evil",)},
        {"trusted_hosts": ("a b",)},
        {"base": Base(name="python:3.11-slim\nRUN evil", kind="own")},
        {"base": Base(name="python:3.11-slim AS x", kind="own")},
        {"base": Base(name="--platform=evil", kind="own")},
        {"labels": {"a": "b\nRUN evil"}},
        {"labels": {"a b": "c"}},
        {"labels": {"a=b": "c"}},
        {"vllm": "0.33.0 evil"},
        {"vllm": "latest"},
        {"wheel": "x.whl\nRUN evil"},
        {"extras": ("train]; evil",)},
        {"extras": ("trian",)},
        {"uid": -1},
        {"gid": 2**32},
        {"stages": ()},
        {"stages": ("train", "train")},
    ],
    ids=str,
)
def test_values_that_would_say_more_than_they_should_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        spec(**values)


def test_a_password_in_an_index_is_refused_and_not_repeated() -> None:
    with pytest.raises(UserError) as caught:
        spec(pip_index="https://me:s3cret@your.mirror/simple")
    assert "s3cret" not in str(caught.value) and "--wheelhouse" in str(caught.value)
