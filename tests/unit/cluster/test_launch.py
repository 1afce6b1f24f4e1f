"""The command line of each host, written out by hand."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from tunesmith.cluster.inventory import Host, Inventory
from tunesmith.cluster.launch import Launch, make_launch, processes_on
from tunesmith.core.errors import UserError
from tunesmith.recipe.schema import Recipe

TEXT = "model: {path: m}\n"
DIGEST = "a2ae899b7e41"  # sha256 of TEXT, its first 12 digits


def recipe(**sections: Any) -> Recipe:
    values = {"model": {"path": "m"}, "data": {"sources": [{"path": "d"}]}} | sections
    return Recipe.model_validate(values)


def launch(tmp_path: Path, *, given: Recipe | None = None, here: str = "/home/me", **fields: Any) -> Launch:
    """Two hosts of which the second has two GPUs, over a shared folder."""
    path = tmp_path / "my recipe.yaml"
    path.write_text(TEXT)
    values: dict[str, Any] = {
        "hosts": [{"host": "10.0.0.5"}, {"host": "10.0.0.6", "user": "me", "gpus": 2, "python": "/opt/py"}],
        "shared": "/mnt/shared",
        "python": "/usr/bin/python3",
    }
    cluster = Inventory.model_validate(values | fields)
    return make_launch(
        given or recipe(), path, ["train.lr=1e-4"], cluster, fresh=False, command="CMD", here=Path(here)
    )


def test_the_lines_of_two_hosts(tmp_path: Path) -> None:
    found = launch(tmp_path, interface="ib0", env={"A": "b c"})
    there = """sh -c 'cd "$0" && exec "$@"' /mnt/shared env"""
    variables = "GLOO_SOCKET_IFNAME=ib0 NCCL_SOCKET_IFNAME=ib0 'A=b c' TUNESMITH_COMMAND=CMD"
    meeting = "--master-addr 10.0.0.5 --master-port 29500 --rdzv-conf timeout=120"
    training = f"-m tunesmith train '.tunesmith/{DIGEST}/my recipe.yaml' --json --set train.lr=1e-4"
    assert [shlex.join(found.on_host(number)) for number in range(2)] == [
        f"{there} {variables} /usr/bin/python3 -m tunesmith.cluster.torchrun --nnodes 2 "
        f"--node-rank 0 --nproc-per-node auto {meeting} {training}",
        f"{there} {variables} /opt/py -m tunesmith.cluster.torchrun --nnodes 2 "
        f"--node-rank 1 --nproc-per-node 2 {meeting} {training}",
    ]


def test_torchrun_reads_the_line_as_it_is_meant(tmp_path: Path) -> None:
    from torch.distributed.run import parse_args

    words = launch(tmp_path).on_host(1)
    found = parse_args(words[words.index("tunesmith.cluster.torchrun") + 1 :])
    assert (found.nnodes, found.node_rank, found.nproc_per_node) == ("2", 1, "2")
    assert (found.master_addr, found.master_port, found.rdzv_backend) == ("10.0.0.5", 29500, "static")
    assert found.module and found.training_script == "tunesmith"
    assert found.training_script_args[:2] == ["train", f".tunesmith/{DIGEST}/my recipe.yaml"]


def test_hosts_meet_where_the_first_is_reached(tmp_path: Path) -> None:
    hosts = [{"host": "gate", "address": "192.168.7.1"}, {"host": "10.0.0.6"}]
    args = launch(tmp_path, hosts=hosts, port=4000).torchrun_args(1)
    assert args[args.index("--master-addr") :][:4] == [
        "--master-addr",
        "192.168.7.1",
        "--master-port",
        "4000",
    ]


@pytest.mark.parametrize(
    ("here", "folder"),
    [("/home/me", "/mnt/shared"), ("/mnt/shared/a/b", "/mnt/shared/a/b"), ("/mnt/sharedx", "/mnt/shared")],
)
def test_relative_paths_mean_the_same_where_the_folder_is_shared(
    tmp_path: Path, here: str, folder: str
) -> None:
    assert launch(tmp_path, here=here).folder == Path(folder)


def test_a_store_takes_the_run(tmp_path: Path) -> None:
    found = launch(tmp_path, shared="s3://bucket/dir/")
    assert found.folder is None and found.on_host(0)[0] == "env"
    assert found.overrides == ("train.lr=1e-4", "output_dir=s3://bucket/dir/runs")
    named = launch(tmp_path, shared="s3://bucket/dir", given=recipe(output_dir="s3://other/runs"))
    assert named.overrides == ("train.lr=1e-4",)


def test_several_hosts_need_a_shared_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cluster of 2 hosts names no 'shared' folder") as caught:
        launch(tmp_path, shared=None)
    assert "shared: /mnt/shared" in str(caught.value.hint)
    assert launch(tmp_path, shared=None, hosts=["me@10.0.0.5"]).folder is None


@pytest.mark.parametrize(
    ("host", "sections", "processes"),
    [
        ({"processes": 3, "gpus": 2}, {"hardware": {"processes": 4}}, 3),
        ({"gpus": 2}, {"hardware": {"processes": 4}}, 4),
        ({"gpus": 2}, {}, 2),
        ({"gpus": 0}, {}, 1),
        ({"gpus": 2}, {"hardware": {"device": "cpu"}}, 1),
        ({"gpus": 2}, {"parallel": {"engine": "single"}}, 1),
        ({}, {}, "auto"),
    ],
)
def test_processes_of_a_host(host: dict[str, Any], sections: dict[str, Any], processes: int | str) -> None:
    assert processes_on(Host.model_validate({"host": "h"} | host), recipe(**sections)) == processes


def test_the_recipe_leaves_the_number_of_processes_to_torchrun(tmp_path: Path) -> None:
    found = launch(tmp_path, given=recipe(hardware={"processes": 2}))
    assert found.overrides == ("train.lr=1e-4", "hardware.processes=auto") and found.processes == (2, 2)
