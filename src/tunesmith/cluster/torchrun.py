"""torchrun on a host of a cluster, tied to the one who started it over ssh.

`python -m tunesmith.cluster.torchrun ARGS` takes torchrun's arguments. It ends with the other side of its
stdin, which a lost ssh connection does not do by itself, and its last line on stdout tells as JSON which
process failed first. Started by hand, without the beats on stdin, it is torchrun.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import select
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from tunesmith.core.proc import LAUNCHER

BEAT, END = b".", b"t"
# Longer than the ssh client waits, so that its word comes first where there is one to hear it.
SILENT_S = 40.0
# What cannot be interrupted (a collective whose other end is gone) is killed after this long.
GRACE_S = 8.0
SAVE_S = 3600
SIOCGIFADDR = 0x8915  # of <linux/sockios.h>


def main(args: list[str]) -> int:
    """Run torchrun; returns its exit code: of the process that failed first where one did."""
    threading.Thread(target=watch_stdin, name="stdin", daemon=True).start()
    ended = run_torchrun(args)
    if ended:
        sys.stdout.write(json.dumps({"ended": ended}) + "\n")
    code = int(ended.get("code", 1)) if ended else 0
    return 128 - code if code < 0 else code


def watch_stdin(fd: int = 0, silent_s: float = SILENT_S, grace_s: float = GRACE_S) -> None:
    """After the first beat: SIGTERM to this process for an `END`, and its end when the beats are over."""
    is_tied = False
    while True:
        ready, _, _ = select.select([fd], [], [], silent_s if is_tied else None)
        read = os.read(fd, 4096) if ready else b""
        if not read:
            break
        is_tied = True
        if END in read:
            os.kill(os.getpid(), signal.SIGTERM)
    if is_tied:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(grace_s)
        os._exit(128 + signal.SIGTERM)  # its processes end with it: see LAUNCHER


def run_torchrun(args: list[str]) -> dict[str, Any]:
    """torchrun to its end. Returns nothing, or how it failed.

    {"rank", "pid", "code"} of the process that did first, code being negative for a signal; {"code"} when
    told to end; {"what"} when it could not begin.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # it warns of every store that has closed
    import torch
    import torch.distributed as dist
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    found = parse_args(args)
    if found.nproc_per_node == "auto":
        found.nproc_per_node = str(max(1, torch.cuda.device_count()))
    os.environ.update(surroundings(found.master_addr, int(found.nnodes), os.environ))
    logging.disable(logging.CRITICAL)  # what it would log is told once, by the one who started it
    try:
        run(found)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        return {"rank": rank, "pid": failure.pid, "code": failure.exitcode}
    except SignalException as error:
        return {"code": 128 + int(error.sigval)}
    except (dist.DistError, OSError, ValueError) as error:
        return {"what": str(error).splitlines()[0] or type(error).__name__}
    return {}


def surroundings(head: str, hosts: int, env: Mapping[str, str]) -> dict[str, str]:
    """The variables of the training's processes that `env` lacks.

    gloo and NCCL would look this host's own name up, which many systems resolve to a loopback address.
    """
    found = {LAUNCHER: str(os.getpid()), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SAVE_S)}
    interface = interface_toward(head) if hosts > 1 else "lo"
    if interface is not None:
        found |= {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}
    return {name: value for name, value in found.items() if name == LAUNCHER or name not in env}


def interface_toward(host: str) -> str | None:
    """The network interface that this host reaches `host` by, or has its address on; None where it cannot be
    told: an unknown name, IPv6, or a name that this host resolves to loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as link:
        try:
            link.connect((host, 9))  # of a datagram: nothing is sent
        except OSError:
            return None
        own = link.getsockname()[0]
        names = [name for _, name in socket.if_nameindex()]
        return next((n for n in names if _address_of(link, n) == own and not own.startswith("127.")), None)


def _address_of(link: socket.socket, interface: str) -> str | None:
    """The IPv4 address of an interface."""
    try:
        answer = fcntl.ioctl(link.fileno(), SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
    except OSError:
        return None
    return socket.inet_ntoa(answer[20:24])


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # threads of torch's store may hang at an orderly end
