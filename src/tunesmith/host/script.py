"""A plan as a bash script that a person can read, keep and run elsewhere."""

from __future__ import annotations

import shlex

from tunesmith.host.steps_config import CALLING_USER
from tunesmith.host.steps_types import Action, Command, Copy, Plan, Step, Write

HEAD = """\
#!/usr/bin/env bash
# {title}
# Written by 'tunesmith setup --script'. Run it as root; it stops at the first command that fails.
# Words stand in single quotes so that nothing in them expands.
# shellcheck disable=SC2016
set -euo pipefail

if [ "$(id -u)" -ne 0 ]; then
    echo "run this as root" >&2
    exit 1
fi
"""
END_OF_FILE = "TUNESMITH_END_OF_FILE"


def script_of(plan: Plan, title: str) -> str:
    """The plan as bash; text of a user stands in it only as quoted words and quoted here-documents."""
    parts = [HEAD.format(title=_comment(title))]
    parts += [f"# warning: {_comment(text)}\n" for text in plan.warnings]
    parts += [f"export {name}={shlex.quote(value)}\n" for name, value in plan.env.items()]
    parts += [_step(number, step) for number, step in enumerate(plan.steps, 1)]
    if not plan.steps:
        parts.append("\n# Nothing to do: this host has everything.\n")
    return "".join(parts)


def _comment(text: str) -> str:
    return " ".join(text.split())


def _step(number: int, step: Step) -> str:
    lines = [f"\n# {number}. {_comment(step.title)}", f"# {_comment(step.why)}"]
    lines.append(f"echo {shlex.quote(f'== {_comment(step.title)}')}")
    return "\n".join([*lines, *(_action(action) for action in step.actions)]) + "\n"


def _action(action: Action) -> str:
    if isinstance(action, Copy):
        return shlex.join(("cp", str(action.source), action.target))
    if isinstance(action, Write):
        return "\n".join(
            _here_document(c, action.text) if c[0] == "dd" else _line(c) for c in action.commands
        )
    return _line(action)


def _line(command: Command) -> str:
    """The command quoted; the user who calls is known only when the script runs."""
    return " ".join('"${SUDO_USER:-$(id -un)}"' if w == CALLING_USER else shlex.quote(w) for w in command)


def _here_document(command: Command, text: str) -> str:
    end = END_OF_FILE
    while end in text:
        end += "_"
    return f"{shlex.join(command)} <<'{end}'\n{text}{end}"
