"""What replicas on a Ray cluster are told, and what they are given."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.cluster.ray_train import Nodes
from tunesmith.core.errors import UserError
from tunesmith.workflows.serve_ray import count_of, scale_of, sent_to
from tunesmith.workflows.serve_settings import ServeOptions, deployment

CPUS, GPUS = Nodes(2, 8, 0), Nodes(2, 8, 8)


def test_paths_are_named_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("model", "letters"):
        (tmp_path / name).mkdir()
    (tmp_path / "keys.json").write_text('{"version": 1, "keys": []}')
    options = ServeOptions(
        settings={"keys_file": "keys.json", "replicas": 3, "max_length": 64},
        adapters=["letters", "mails=letters", "far=s3://bucket/run"],
    )
    monkeypatch.setattr("tunesmith.workflows.serve_settings.local_path", str)
    sent = sent_to("model", deployment("model", options), options)
    assert sent["path"] == str(tmp_path / "model")
    told = sent["options"]
    here = str(tmp_path / "letters")
    assert told["adapters"] == [here, f"mails={here}", "far=s3://bucket/run"]
    assert told["settings"] == {"keys_file": str(tmp_path / "keys.json"), "replicas": 1, "max_length": 64}
    assert sent_to("a/hub-id", deployment("a/hub-id", options), options)["path"] == "a/hub-id"


def test_without_a_file_of_keys_a_replica_looks_for_none() -> None:
    options = ServeOptions(settings={"api_key": "secret"})
    told = sent_to("model", deployment("model", options), options)["options"]["settings"]
    assert told == {"keys_file": "none", "api_key": "secret", "replicas": 1}


def test_counts() -> None:
    def counted(most: int | None, **settings: object) -> tuple[int, int]:
        return count_of(deployment("model", ServeOptions(settings=settings)).settings, most)

    assert (
        counted(None) == (1, 1) and counted(None, replicas=4) == (4, 4) and counted(8, replicas=2) == (2, 8)
    )
    for most, settings, told in (
        (2, {"replicas": 3}, "--max-replicas 2"),
        (None, {"port": 0}, "--port 0"),
        (None, {"tls_cert": "a.pem"}, "--tls-cert"),
    ):
        with pytest.raises(UserError, match=told):
            counted(most, **settings)


def test_what_a_replica_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    options = ServeOptions(settings={"max_concurrent": 8, "grace_s": 5})
    wanted = deployment("model", options)
    on_cpus = scale_of(wanted, options, CPUS, 1, 2)
    assert (on_cpus.cpus, on_cpus.gpus, on_cpus.target, on_cpus.grace_s) == (1, 0, 6, 5)
    assert scale_of(wanted, ServeOptions(threads=3), CPUS, 1, 2).cpus == 3
    assert scale_of(wanted, options, GPUS, 1, 2).gpus == 1
    assert scale_of(wanted, ServeOptions(device="cpu"), GPUS, 1, 2).gpus == 0
    monkeypatch.setenv("TUNESMITH_VLLM_ARGS", "--tensor-parallel-size 4")
    spread = scale_of(wanted, options, GPUS, 1, 2)
    assert spread.gpus == 4 and spread.env == {"TUNESMITH_VLLM_ARGS": "--tensor-parallel-size 4"}
    with pytest.raises(UserError, match="has no GPU"):
        scale_of(wanted, ServeOptions(device="cuda"), CPUS, 1, 1)
