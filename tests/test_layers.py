"""Imports point down only: this table is the architecture."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests import imports

SRC = Path(__file__).resolve().parent.parent / "src" / "tunesmith"

AREAS = ("host", "image", "hub", "data", "plan", "train", "export", "serve", "cluster", "convert")
BELOW_AREAS = {"core", "recipe", "model"}
PERMITTED = {
    "core": {"core"},
    "recipe": {"recipe", "core"},
    "model": {"model", "recipe", "core"},
    **{area: {area} | BELOW_AREAS for area in AREAS},
    "workflows": {"workflows", *AREAS, *BELOW_AREAS},
    "cli": {"cli", "workflows", "recipe", "core"},
}
FILES = sorted(SRC.rglob("*.py"))


def floor_of(path: Path) -> str:
    parts = path.relative_to(SRC).parts
    return parts[0] if len(parts) > 1 else "root"


def own_imports(path: Path) -> list[tuple[int, str, bool]]:
    """(line, module, is inside a function) of every import of this package."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {
        node
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
    }
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} relative import"
            names = [node.module or ""]
            if node.module in {"tunesmith", *(f"tunesmith.{floor}" for floor in PERMITTED)}:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
        found += [(node.lineno, name, node in inside) for name in names if name.split(".")[0] == "tunesmith"]
    return found


def module_name(path: Path) -> str:
    parts = path.relative_to(SRC.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_imports_point_down(path: Path) -> None:
    floor = floor_of(path)
    if floor == "root":
        return
    for line, module, _ in own_imports(path):
        parts = module.split(".")
        target = parts[1] if len(parts) > 1 else "root"
        if target in ("__version__", "root"):
            continue
        assert target in PERMITTED[floor], f"{path}:{line}: {floor} may not import {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_own_imports_inside_functions_only_in_the_command_line(path: Path) -> None:
    if floor_of(path) == "cli":
        return
    hidden = [f"{path}:{line}: {module}" for line, module, inside in own_imports(path) if inside]
    assert not hidden, hidden


def test_no_cycles() -> None:
    modules = {module_name(path): path for path in FILES}
    edges = {
        name: {
            target
            for _, imported, inside in own_imports(path)
            if not inside
            for target in (imported, imported.rpartition(".")[0])
            if target in modules and target != name
        }
        for name, path in modules.items()
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail[trail.index(name) :], name))
        if name in done:
            return
        for target in sorted(edges[name]):
            if target != "tunesmith":
                visit(target, (*trail, name))
        done.add(name)

    for name in modules:
        visit(name, ())


def test_only_proc_starts_programs_and_only_net_speaks_http() -> None:
    sole = {"subprocess": "core/proc.py", "httpx": "core/net.py"}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                place = sole.get(name.split(".")[0])
                assert place in (None, str(path.relative_to(SRC))), f"{path}: only {place} imports {name}"


@pytest.mark.parametrize("args", [["--help"], ["--version"], ["schema"]])
def test_light_commands_load_no_heavy_package(args: list[str]) -> None:
    imports.without({"torch", "transformers", "numpy", "datasets", "httpx"}, *args)


def test_help_of_every_command_has_an_example_and_loads_no_torch() -> None:
    from tunesmith.cli.main import COMMANDS

    for name in COMMANDS:
        text = imports.without({"torch", "transformers"}, name, "--help")
        assert f"tunesmith {name} " in text and "Example" in text, f"{name}: {text}"


def test_the_gateway_of_a_server_needs_no_torch(tiny: Path) -> None:
    """Not to import it, and not to read a tokenizer."""
    code = """
import sys
from pathlib import Path
from tunesmith.core.optional import postpone
postpone("torch")
import tunesmith.workflows.serve
from tunesmith.model.template import encode_prompt, stop_token_ids, template_hash
from tunesmith.model.tokenizer import load_tokenizer
tokenizer = load_tokenizer(Path(sys.argv[1]))
assert encode_prompt(tokenizer, [{"role": "user", "content": "Hello"}]) and template_hash(tokenizer)
assert sys.modules["torch"] is None
"""
    done = subprocess.run([sys.executable, "-c", code, str(tiny)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
