"""The project folder, the compose file that is kept, and what is prepared or refused before docker is asked."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tunesmith.core.errors import UserError
from tunesmith.workflows.compose_project import (
    Project,
    Wanted,
    caller,
    choose_gpus,
    open_project,
    prepare,
    render,
    update_compose_file,
)
from tunesmith.workflows.container_state import Container, listens_on
from tunesmith.workflows.containers import logs, render_compose, shell, up

CDI_SPEC = 'cdiVersion: "0.5.0"\nkind: nvidia.com/gpu\n'


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    folder = tmp_path / "shop"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return open_project(None)


def wanted(**given: Any) -> Wanted:
    return Wanted(**{"gpus": "none"} | given)


# -- how GPUs are given ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("info", "specs", "hook", "answer"),
    [
        ({"CDISpecDirs": ["/etc/cdi"], "Runtimes": {"nvidia": {}}}, [CDI_SPEC], True, "cdi"),
        ({"CDISpecDirs": ["/etc/cdi"], "Runtimes": {"runc": {}, "nvidia": {}}}, [], False, "nvidia"),
        ({"CDISpecDirs": ["/etc/cdi"]}, ["kind: intel.com/gpu"], True, "nvidia"),
        ({"CDISpecDirs": None, "Runtimes": {"nvidia": {}}}, [CDI_SPEC], False, "nvidia"),
        ({}, [CDI_SPEC], True, "nvidia"),
    ],
)
def test_cdi_before_the_hook(info: dict[str, Any], specs: list[str], hook: bool, answer: str) -> None:
    assert choose_gpus(info, specs, hook) == answer


def test_a_gpu_that_docker_cannot_give_is_no_silent_cpu() -> None:
    with pytest.raises(UserError, match="cannot give it") as caught:
        choose_gpus({"Runtimes": {"runc": {}}, "CDISpecDirs": []}, [], False)
    assert "tunesmith setup" in str(caught.value.hint) and "--gpus none" in str(caught.value.hint)


# -- who the containers run as ---------------------------------------------------------------------------


def test_the_caller_behind_sudo_is_who_called_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SUDO_UID", raising=False)
    assert caller(None) == (os.getuid(), os.getgid())
    assert caller("1000:50") == (1000, 50)
    if os.getuid() == 0:
        monkeypatch.setenv("SUDO_UID", "1001")
        monkeypatch.setenv("SUDO_GID", "1002")
        assert caller(None) == (1001, 1002)


@pytest.mark.parametrize("user", ["ada", "1000", "1000:", ":1", "-1:1", "1000:1000 ", "1;id:1", ""])
def test_a_user_is_two_numbers(user: str) -> None:
    with pytest.raises(UserError, match="is not UID:GID"):
        caller(user)


# -- the compose file that is kept -----------------------------------------------------------------------


def test_two_folders_of_one_name_are_two_projects(tmp_path: Path) -> None:
    first, second = (open_project(tmp_path / name / "My Shop!" / ".tunesmith") for name in ("a", "b"))
    assert first.name.startswith("tunesmith-my-shop-") and first.name != second.name


def test_the_file_is_written_once_and_then_kept(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    update_compose_file(project, ["lab"], wanted(lab_port=9000), anew=False)
    text = project.compose_file.read_text()
    assert text == render_compose(["lab"], wanted(lab_port=9000)) and "127.0.0.1:9000:8888" in text
    assert (project.folder / ".env").read_text() == f"COMPOSE_PROJECT_NAME={project.name}\n"
    assert "secrets/" in (project.folder / ".gitignore").read_text()

    edited = text.replace("unless-stopped", "always")
    project.compose_file.write_text(edited)
    update_compose_file(project, ["lab"], Wanted(), anew=False)
    assert project.compose_file.read_text() == edited
    assert "as it is" in capsys.readouterr().err


def test_a_missing_service_is_added(project: Project) -> None:
    update_compose_file(project, ["lab"], wanted(), anew=False)
    edited = project.compose_file.read_text().replace("unless-stopped", "always")
    project.compose_file.write_text(edited)
    update_compose_file(project, ["serve"], wanted(run="smollm2-135m-instruct"), anew=False)
    assert list(project.services()) == ["lab", "serve"] and '"always"' in project.compose_file.read_text()


def test_an_option_that_would_change_a_kept_service_is_not_passed_over(project: Project) -> None:
    update_compose_file(project, ["lab"], wanted(lab_port=9000), anew=False)
    update_compose_file(project, ["lab"], wanted(lab_port=9000), anew=False)  # the same again changes nothing
    before = project.compose_file.read_text()
    with pytest.raises(UserError, match="has the service lab already") as caught:
        update_compose_file(project, ["lab"], wanted(shm_gib=3), anew=False)
    assert "--shm-size" in caught.value.what and "--render" in str(caught.value.hint)
    assert project.compose_file.read_text() == before
    update_compose_file(project, ["lab"], wanted(shm_gib=3), anew=True)
    assert "shm_size: 3g" in project.compose_file.read_text()
    assert (project.folder / "compose.yaml.old").read_text() == before


def test_train_and_serve_say_what_they_need(project: Project, tmp_path: Path) -> None:
    for name, words in (("train", "--recipe"), ("serve", "--run"), ("labb", "lab, train, serve")):
        with pytest.raises(UserError) as caught:
            update_compose_file(project, [name], wanted(), anew=False)
        assert words in str(caught.value)
    with pytest.raises(UserError, match="no such recipe"):
        render_compose(["train"], wanted(recipe=tmp_path / "nowhere.yaml"))
    assert not project.folder.exists()


def test_serve_goes_by_the_recipe_of_its_run(project: Project, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "orders"
    (run / "checkpoints").mkdir(parents=True)
    begun = "model: {path: x}\ndata: {sources: [{path: rows.jsonl}]}\nserve: {grace_s: 60%s}\n"
    (run / "recipe.yaml").write_text(begun % "")
    assert "stop_grace_period: 67s" in render(project, ["serve"], wanted(run=str(run)))
    assert "stop_grace_period: 15s" in render(project, ["serve"], wanted(run="some/model"))
    (run / "recipe.yaml").write_text(begun % ", tls_cert: cert.pem")
    with pytest.raises(UserError, match="over plain http"):
        render(project, ["serve"], wanted(run=str(run)))


def test_folders_that_are_files(project: Project, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        render_compose(["lab"], wanted(data=tmp_path / "file"))
    with pytest.raises(UserError, match="is a file"):
        open_project(tmp_path / "file")


# -- what is made before the start -----------------------------------------------------------------------


def test_folders_and_secrets_are_made_and_kept(project: Project) -> None:
    update_compose_file(project, ["lab"], wanted(), anew=False)
    assert prepare(project, ["lab"]) is False
    token = project.secrets / "lab_token"
    first = token.read_text()
    assert len(first) >= 40 and token.stat().st_mode & 0o777 == 0o600
    assert project.secrets.stat().st_mode & 0o777 == 0o700
    assert all(Path(name).is_dir() for name in ("data", "runs", "notebooks"))
    assert prepare(project, ["lab"]) is False and token.read_text() == first
    assert prepare(project, ["lab"], token="another-token-of-mine") is True
    assert token.read_text() == "another-token-of-mine" and token.stat().st_mode & 0o777 == 0o600


@pytest.mark.skipif(os.getuid() != 0, reason="only root makes files for another user")
def test_they_belong_to_the_user_of_the_service(project: Project) -> None:
    update_compose_file(project, ["lab"], wanted(user="1234:1235", data=Path("deep/er/data")), anew=False)
    prepare(project, ["lab"])
    for path in (
        Path("deep"),
        Path("deep/er/data"),
        Path("runs"),
        project.home,
        project.secrets / "lab_token",
    ):
        status = path.stat()
        assert (status.st_uid, status.st_gid) == (1234, 1235), path


@pytest.mark.skipif(os.getuid() != 0, reason="needs a folder of another user")
def test_a_folder_that_the_user_cannot_write_is_refused(project: Project) -> None:
    Path("runs").mkdir(mode=0o755)
    update_compose_file(project, ["lab"], wanted(user="1234:1235"), anew=False)
    with pytest.raises(UserError, match="runs: belongs to uid 0") as caught:
        prepare(project, ["lab"])
    assert "chown -R 1234:1235" in str(caught.value.hint)


def test_a_password_that_is_gone_is_asked_for_again(project: Project) -> None:
    update_compose_file(project, ["lab"], wanted(password="long enough", bind="0.0.0.0"), anew=False)
    with pytest.raises(UserError, match="password is not set"):
        prepare(project, ["lab"])
    assert prepare(project, ["lab"], password_config="{}") is False
    assert prepare(project, ["lab"]) is False
    assert prepare(project, ["lab"], password_config='{"a": 1}') is True


def test_a_missing_recipe_is_not_made_a_folder(project: Project) -> None:
    recipe = Path("r.yaml")
    recipe.write_text("name: x\n")
    update_compose_file(project, ["train"], wanted(recipe=recipe), anew=False)
    recipe.unlink()
    with pytest.raises(UserError, match="not there"):
        prepare(project, ["train"])
    assert not recipe.exists()


# -- what docker tells -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "exit_code", "restarts", "health", "fault"),
    [
        ("running", 0, 0, "", ""),
        ("running", 0, 0, "starting", ""),
        ("exited", 0, 0, "", ""),
        ("exited", 0, 0, "unhealthy", ""),
        ("exited", 3, 0, "", "ended with code 3"),
        ("running", 0, 1, "starting", "ends again and again"),
        ("restarting", 1, 0, "unhealthy", "ended with code 1"),
        ("running", 0, 0, "unhealthy", "is unhealthy"),
        ("dead", 137, 0, "", "ended with code 137"),
    ],
)
def test_what_is_wrong_with_a_service(
    status: str, exit_code: int, restarts: int, health: str, fault: str
) -> None:
    one = Container("lab", "id", "image", status, health, exit_code, restarts, "", "")
    assert one.fault == fault


@pytest.mark.parametrize(
    ("command", "answer"),
    [
        (["python3", "-m", "jupyterlab", "--ServerApp.ip=::1", "--ServerApp.port=9"], ("::1", 9)),
        (["tunesmith", "serve", "m", "--host", "0.0.0.0", "--port", "8000"], ("0.0.0.0", 8000)),
        (["tunesmith", "train", "r.yaml"], ("127.0.0.1", None)),
        ([], ("127.0.0.1", None)),
    ],
)
def test_where_a_command_listens(command: list[str], answer: tuple[str, int | None]) -> None:
    assert listens_on(command) == answer


# -- refused before docker is asked ----------------------------------------------------------------------


def test_no_compose_file(project: Project) -> None:
    with pytest.raises(UserError, match="holds no compose file"):
        logs([], follow=False, tail=None)
    with pytest.raises(UserError, match="holds no compose file"):
        shell(None, [])


def test_an_unknown_service(project: Project) -> None:
    update_compose_file(project, ["lab"], wanted(), anew=False)
    with pytest.raises(UserError, match="'web' is not a service"):
        logs(["web"], follow=False, tail=None)
    with pytest.raises(UserError, match="'web' is not a service"):
        shell("web", [])


def test_an_empty_token_is_refused_before_anything_is_made(project: Project) -> None:
    with pytest.raises(UserError, match="without a token anyone"):
        up(["lab"], wanted(), token="")
    assert not project.folder.exists()
