"""Read a Python configuration file by its syntax tree. Nothing of it is ever executed.

What such files are made of is evaluated here: literals, arithmetic, names, `dict(...)`, attributes and
conditions. An imported name stays a `Symbol`. Whatever would need running code is refused with its line.
"""

from __future__ import annotations

import ast
import operator
import posixpath
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.core.errors import UserError

MAX_SIZE = 1_000_000  # characters, entries, or the value of a whole number made by arithmetic
RULE = "configs are read, never run: write the value itself there"


class Symbol(str):
    """The dotted name of something that the file imports or defines, such as torch.optim.AdamW."""

    @property
    def last(self) -> str:
        return self.rpartition(".")[2]


@dataclass(frozen=True)
class Origin:
    """Where a value is written: its line, and the variable that holds it if it has one."""

    line: int
    name: str | None = None


class Section(dict[str, Any]):
    """A `dict(...)` of the file; origins[key] tells where the value of a key is written."""

    def __init__(self, values: dict[str, Any], origins: dict[str, Origin], line: int) -> None:
        super().__init__(values)
        self.origins, self.line = origins, line


@dataclass(frozen=True)
class Config:
    """The variables of a file, in order, and where each is written. functions: names it defines itself."""

    path: Path
    values: Section
    functions: frozenset[str]


def read_config(path: Path) -> Config:
    """Evaluate a file. Raises UserError for one that cannot be read, or that needs code to be run."""
    reader = _Reader(path)
    reader.run(_parsed(path).body)
    return Config(path, Section(reader.names, reader.origins, 1), frozenset(reader.functions))


def _parsed(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_bytes(), filename=str(path))
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file", hint="give the path of a Python config") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, not a Python config") from None
    except SyntaxError as error:
        raise UserError(f"{path}: line {error.lineno}: not Python: {error.msg}") from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"{path}: not Python: {error}") from None


BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow, ast.BitOr: operator.or_,
}  # fmt: skip
COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le,
    ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Is: operator.is_, ast.IsNot: operator.is_not,
    ast.In: lambda a, b: a in b, ast.NotIn: lambda a, b: a not in b,
}  # fmt: skip
UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Not: operator.not_,
}  # fmt: skip
BUILTINS: dict[str, Callable[..., Any]] = {
    "int": int, "float": float, "str": str, "bool": bool, "len": len, "min": min, "max": max, "abs": abs,
    "round": round, "list": list, "tuple": tuple, "sum": sum,
}  # fmt: skip
METHODS = {"append": list, "extend": list, "update": dict, "join": str, "copy": dict}


@dataclass
class _Reader:
    path: Path
    names: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, Origin] = field(default_factory=dict)
    functions: set[str] = field(default_factory=set)

    def refuse(self, node: ast.AST, what: str) -> UserError:
        return UserError(f"{self.path}: line {getattr(node, 'lineno', '?')}: {what}", hint=RULE)

    # -- statements ----------------------------------------------------------------------------------------

    def run(self, body: list[ast.stmt]) -> None:
        for node in body:
            action = getattr(self, f"_do_{type(node).__name__.lower()}", None)
            if action is None:
                raise self.refuse(node, f"'{type(node).__name__}' statements are not evaluated")
            action(node)

    def _do_import(self, node: ast.Import) -> None:
        for alias in node.names:
            name = alias.asname or alias.name.split(".")[0]
            self.names[name] = Symbol(alias.name if alias.asname else name)

    def _do_importfrom(self, node: ast.ImportFrom) -> None:
        for alias in node.names:
            self.names[alias.asname or alias.name] = Symbol(f"{node.module or ''}.{alias.name}")

    def _do_functiondef(self, node: ast.FunctionDef | ast.ClassDef) -> None:
        self.names[node.name] = Symbol(node.name)
        self.functions.add(node.name)

    _do_classdef = _do_functiondef

    def _do_pass(self, node: ast.Pass) -> None:
        return

    def _do_delete(self, node: ast.Delete) -> None:
        for target in node.targets:
            self.names.pop(getattr(target, "id", ""), None)

    def _do_if(self, node: ast.If) -> None:
        self.run(node.body if self.truth(node.test) else node.orelse)

    def _do_with(self, node: ast.With) -> None:
        """mmengine's `with read_base(): from .base import *`."""
        called = node.items[0].context_expr
        if not (isinstance(called, ast.Call) and getattr(called.func, "id", "") == "read_base"):
            raise self.refuse(node, "'with' statements are not evaluated")
        for inner in node.body:
            if not isinstance(inner, ast.ImportFrom) or not inner.level:
                raise self.refuse(inner, "read_base takes relative imports only")
            self._take_base(inner)

    def _take_base(self, node: ast.ImportFrom) -> None:
        folder = self.path.parent
        for _ in range(node.level - 1):
            folder = folder.parent
        base = read_config(folder.joinpath(*(node.module or "").split(".")).with_suffix(".py"))
        wanted = [alias.name for alias in node.names]
        for name in base.values if "*" in wanted else wanted:
            if name not in base.values:
                raise self.refuse(node, f"{base.path} has no '{name}'")
            self.names[name], self.origins[name] = base.values[name], Origin(node.lineno, name)

    def _do_expr(self, node: ast.Expr) -> None:
        if not isinstance(node.value, ast.Constant):
            self.value(node.value)

    def _do_annassign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self._assign(node.target, node.value)

    def _do_assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            self._assign(target, node.value)

    def _do_augassign(self, node: ast.AugAssign) -> None:
        held = ast.copy_location(ast.BinOp(_loaded(node.target), node.op, node.value), node)
        self._assign(node.target, held)

    def _assign(self, target: ast.expr, expression: ast.expr) -> None:
        value, origin = self.value(expression), self.origin(expression)
        if isinstance(target, ast.Name):
            self.names[target.id] = value
            self.origins[target.id] = Origin(target.lineno, target.id)
        elif isinstance(target, (ast.Subscript, ast.Attribute)):
            self._put(target, value, origin)
        elif isinstance(target, (ast.Tuple, ast.List)) and isinstance(value, (list, tuple)):
            for part, item in zip(target.elts, value, strict=False):
                self._assign(part, ast.copy_location(ast.Constant(item), expression))
        else:
            raise self.refuse(target, "this assignment is not evaluated")

    def _put(self, target: ast.Subscript | ast.Attribute, value: Any, origin: Origin) -> None:
        holder = self.value(target.value)
        key = target.attr if isinstance(target, ast.Attribute) else self.value(target.slice)
        if isinstance(holder, Section):
            holder[key], holder.origins[key] = value, Origin(target.lineno, origin.name)
        elif isinstance(holder, list) and isinstance(key, int) and -len(holder) <= key < len(holder):
            holder[key] = value
        else:
            raise self.refuse(target, "this assignment is not evaluated")

    # -- expressions ---------------------------------------------------------------------------------------

    def value(self, node: ast.expr) -> Any:
        action = getattr(self, f"_of_{type(node).__name__.lower()}", None)
        if action is None:
            raise self.refuse(node, f"'{ast.unparse(node)[:60]}' is not evaluated")
        try:
            made = action(node)
        except UserError:
            raise
        except Exception as error:  # whatever Python's own operators refuse
            raise self.refuse(node, f"'{ast.unparse(node)[:60]}': {error}") from None
        self._check_size(node, made)
        return made

    def origin(self, node: ast.expr) -> Origin:
        """Where a value is written: of a bare name, where the name was set last."""
        if isinstance(node, ast.Name) and node.id in self.origins:
            return self.origins[node.id]
        return Origin(node.lineno)

    def truth(self, node: ast.expr) -> bool:
        value = self.value(node)
        if isinstance(value, Symbol):
            raise self.refuse(node, f"whether '{value}' is true is not known without running it")
        return bool(value)

    def _check_size(self, node: ast.expr, value: Any) -> None:
        big = isinstance(value, int) and abs(value) > 2**64
        if big or (isinstance(value, (str, bytes, list, tuple)) and len(value) > MAX_SIZE):
            raise self.refuse(node, "makes a value that is too large")

    def _of_constant(self, node: ast.Constant) -> Any:
        return node.value

    def _of_name(self, node: ast.Name) -> Any:
        if node.id not in self.names:
            raise self.refuse(node, f"'{node.id}' is not defined")
        return self.names[node.id]

    def _of_list(self, node: ast.List) -> list[Any]:
        return [self.value(item) for item in node.elts]

    def _of_tuple(self, node: ast.Tuple) -> tuple[Any, ...]:
        return tuple(self.value(item) for item in node.elts)

    def _of_dict(self, node: ast.Dict) -> Section:
        section = Section({}, {}, node.lineno)
        for key, item in zip(node.keys, node.values, strict=True):
            self._fill(section, None if key is None else self.value(key), item)
        return section

    def _fill(self, section: Section, key: Any, node: ast.expr) -> None:
        value = self.value(node)
        if key is not None:
            section[key], section.origins[key] = value, self.origin(node)
        elif isinstance(value, Section):
            section.update(value)
            section.origins.update(value.origins)
        else:
            raise self.refuse(node, "only a dict can be unpacked here")

    def _of_attribute(self, node: ast.Attribute) -> Any:
        holder = self.value(node.value)
        if isinstance(holder, Symbol):
            return Symbol(f"{holder}.{node.attr}")
        if isinstance(holder, Section) and node.attr in holder:
            return holder[node.attr]
        raise self.refuse(node, f"'{ast.unparse(node)}' is not evaluated")

    def _of_subscript(self, node: ast.Subscript) -> Any:
        return self.value(node.value)[self.value(node.slice)]

    def _of_slice(self, node: ast.Slice) -> slice:
        return slice(
            *(None if part is None else self.value(part) for part in (node.lower, node.upper, node.step))
        )

    def _of_binop(self, node: ast.BinOp) -> Any:
        left, right = self.value(node.left), self.value(node.right)
        formats = isinstance(node.op, ast.Mod) and isinstance(left, (str, bytes))
        if isinstance(left, Symbol) or isinstance(right, Symbol) or formats or type(node.op) not in BINARY:
            raise self.refuse(node, f"'{ast.unparse(node)[:60]}' is not evaluated")
        if isinstance(node.op, ast.Pow) and (abs(left) > 1e6 or abs(right) > 32):
            raise self.refuse(node, "makes a value that is too large")
        if isinstance(node.op, ast.Mult):
            self._check_product(node, left, right)
        return BINARY[type(node.op)](left, right)

    def _check_product(self, node: ast.BinOp, left: Any, right: Any) -> None:
        sizes = [len(x) if hasattr(x, "__len__") else x for x in (left, right)]
        repeats = any(hasattr(x, "__len__") for x in (left, right))
        if repeats and sizes[0] * sizes[1] > MAX_SIZE:
            raise self.refuse(node, "makes a value that is too large")

    def _of_unaryop(self, node: ast.UnaryOp) -> Any:
        if isinstance(node.op, ast.Not):
            return not self.truth(node.operand)
        return UNARY[type(node.op)](self.value(node.operand))

    def _of_boolop(self, node: ast.BoolOp) -> Any:
        wanted = isinstance(node.op, ast.Or)
        for part in node.values[:-1]:
            if self.truth(part) is wanted:
                return self.value(part)
        return self.value(node.values[-1])

    def _of_compare(self, node: ast.Compare) -> bool:
        values = [self.value(part) for part in (node.left, *node.comparators)]
        return all(
            COMPARE[type(op)](a, b) for op, a, b in zip(node.ops, values[:-1], values[1:], strict=True)
        )

    def _of_ifexp(self, node: ast.IfExp) -> Any:
        return self.value(node.body if self.truth(node.test) else node.orelse)

    def _of_joinedstr(self, node: ast.JoinedStr) -> str:
        return "".join(str(self.value(part)) for part in node.values)

    def _of_formattedvalue(self, node: ast.FormattedValue) -> str:
        spec = self.value(node.format_spec) if node.format_spec is not None else ""
        if any(int(digits) > 99 for digits in "".join(c if c.isdigit() else " " for c in spec).split()):
            raise self.refuse(node, "makes a value that is too large")
        return format(self.value(node.value), spec)

    def _of_call(self, node: ast.Call) -> Any:
        name = ast.unparse(node.func)
        if name in ("dict", "ConfigDict"):
            return self._made_dict(node)
        arguments = [self.value(argument) for argument in node.args]
        if name in BUILTINS and name not in self.names and not node.keywords:
            return BUILTINS[name](*arguments)
        if name in ("os.path.join", "osp.join") and all(isinstance(a, str) for a in arguments):
            return posixpath.join(*arguments)
        if isinstance(node.func, ast.Attribute) and node.func.attr in METHODS:
            holder = self.value(node.func.value)
            if isinstance(holder, METHODS[node.func.attr]) and not isinstance(holder, Symbol):
                keywords = {str(part.arg): self.value(part.value) for part in node.keywords}
                return getattr(holder, node.func.attr)(*arguments, **keywords)
        raise self.refuse(node, f"it calls {name}(), which is not evaluated")

    def _made_dict(self, node: ast.Call) -> Section:
        section = Section({}, {}, node.lineno)
        for argument in node.args:
            self._fill(section, None, argument)
        for keyword in node.keywords:
            self._fill(section, keyword.arg, keyword.value)
        return section


def _loaded(target: ast.expr) -> ast.expr:
    """The same place, to be read."""
    return ast.parse(ast.unparse(target), mode="eval").body
