"""How workers are placed, and what is said when one of them ends."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from tunesmith.core.errors import RunFailed, UserError
from tunesmith.recipe.schema import Recipe
from tunesmith.train.ranks import Ranks
from tunesmith.workflows.launch import Cluster, Crew, processes_here
from tunesmith.workflows.resume import idle_ranks, other_ranks

NAMES = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]
PLACE = f"import os, json; print(json.dumps({{k: os.environ[k] for k in {NAMES}}}))"


def recipe(**sections: dict[str, object]) -> Recipe:
    values = {"model": {"path": "m"}, "data": {"sources": [{"path": "d"}]}} | sections
    return Recipe.model_validate(values)


def crew(code: str, *, processes: int = 2, cluster: Cluster | None = None) -> Crew:
    return Crew([sys.executable, "-c", code], processes, cluster or Cluster())


def test_places_of_the_second_of_two_machines() -> None:
    cluster = Cluster(nodes=2, node=1, rendezvous="node0:29400")
    with crew(PLACE, cluster=cluster) as workers:
        workers.wait()
        found = [worker.printed() for worker in workers.workers]
    common = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "node0", "MASTER_PORT": "29400"}
    assert found == [common | {"RANK": str(2 + local), "LOCAL_RANK": str(local)} for local in range(2)]


@pytest.mark.parametrize(
    ("given", "address"), [("node0", ("node0", 29500)), ("10.0.0.1:1234", ("10.0.0.1", 1234))]
)
def test_rendezvous(given: str, address: tuple[str, int]) -> None:
    assert Cluster(2, 0, given).address() == address


@pytest.mark.parametrize(
    ("nodes", "node", "rendezvous", "what"),
    [(2, 0, None, "needs --rendezvous"), (2, 2, "a:1", "--node-rank: 2"), (2, 1, "a:b", "is not HOST:PORT")],
)
def test_wrong_clusters(nodes: int, node: int, rendezvous: str | None, what: str) -> None:
    with pytest.raises(UserError, match=what):
        Cluster(nodes, node, rendezvous).address()


def test_the_value_is_what_rank_0_printed() -> None:
    code = "import os; print('{\"rank\": %s}' % os.environ['RANK'])"
    with crew(code, processes=3) as workers:
        assert workers.wait().value == {"rank": 0}


def test_a_worker_that_dies_ends_the_others_and_is_named() -> None:
    code = "import os, time\nif os.environ['RANK'] == '1': os.kill(os.getpid(), 9)\ntime.sleep(600)"
    killed = r"rank 1 \(process \d+\) was killed by SIGKILL"
    with pytest.raises(RunFailed, match=killed) as caught, crew(code) as workers:
        pids = [worker.process.pid for worker in workers.workers]
        workers.wait()
    assert "dmesg" in str(caught.value.hint)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids), "a zombie is left"


def test_the_last_lines_of_a_rank_without_a_terminal_are_shown() -> None:
    code = "import os, time\nif os.environ['RANK'] == '1': raise ValueError('all wrong')\ntime.sleep(600)"
    with (
        pytest.raises(RunFailed, match=r"(?s)ended with code 1.*ValueError: all wrong"),
        crew(code) as workers,
    ):
        workers.wait()


def test_the_error_of_another_rank_is_raised_as_its_own() -> None:
    told = '{"error": {"type": "UserError", "what": "no such disk", "hint": "mount it"}}'
    code = (
        f"import os, sys, time\nif os.environ['RANK'] == '1': print('''{told}'''); sys.exit(2)\ntime.sleep(9)"
    )
    with pytest.raises(UserError, match="rank 1: no such disk") as caught, crew(code) as workers:
        workers.wait()
    assert caught.value.hint == "mount it"


def test_ctrl_c_does_not_reach_the_workers_twice() -> None:
    """The terminal sends SIGINT to all; the workers get one SIGTERM, from the launcher."""
    code = (
        "import os, signal, sys, time\n"
        "signal.signal(15, lambda *_: sys.exit(143))\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
        "print('{}', flush=True)\n"
        "time.sleep(600)"
    )
    with crew(code) as workers:
        while not all(worker.size_of_output() for worker in workers.workers):
            assert all(worker.code is None for worker in workers.workers)
        os.kill(os.getpid(), signal.SIGINT)
        assert workers.wait().code == 130


def test_processes_here() -> None:
    assert processes_here(recipe(hardware={"processes": 3})) == 3
    assert processes_here(recipe(hardware={"device": "cpu"})) == 1
    assert processes_here(recipe(parallel={"engine": "single"})) == 1


def test_warnings_of_processes() -> None:
    two = recipe(parallel={"engine": "ddp"}, hardware={"processes": 2}, train={"grad_accumulation": 2})
    one = recipe(parallel={"engine": "single"}, hardware={"processes": 1})
    assert idle_ranks(two, Ranks(size=2)) == [] == other_ranks(two, two) == other_ranks(None, two)
    assert "1 of 3 processes have nothing to do" in idle_ranks(two, Ranks(size=3))[0]
    assert "were ddp with 2 a machine and are single with 1" in other_ranks(two, one)[0]
