"""Which wheels, for which machine."""

from __future__ import annotations

import zipfile
from importlib.metadata import Distribution
from pathlib import Path

import pytest

from tunesmith.core.errors import UserError
from tunesmith.hub.bundle_environment import check_python
from tunesmith.hub.bundle_manifest import Item
from tunesmith.hub.wheels import WheelTarget, _repack, constraints, download_wheels


def test_this_machine_needs_no_options_and_another_all_of_them() -> None:
    assert WheelTarget().options() == []
    options = WheelTarget(("manylinux_2_28_aarch64",), "3.12").options()
    assert options == [
        "--platform",
        "manylinux_2_28_aarch64",
        "--python-version",
        "3.12",
        "--implementation",
        "cp",
    ]
    assert WheelTarget((), "3.13").options()[0] == "--platform"


@pytest.mark.parametrize("version", ["3", "3.11.2", "three", "3.10", ""])
def test_a_python_that_cannot_be_is_refused(version: str) -> None:
    with pytest.raises(UserError, match="--python"):
        WheelTarget((), version).check()


def test_the_pins_name_exact_versions() -> None:
    lines = [line for line in constraints().splitlines() if line and not line.startswith("#")]
    assert lines and all("==" in line for line in lines)


@pytest.mark.parametrize(
    ("request_", "what"),
    [
        ({"python": "3.9", "platforms": [], "machine": "x86_64"}, "are for Python 3.9"),
        ({"platforms": ["manylinux_2_28_sparc"]}, "manylinux_2_28_sparc"),
        ({"platforms": [], "machine": "sparc"}, "are for sparc"),
    ],
)
def test_wheels_for_another_machine_are_refused(request_: dict[str, object], what: str) -> None:
    here = WheelTarget().as_dict()
    with pytest.raises(UserError, match=what):
        check_python(Item("wheels", "dependencies", "wheels", here | request_, ()))
    check_python(Item("wheels", "dependencies", "wheels", here, ()))
    check_python(Item("wheels", "dependencies", "wheels", here | {"platforms": ["any"]}, ()))


def installed(folder: Path) -> Distribution:
    """A package as pip leaves it."""
    info = folder / "tunesmith-9.9.dist-info"
    info.mkdir(parents=True)
    (folder / "tunesmith").mkdir()
    (folder / "tunesmith" / "__init__.py").write_text('__version__ = "9.9"\n')
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tunesmith\nVersion: 9.9\n")
    (info / "WHEEL").write_text(
        "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    )
    (info / "INSTALLER").write_text("pip\n")
    names = ["tunesmith/__init__.py", *(f"{info.name}/{name}" for name in ("METADATA", "WHEEL", "INSTALLER"))]
    lines = [f"{name},," for name in [*names, f"{info.name}/RECORD", "../../bin/tunesmith"]]
    (info / "RECORD").write_text("\n".join(lines) + "\n")
    return Distribution.at(info)


def test_an_installed_tunesmith_is_packed_again_so_that_pip_installs_it(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    wheel = _repack(installed(tmp_path / "site"), tmp_path / "out")
    with zipfile.ZipFile(wheel) as archive:
        assert "tunesmith-9.9.dist-info/INSTALLER" not in archive.namelist()
        assert not any(name.startswith("..") for name in archive.namelist())
    pins = tmp_path / "pins.txt"
    pins.write_text("")
    (tmp_path / "got").mkdir()
    download_wheels(wheel, "", WheelTarget(), pins, tmp_path / "got")
    assert [path.name for path in (tmp_path / "got").iterdir()] == ["tunesmith-9.9-py3-none-any.whl"]
