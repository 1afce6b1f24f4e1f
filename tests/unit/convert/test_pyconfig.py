"""Python configs by their syntax tree: what is evaluated, and that nothing is ever run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.convert.pyconfig import Section, Symbol, read_config
from tunesmith.core.errors import UserError


def values(tmp_path: Path, text: str) -> Section:
    path = tmp_path / "config.py"
    path.write_text(text, encoding="utf-8")
    return read_config(path).values


def test_values_names_and_sections(tmp_path: Path) -> None:
    found = values(
        tmp_path,
        "from torch.optim import AdamW\nimport torch\n"
        "a = 2\na *= 3\nb, c = 1, 'x'\nhalf = 1 / 40\n"
        "s = dict(type=AdamW, lr=-1e-3, dtype=torch.float16, deep=dict(n=a))\n"
        "d = {'k': [1, (2, 3)], **s}\ns.deep.n += 1\ns['new'] = f'{c}-{a:03d}'\n"
        "big = a if a > 5 and not b == 2 else 0\nrows = [1]\nrows += [2]\nrows.append(3)\n",
    )
    assert (found["a"], found["b"], found["c"], found["half"]) == (6, 1, "x", 0.025)
    assert found["s"]["type"] == "torch.optim.AdamW" and isinstance(found["s"]["type"], Symbol)
    assert found["s"]["dtype"] == "torch.float16" and found["s"]["deep"] == {"n": 7}
    assert found["s"]["new"] == "x-006" and found["d"]["k"] == [1, (2, 3)] and found["d"]["lr"] == -1e-3
    assert found["big"] == 6 and found["rows"] == [1, 2, 3]


def test_a_value_knows_the_line_of_its_variable(tmp_path: Path) -> None:
    found = values(tmp_path, "rate = 3\nrate *= 2\ns = dict(\n    lr=rate,\n    own=5)\n")
    assert (found["s"].origins["lr"].line, found["s"].origins["lr"].name) == (2, "rate")
    assert found["s"].origins["own"].line == 5


def test_only_the_branch_that_holds_is_taken(tmp_path: Path) -> None:
    found = values(tmp_path, "x = 1\nif x > 1:\n    y = undefined\nelse:\n    y = 'no'\n")
    assert found["y"] == "no"


def test_a_base_beside_the_file_is_read_too(tmp_path: Path) -> None:
    (tmp_path / "base.py").write_text("lr = 1\nepochs = 3\n")
    found = values(
        tmp_path,
        "from mmengine.config import read_base\nwith read_base():\n    from .base import *\nlr = 2\n",
    )
    assert (found["lr"], found["epochs"]) == (2, 3)


HARMFUL = [
    ("import os\nx = os.system('touch touched')", "it calls os.system()"),
    ("open('touched', 'w')", "it calls open()"),
    ("x = __import__('os').system('touch touched')", "it calls __import__('os').system()"),
    ("x = (lambda: open('touched', 'w'))()", "it calls lambda: open('touched', 'w')()"),
    ("x = [open('touched', 'w') for _ in [1]]", "is not evaluated"),
    ("x = ().__class__.__bases__", "is not evaluated"),
    ("x = '{0.__class__}'.format(1)", "it calls '{0.__class__}'.format()"),
    ("for i in [1]:\n    x = i", "'For' statements are not evaluated"),
    ("with open('touched', 'w') as f:\n    pass", "'with' statements are not evaluated"),
    ("x = 9 ** 9 ** 9", "too large"),
    ("x = 'a' * 10 ** 9", "too large"),
    ("x = '%0999999999d' % 1", "is not evaluated"),
    ("x = f'{1:0999999999d}'", "too large"),
    ("x = missing", "'missing' is not defined"),
    ("x = 1 / 0", "division by zero"),
    ("import torch\nif torch.ok:\n    x = 1", "whether 'torch.ok' is true"),
    ("import torch\nx = torch.a + 1", "is not evaluated"),
    ("x = " + "(" * 150 + "1" + ")" * 150 + "[", "not Python"),
    ("class A(:\n", "not Python"),
]


@pytest.mark.parametrize(("text", "fault"), HARMFUL, ids=[str(n) for n in range(len(HARMFUL))])
def test_what_needs_code_to_run_is_refused_with_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, fault: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        values(tmp_path, text + "\n")
    assert fault in str(error.value) and "config.py: " in str(error.value)
    assert not (tmp_path / "touched").exists()


def test_a_function_of_the_file_is_a_name_and_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "config.py"
    path.write_text("def rows(example):\n    raise SystemExit\n\nuse = rows\n")
    config = read_config(path)
    assert config.functions == {"rows"} and config.values["use"] == "rows"


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such file"):
        read_config(tmp_path / "none.py")
    with pytest.raises(UserError, match="is a folder"):
        read_config(tmp_path)
