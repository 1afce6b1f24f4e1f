"""The installer inside a bundle, `install.pyz`: for a machine that has Python and nothing else.

It checks the bundle, makes a virtual environment from its wheels, and lets the tunesmith in there put the
rest in place. Standard library only (with core); `write_installer` packs it.
"""

from __future__ import annotations

import argparse
import os
import sys
import zipfile
from importlib.resources import files
from pathlib import Path

from tunesmith.core.errors import TunesmithError, UserError
from tunesmith.hub.bundle_environment import make_environment
from tunesmith.hub.bundle_files import find_faults
from tunesmith.hub.bundle_manifest import Manifest, open_manifest

INSTALLER = "install.pyz"
SCRIPT = "install.sh"
# Everything that the installer imports: it must run where nothing is installed.
MODULES = (
    "__init__.py",
    "core/__init__.py",
    "core/errors.py",
    "core/proc.py",
    "hub/__init__.py",
    "hub/bundle_bootstrap.py",
    "hub/bundle_environment.py",
    "hub/bundle_files.py",
    "hub/bundle_manifest.py",
)
MAIN = "import sys\nfrom tunesmith.hub.bundle_bootstrap import main\nsys.exit(main())\n"
EPOCH = (1980, 1, 1, 0, 0, 0)
FAULTS_SHOWN = 20

SHELL = """\
#!/bin/sh
# Installs tunesmith from this bundle, without network. 'sh install.sh --help' tells the options.
# PYTHON names the interpreter to use.
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
wanted="${PYTHON:-} @PYTHON@ python3"
for python in $wanted; do
    if "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (@VERSION@))' 2>/dev/null; then
        exec "$python" "$here/install.pyz" "$here" "$@"
    fi
done
echo "error: this bundle needs @PYTHON@, and it is not on this machine" >&2
if [ -d "$here/packages" ]; then
    for folder in "$here"/packages/*/; do
        echo "hint: as root, for $(basename "$folder"):" >&2
        case "$(ls "$folder")" in
            *.deb*) echo "  cd $folder && dpkg --install \\$(cat order.txt)" >&2 ;;
            *) echo "  cd $folder && rpm -U --replacepkgs \\$(cat order.txt)" >&2 ;;
        esac
    done
else
    echo "hint: install @PYTHON@ with venv, or set PYTHON to where it is" >&2
fi
exit 2
"""


def write_installer(folder: Path, *, python: str) -> None:
    """Write install.sh and install.pyz, the same bytes for the same tunesmith and Python version."""
    package = files("tunesmith")
    with zipfile.ZipFile(folder / INSTALLER, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(zipfile.ZipInfo("__main__.py", EPOCH), MAIN)
        for name in MODULES:
            content = package.joinpath(name).read_bytes()
            archive.writestr(zipfile.ZipInfo(f"tunesmith/{name}", EPOCH), content)
    text = SHELL.replace("@PYTHON@", f"python{python}").replace("@VERSION@", python.replace(".", ", "))
    (folder / SCRIPT).write_text(text, encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Run the installer; returns the exit code."""
    args, rest = _parser().parse_known_args(argv)
    try:
        manifest = _checked(args.bundle)
        venv = (args.venv or Path.home() / "tunesmith-env").expanduser().absolute()
        if args.dry_run:
            _say(f"would make {venv} from the wheels of the bundle, then put the rest in place")
            return 0
        _say(f"make {venv} from the wheels of the bundle")
        made = make_environment(args.bundle, manifest, venv)
        _say("  done" if made else "  there already")
        return _hand_over(args.bundle, venv, rest)
    except TunesmithError as error:
        _say(f"error: {error}")
        return error.exit_code
    except OSError as error:
        _say(f"error: {error}")
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="install.sh",
        description="Install tunesmith from this bundle, without network: check every byte, make a virtual "
        "environment from its wheels, put model and data in place. It can be called again at any time.",
        epilog="Other options go to 'tunesmith bundle install': --project DIR, --parts LIST, --json.",
    )
    parser.add_argument("bundle", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--venv", type=Path, help="folder of the environment; default: ~/tunesmith-env")
    parser.add_argument("--dry-run", action="store_true", help="check the bundle, say what would be done")
    return parser


def _checked(bundle: Path) -> Manifest:
    manifest = open_manifest(bundle)
    _say(f"check {bundle}: {len(manifest.files)} files, {manifest.num_bytes / 1e9:.2f} GB")
    faults = find_faults(bundle, manifest)
    if faults:
        told = "\n".join(f"  {fault}" for fault in faults[:FAULTS_SHOWN])
        more = f"\n  and {len(faults) - FAULTS_SHOWN} more" if len(faults) > FAULTS_SHOWN else ""
        raise TunesmithError(f"{bundle}: the bundle is damaged:\n{told}{more}", hint="copy those files again")
    return manifest


def _hand_over(bundle: Path, venv: Path, rest: list[str]) -> int:
    """Become the tunesmith that was just installed: it puts models, data and images in place."""
    program = venv / "bin" / "tunesmith"
    if not program.is_file():
        raise UserError(f"{program}: is missing", hint=f"remove {venv} and call install.sh again")
    sys.stderr.flush()
    os.execv(program, [str(program), "bundle", "install", str(bundle), "--verified", *rest])


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
