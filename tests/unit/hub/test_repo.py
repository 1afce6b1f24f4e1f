"""Fetching against a real server of ours that goes wrong in every way: right bytes, or a clear error."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.hub_server import COMMIT, Fault, Hub, git_sha1, serve_hub
from tests.repos import contents, make_model, wanted
from tunesmith.core.errors import TunesmithError, UserError
from tunesmith.core.hub_cache import fetched_folder, hub_cache
from tunesmith.core.paths import locked
from tunesmith.hub.cache import PART, repo_cache
from tunesmith.hub.repo import Snapshot, fetch_repo, plan_repo
from tunesmith.hub.selection import Selection
from tunesmith.hub.wish import Wish

NAME = "owner/tiny"
WEIGHTS = "model.safetensors"


@pytest.fixture(autouse=True)
def online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        "HF_ENDPOINT",
        "HF_HUB_CACHE",
        "HUGGINGFACE_HUB_CACHE",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    return make_model(tmp_path / "repo")


@pytest.fixture
def hub(repo: Path) -> Iterator[Hub]:
    with serve_hub({NAME: repo}) as server:
        yield server


def fetch(*hubs: Hub | str, name: str = NAME, **changes: object) -> Snapshot:
    places = tuple(hub if isinstance(hub, str) else hub.url for hub in hubs)
    wish = Wish("model", name, endpoints=places, progress=False)
    return fetch_repo(replace(wish, **changes))  # type: ignore[arg-type]


def dead_endpoint() -> str:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


def nothing_wrong_in_place(repo: Path) -> None:
    """Every file of every snapshot is the repository's, and every blob is what its name says."""
    for folder in hub_cache().glob("models--*/snapshots/*"):
        for name, content in contents(folder).items():
            assert content == (repo / name).read_bytes(), name
    known = {git_sha1(path.read_bytes()) for path in repo.rglob("*") if path.is_file()}
    for blob in hub_cache().glob("models--*/blobs/*"):
        if not blob.name.endswith(PART) and len(blob.name) == 40:
            assert blob.name in known and git_sha1(blob.read_bytes()) == blob.name


def sent_twice(hub: Hub, path: str) -> int:
    """Bytes of a file that went out more than once."""
    counts = Counter(byte for begin, end in hub.bytes_of(path) for byte in range(begin, end))
    return sum(count - 1 for count in counts.values())


def test_layout_is_the_one_of_huggingface_hub(hub: Hub, repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = fetch(hub)
    assert contents(found.folder) == wanted(repo)
    assert found.folder == hub_cache() / f"models--owner--tiny/snapshots/{COMMIT}"
    assert all(path.is_symlink() and not path.readlink().is_absolute() for path in found.folder.iterdir())
    assert (found.folder.parents[1] / "refs/main").read_text() == COMMIT
    small = (found.folder / "config.json").resolve().name
    assert small == git_sha1((repo / "config.json").read_bytes())
    from huggingface_hub import snapshot_download

    assert snapshot_download(NAME, local_files_only=True, cache_dir=hub_cache()) == str(found.folder)


def test_second_fetch_brings_nothing(hub: Hub) -> None:
    fetch(hub)
    hub.served.clear()
    fetch(hub)
    assert hub.served == []
    hub.requests.clear()
    assert fetch(hub, revision=COMMIT).commit == COMMIT
    assert hub.requests == []  # a commit cannot change


def test_files_that_are_here_are_not_fetched_again(hub: Hub, repo: Path) -> None:
    first = fetch(hub)
    (first.folder / "config.json").resolve().unlink()
    (first.folder / WEIGHTS).unlink()  # the blob stays
    hub.served.clear()
    assert contents(fetch(hub).folder) == wanted(repo)
    assert [served.path for served in hub.served] == ["config.json"]


def test_damaged_copy_in_the_cache_is_fetched_again(hub: Hub, repo: Path) -> None:
    blob = (fetch(hub).folder / WEIGHTS).resolve()
    blob.write_bytes(bytes([blob.read_bytes()[0] ^ 1]) + blob.read_bytes()[1:])
    assert contents(fetch(hub).folder) == wanted(repo)


@pytest.mark.parametrize("seed", range(3))
def test_connections_cut_at_random_points(hub: Hub, repo: Path, seed: int) -> None:
    rng = random.Random(seed)
    hub.faults += [Fault("cut", path=".", times=1, after=rng.randrange(0, 120_000)) for _ in range(12)]
    assert contents(fetch(hub).folder) == wanted(repo)
    assert sent_twice(hub, WEIGHTS) == 0


def test_partial_file_of_an_earlier_call_is_gone_on_with(hub: Hub, repo: Path) -> None:
    hub.faults.append(Fault("cut", path=WEIGHTS, times=1, after=100_000))
    hub.faults.append(Fault("status", path=WEIGHTS, status=404, skip=1))
    with pytest.raises(TunesmithError, match=r"model\.safetensors.*status 404"):
        fetch(hub)
    nothing_wrong_in_place(repo)
    assert not list(hub_cache().glob("models--*/snapshots/*"))
    hub.faults.clear()
    assert contents(fetch(hub).folder) == wanted(repo)
    assert hub.bytes_of(WEIGHTS) == [(0, 100_000), (100_000, (repo / WEIGHTS).stat().st_size)]


def test_partial_file_that_is_no_prefix_is_begun_again_once(hub: Hub, repo: Path) -> None:
    hub.faults += [
        Fault("wrong", path=WEIGHTS, times=1, after=5),
        Fault("cut", path=WEIGHTS, times=1, after=100_000),
    ]
    assert contents(fetch(hub).folder) == wanted(repo)
    assert [begin for begin, _ in hub.bytes_of(WEIGHTS)] == [0, 100_000, 0]


@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
def test_wrong_bytes_are_never_in_place(hub: Hub, repo: Path, name: str) -> None:
    hub.faults.append(Fault("wrong", path=name, after=3))
    with pytest.raises(TunesmithError) as error:
        fetch(hub)
    expected = git_sha1((repo / name).read_bytes()) if name == "config.json" else ""
    assert (
        name in error.value.what
        and f"expected {'git SHA-1 ' + expected if expected else 'SHA-256'}" in error.value.what
    )
    nothing_wrong_in_place(repo)
    assert len(hub.bytes_of(name)) == 2  # one fresh try
    hub.faults.clear()
    assert contents(fetch(hub).folder) == wanted(repo)


def test_wrong_size_is_named(hub: Hub, repo: Path) -> None:
    hub.faults.append(Fault("short", path=WEIGHTS))
    size = (repo / WEIGHTS).stat().st_size
    with pytest.raises(TunesmithError, match=f"expected {size} bytes, it offers {size - 1}"):
        fetch(hub)
    nothing_wrong_in_place(repo)


@pytest.mark.parametrize("kind", ["wrong", "short"])
def test_second_mirror_heals_the_first(hub: Hub, repo: Path, kind: str) -> None:
    hub.faults.append(Fault(kind, path=WEIGHTS, after=3))
    with serve_hub({NAME: repo}) as second:
        assert contents(fetch(hub, second).folder) == wanted(repo)
        assert second.bytes_of("config.json") == []


def test_second_mirror_goes_on_where_the_first_broke_off(hub: Hub, repo: Path) -> None:
    hub.faults.append(Fault("cut", path=WEIGHTS, times=1, after=100_000))
    hub.faults.append(Fault("status", path=WEIGHTS, status=503, skip=1))
    with serve_hub({NAME: repo}) as second:
        assert contents(fetch(hub, second).folder) == wanted(repo)
        assert second.bytes_of(WEIGHTS) == [(100_000, (repo / WEIGHTS).stat().st_size)]


def test_second_mirror_with_other_content_is_refused(hub: Hub, repo: Path, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", seed=7)
    hub.faults.append(Fault("status", path=WEIGHTS, status=404))
    with serve_hub({NAME: other}) as second, pytest.raises(TunesmithError, match="expected hash"):
        fetch(hub, second)
    nothing_wrong_in_place(repo)
    assert not list(hub_cache().rglob(f"{'?' * 64}{PART}"))  # refused before its first byte


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_status_that_passes(hub: Hub, repo: Path, status: int) -> None:
    hub.faults += [
        Fault("status", path=".", times=2, status=status, retry_after="0.1"),
        Fault("status", path="/api", times=1, status=status, retry_after="0.1"),
    ]
    assert contents(fetch(hub).folder) == wanted(repo)


def test_retry_after_is_obeyed(hub: Hub) -> None:
    hub.faults.append(Fault("status", path=WEIGHTS, times=1, status=429, retry_after="1"))
    began = time.monotonic()
    fetch(hub)
    assert time.monotonic() - began >= 1


def test_server_without_ranges(hub: Hub, repo: Path) -> None:
    hub.faults += [Fault("no-range"), Fault("cut", path=WEIGHTS, times=2, after=100_000)]
    assert contents(fetch(hub).folder) == wanted(repo)


def test_range_that_begins_elsewhere(hub: Hub, repo: Path) -> None:
    hub.faults += [Fault("shifted"), Fault("cut", path=WEIGHTS, times=1, after=100_000)]
    assert contents(fetch(hub).folder) == wanted(repo)


def test_slow_mirror_is_left_for_the_next(hub: Hub, repo: Path) -> None:
    hub.faults.append(Fault("slow", path=WEIGHTS, rate=20_000))  # 15 s for the file
    with serve_hub({NAME: repo}) as second:
        began = time.monotonic()
        found = fetch(hub, second, slow_kib_per_s=200.0, slow_after_s=0.5)
        assert contents(found.folder) == wanted(repo)
        assert time.monotonic() - began < 5
        ((begin, end),) = second.bytes_of(WEIGHTS)
        assert 0 < begin < end == (repo / WEIGHTS).stat().st_size


def test_slow_mirror_that_is_alone_is_borne(hub: Hub, repo: Path) -> None:
    hub.faults.append(Fault("slow", path=WEIGHTS, rate=200_000))
    assert contents(fetch(hub, slow_kib_per_s=1000.0, slow_after_s=0.3).folder) == wanted(repo)


def test_dead_first_mirror_is_passed_quickly(hub: Hub, repo: Path) -> None:
    began = time.monotonic()
    assert contents(fetch(dead_endpoint(), hub).folder) == wanted(repo)
    assert time.monotonic() - began < 2


def test_silent_first_mirror_is_passed(hub: Hub, repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "0.5")
    hub.faults.append(Fault("silent", path="/api"))
    with serve_hub({NAME: repo}) as second:
        assert contents(fetch(hub, second).folder) == wanted(repo)


def test_mirror_that_dies_during_the_fetch(hub: Hub, repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "0.5")
    hub.faults.append(Fault("silent", path=WEIGHTS))
    with serve_hub({NAME: repo}) as second:
        assert contents(fetch(hub, second).folder) == wanted(repo)


@pytest.mark.parametrize(
    "lacks",
    [
        {"blobs": False},
        {"blobs": False, "tree": False},
        {"blobs": False, "tree": False, "head": False},
        {"query": False},
    ],
)
def test_server_that_publishes_less(hub: Hub, repo: Path, lacks: dict[str, bool]) -> None:
    for name, value in lacks.items():
        setattr(hub.state, name, value)
    hub.faults.append(Fault("cut", path=WEIGHTS, times=1, after=100_000))
    assert contents(fetch(hub).folder) == wanted(repo)
    again = Counter(path for path, *_ in ((served.path,) for served in hub.served))
    fetch(hub)
    assert lacks.get("head") is False or again == Counter(served.path for served in hub.served)


@pytest.mark.parametrize(
    "bad", ["../x.json", "/etc/x.json", "a/../../x.json", "a//x.json", "x\n.json", "config.json/x"]
)
def test_names_that_lead_outside_are_refused(hub: Hub, tmp_path: Path, bad: str) -> None:
    hub.extra_names.append(bad)
    with pytest.raises(TunesmithError, match="is refused"):
        fetch(hub)
    assert not list(tmp_path.rglob("x.json")) and hub.served == []


def test_strange_names(hub: Hub, repo: Path) -> None:
    names = ["data/a b.json", "数据/行 #1?.json", "deep/er/100%.large", "data/+&=;.json"]
    for name in names:
        (repo / name).parent.mkdir(parents=True, exist_ok=True)
        (repo / name).write_text(name)
    found = fetch(hub, selection=Selection(allow=("*/*",)))
    assert contents(found.folder) == {name: name.encode() for name in names}


def test_equal_files_come_once(hub: Hub, repo: Path) -> None:
    (repo / "twin.json").write_bytes((repo / "config.json").read_bytes())
    assert contents(fetch(hub).folder) == wanted(repo)
    assert len(hub.bytes_of("twin.json")) + len(hub.bytes_of("config.json")) == 1


def test_repository_without_files(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    hub.repos["owner/none"] = hub.datasets["owner/none"] = tmp_path / "none"
    for kind in ("model", "dataset"):
        with pytest.raises(UserError, match="holds no"):
            fetch_repo(Wish(kind, "owner/none", endpoints=(hub.url,)))  # type: ignore[arg-type]


def test_disk_is_checked_first(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunesmith.core.paths.free_bytes", lambda folder: 1000)
    with pytest.raises(TunesmithError, match=r"needs .* of disk, but .* has 1000 B free"):
        fetch(hub)
    assert hub.served == []


def test_two_at_once_fetch_each_file_once(hub: Hub, repo: Path) -> None:
    hub.faults.append(Fault("slow", path=WEIGHTS, rate=1_000_000))
    found: list[Snapshot] = []
    threads = [threading.Thread(target=lambda: found.append(fetch(hub))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [contents(snapshot.folder) for snapshot in found] == [wanted(repo)] * 2
    assert all(count == 1 for count in Counter(served.path for served in hub.served).values())


def test_plan_tells_what_is_here_and_what_is_to_come(hub: Hub, repo: Path) -> None:
    hub.faults += [
        Fault("cut", path=WEIGHTS, times=1, after=100_000),
        Fault("status", path=WEIGHTS, status=404, skip=1),
    ]
    with pytest.raises(TunesmithError):
        fetch(hub, jobs=1)
    plan = plan_repo(Wish("model", NAME, endpoints=(hub.url,)))
    total = sum(len(content) for content in wanted(repo).values())
    here = sum(file.size or 0 for file in plan.files if file.path in plan.whole)
    assert plan.missing_bytes == total - here - 100_000


def test_tokens_stay_with_the_host_they_are_for(
    hub: Hub, repo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "ms_secret")
    fetch(hub)  # named by an option or a recipe: no token
    assert not any("secret" in str(headers) for _, headers in hub.headers)
    (fetched_folder("model", NAME) / WEIGHTS).resolve().unlink()  # type: ignore[operator]
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    fetch(hub)
    told = {
        url: headers.get("authorization")
        for url, headers in hub.headers
        if "/store/" in url or "resolve" in url
    }
    assert told[f"{hub.url}/owner/tiny/resolve/{COMMIT}/{WEIGHTS}"] == "Bearer hf_secret"
    assert [token for url, token in told.items() if url.startswith(hub.store.url)] == [None]
    assert not any("ms_secret" in str(headers) for _, headers in hub.headers)


def test_gated_repository_opens_to_the_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.gated.add(NAME)
    hub.tokens.add("hf_secret")
    with pytest.raises(UserError, match="gated") as error:
        fetch(hub)
    assert error.value.hint is not None and "HF_TOKEN" in error.value.hint
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    assert fetch(hub).commit == COMMIT


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_modelscope_layout(hub: Hub, repo: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.datasets[NAME] = repo
    for number in range(150):
        (repo / f"row {number}.json").write_text(str(number))
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub.url)
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "ms_secret")
    hub.faults.append(Fault("cut", path=WEIGHTS, times=1, after=1000))
    found = fetch_repo(Wish(kind, NAME, endpoints=("modelscope",), progress=False))  # type: ignore[arg-type]
    expected = (
        wanted(repo)
        if kind == "model"
        else wanted(repo) | {"consolidated.safetensors": (repo / "consolidated.safetensors").read_bytes()}
    )
    assert contents(found.folder) == expected and found.commit == COMMIT
    assert sent_twice(hub, WEIGHTS) == 0
    assert all(headers.get("cookie") == "m_session_id=ms_secret" for _, headers in hub.headers)


def test_modelscope_finishes_what_a_hub_began(hub: Hub, repo: Path) -> None:
    hub.faults.append(Fault("status", path=WEIGHTS, status=500, times=2))
    with serve_hub({NAME: repo}) as second:
        assert contents(fetch(hub, f"modelscope:{second.url}").folder) == wanted(repo)
        assert second.requests == [f"GET /api/v1/models/{NAME}/repo"]


def test_unknown_model_at_modelscope(hub: Hub) -> None:
    with pytest.raises(UserError, match="no such model"):
        fetch(f"modelscope:{hub.url}", name="owner/none")


def test_folder_as_an_endpoint(repo: Path, tmp_path: Path) -> None:
    (tmp_path / "usb/owner").mkdir(parents=True)
    repo.rename(tmp_path / "usb/owner/tiny")
    found = fetch(str(tmp_path / "usb"), offline=True)  # a folder is no network
    assert contents(found.folder) == wanted(tmp_path / "usb/owner/tiny")
    assert fetch(str(tmp_path / "usb"), offline=True).folder == found.folder
    with pytest.raises(UserError, match="no such model"):
        fetch(str(tmp_path / "usb"), name="owner/none")


def test_copied_cache_as_an_endpoint(
    hub: Hub, repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = hub_cache()
    fetch(hub, revision="v1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "other"))
    found = fetch(str(old), revision="v1")
    assert (found.commit, contents(found.folder)) == (COMMIT, wanted(repo))


def test_who_waits_for_another_process_is_told(
    hub: Hub, repo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = threading.Event()

    def hold() -> None:
        with locked(repo_cache("model", NAME).lock_target):
            held.set()
            time.sleep(2.5)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    assert contents(fetch(hub).folder) == wanted(repo)
    assert "another process is fetching it" in capsys.readouterr().err
    thread.join()
