"""A systemd unit that serves: `tunesmith serve RUN … --systemd-unit > /etc/systemd/system/NAME.service`."""

from __future__ import annotations

import getpass
import sys
from collections.abc import Sequence
from pathlib import Path

from tunesmith.core.errors import UserError
from tunesmith.core.paths import cache_dir
from tunesmith.workflows.serve_settings import Deployment

NOT_IN_UNIT = {"--systemd-unit", "--json"}
CLOSING_S = 15

UNIT = """\
# Written by 'tunesmith serve --systemd-unit'. As root:
#   install -m 644 THIS_FILE /etc/systemd/system/tunesmith.service
#   systemctl daemon-reload && systemctl enable --now tunesmith
[Unit]
Description=Tunesmith: a model behind an OpenAI-compatible API
Wants=network-online.target
After=network-online.target

[Service]
Type=exec
User={user}
WorkingDirectory={folder}
Environment={cache}
ExecStart={command}
Restart=on-failure
RestartSec=5
# SIGTERM goes to the server alone, which lets its engines finish what runs; SIGKILL to all of them.
KillMode=mixed
TimeoutStopSec={stop_s}
LimitNOFILE=65536

# What it may do: read all but secrets of the system, write its cache and logs, speak TCP.
UMask=0077
NoNewPrivileges=yes
CapabilityBoundingSet=
ProtectSystem=strict
ProtectHome=read-only
ReadWritePaths={writable}
PrivateTmp=yes
ProtectClock=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectControlGroups=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX AF_NETLINK
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
# Neither PrivateDevices (a GPU is a device) nor MemoryDenyWriteExecute (kernels are compiled while it runs).

[Install]
WantedBy=multi-user.target
"""


def unit_for_command(args: Sequence[str], wanted: Deployment, *, key_is_bare: bool) -> str:
    """The unit for `tunesmith ARGS` as it was called here, by this user, in this folder.

    wanted: what these arguments and the recipe ask for. Raises UserError for a key on the command line or in
    the environment: a unit can be read by everybody.
    """
    if key_is_bare:
        raise UserError(
            "the API key is not put into a unit, which everybody on the machine can read",
            hint="write it into a file and give --api-key-file, or take --keys-file",
        )
    log = wanted.settings.log_requests
    written = [wanted.keys_file, None if log in (None, "-") else Path(str(log)).expanduser()]
    command = [sys.executable, "-m", "tunesmith", *(arg for arg in args if arg not in NOT_IN_UNIT)]
    if wanted.keys_file is not None and not any(arg.startswith("--keys-file") for arg in args):
        # What named the file, a variable or the user's own folder, may be another one there.
        command += ["--keys-file", str(wanted.keys_file.absolute())]
    return systemd_unit(
        command,
        user=getpass.getuser(),
        folder=Path.cwd(),
        cache=cache_dir(),
        writable=[path.absolute().parent for path in written if path is not None],
        grace_s=wanted.settings.grace_s,
    )


def systemd_unit(
    command: Sequence[str], *, user: str, folder: Path, cache: Path, writable: Sequence[Path], grace_s: float
) -> str:
    """The text of the unit; folders that it may write must exist when it starts, but for those with a '-'."""
    places = dict.fromkeys([cache, *writable])
    return UNIT.format(
        user=user,
        folder=_path(folder),
        cache=_quoted(f"TUNESMITH_CACHE={cache}"),
        command=" ".join(_quoted(part, command=True) for part in command),
        stop_s=int(grace_s) + CLOSING_S,
        writable=" ".join(_quoted(f"-{place}") for place in places),
    )


def _quoted(text: str, *, command: bool = False) -> str:
    """As one word, meant literally (systemd.syntax(7)); in a command line `$` is special too."""
    if "\n" in text:
        raise UserError(f"{text!r}: a unit cannot hold a line break", hint="choose another name")
    text = text.replace("%", "%%")
    if command:
        text = text.replace("$", "$$")
    if text and not set(text) & set(" \t\"'\\;"):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _path(path: Path) -> str:
    """A setting that takes one path to the end of the line: no quotes."""
    return str(path).replace("%", "%%")
