"""Object stores, over a real S3 server and real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.object_store import BUCKET, ObjectStore, serve_objects, set_env, use
from tunesmith.core.errors import MissingExtra, TunesmithError, UserError
from tunesmith.core.run_folder import MANIFEST, manifest_holds, write_manifest
from tunesmith.core.store import (
    PARTIAL,
    Store,
    StoreError,
    Vanished,
    get_folder,
    is_url,
    put_folder,
    remove_folder,
    stored_manifest,
)
from tunesmith.core.store_cache import fetch

PUT = "import sys; from pathlib import Path; from tunesmith.core.store import put_folder; put_folder(Path(sys.argv[1]), sys.argv[2])"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    with serve_objects(tmp_path_factory.mktemp("moto")) as found:
        yield found


@pytest.fixture
def url(server: ObjectStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A place in the store that no other test uses."""
    use(server, monkeypatch)
    return server.url(tmp_path.name)


def make_folder(path: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def test_what_is_a_url() -> None:
    assert is_url("s3://bucket/rows.jsonl") and is_url("file:///shared") and is_url("abfs+x://a")
    assert not any(map(is_url, ("rows.jsonl", "owner/name", "/s3://x", "./a://b", "C:/x", "S3://b")))


def test_objects(url: str, tmp_path: Path) -> None:
    store = Store(url)
    assert store.list() == {} and store.read("none") is None
    store.write("deep/er/one", b"1")
    (tmp_path / "two").write_bytes(b"22")
    store.put(tmp_path / "two", "two")
    Store(url + "2").write("other", b"a name that begins alike")
    assert {name: entry.num_bytes for name, entry in store.list().items()} == {"deep/er/one": 1, "two": 2}
    mark = store.list()["two"].mark
    store.write("two", b"33")
    assert store.list()["two"].mark != mark and store.read("two") == b"33"
    store.get("deep/er/one", tmp_path / "new" / "one")
    assert (tmp_path / "new" / "one").read_bytes() == b"1"
    store.copy("two", "three")
    store.remove(["two", "not there"])
    assert sorted(store.list()) == ["deep/er/one", "three"] and store.read("three") == b"33"
    with pytest.raises(Vanished):
        store.get("two", tmp_path / "gone")


def test_a_folder_there_and_back(url: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "a", {"x.bin": b"x" * 1000, "sub/y": b"", "old": b"1"})
    write_manifest(folder, step=7)
    put_folder(folder, url)
    before = Store(url).list()
    put_folder(folder, url)
    assert Store(url).list() == before, "an unchanged folder was written again"
    assert sorted(before) == [MANIFEST, "old", "sub/y", "x.bin"]
    get_folder(url, tmp_path / "b")
    assert manifest_holds(tmp_path / "b")
    assert json.loads((tmp_path / "b" / MANIFEST).read_text())["step"] == 7
    (folder / "old").unlink()
    (folder / MANIFEST).unlink()
    put_folder(folder, url)
    assert sorted(Store(url).list()) == [MANIFEST, "sub/y", "x.bin"]
    remove_folder(url)
    assert Store(url).list() == {}


def test_files_of_others_are_never_replaced(url: str, tmp_path: Path) -> None:
    Store(url).write("thesis.tex", b"years of work")
    folder = make_folder(tmp_path / "a", {"x": b"x"})
    with pytest.raises(UserError, match=r"holds other files \(s3://.*thesis.tex\)"):
        put_folder(folder, url)
    put_folder(folder, url + "/below")
    Store(url).write("below/notes", b"added later")
    (folder / "x").write_bytes(b"new")
    with pytest.raises(UserError, match="below/notes"):
        put_folder(folder, url + "/below")
    assert Store(url).read("below/x") == b"x"


def test_a_harmed_folder_is_refused(url: str, tmp_path: Path) -> None:
    put_folder(make_folder(tmp_path / "a", {"x": b"right", "y": b"y"}), url)
    Store(url).write("x", b"wrong")
    with pytest.raises(StoreError, match="x is not as it was written"):
        get_folder(url, tmp_path / "b")
    with pytest.raises(StoreError, match="x is not as it was written"):
        fetch(url)
    Store(url).remove(["y"])
    with pytest.raises(StoreError, match="y is missing"):
        fetch(url)
    assert not (tmp_path / "b").exists()


def test_names_that_lead_out_of_the_folder(url: str, tmp_path: Path) -> None:
    store = Store(url)
    entry = {"bytes": 1, "sha256": "0" * 64}
    store.write(MANIFEST, json.dumps({"files": {"../../evil": entry}}).encode())
    with pytest.raises(UserError, match="leads out of its folder"):
        get_folder(url, tmp_path / "b")


@pytest.mark.parametrize("before", [False, True], ids=["new", "over an older one"])
def test_sigkill_while_uploading_leaves_no_half_folder(url: str, tmp_path: Path, before: bool) -> None:
    """A real process, killed after some of its files are there; the next one removes what it left."""
    if before:
        put_folder(make_folder(tmp_path / "old", {f"old-{n}": b"old" for n in range(3)}), url)
    folder = make_folder(tmp_path / "a", {f"part-{n:03d}": os.urandom(2000) for n in range(300)})
    write_manifest(folder)
    store = Store(url)
    process = subprocess.Popen([sys.executable, "-c", PUT, str(folder), url])
    end = time.monotonic() + 120
    while not any(name.startswith("part-") for name in store.list()):
        assert process.poll() is None and time.monotonic() < end
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = store.list()
    assert PARTIAL in left and 0 < sum(name.startswith("part-") for name in left) < 300
    assert stored_manifest(store) is None
    with pytest.raises(UserError, match="no whole folder"):
        get_folder(url, tmp_path / "b")
    with pytest.raises(UserError, match="this folder is not whole"):
        fetch(url)
    (folder / "part-000").unlink()  # of another make than the one that was cut off
    write_manifest(folder)
    put_folder(folder, url)
    assert len(store.list()) == 300 and "part-000" not in store.list()
    get_folder(url, tmp_path / "b")
    assert manifest_holds(tmp_path / "b")


def test_parts_of_a_cut_upload_are_removed(url: str, tmp_path: Path) -> None:
    """Those of this folder alone."""
    store, folder = Store(url), make_folder(tmp_path / "a", {"x": b"x"})
    key = url.removeprefix(f"s3://{BUCKET}/")
    for name in (f"{key}/x", f"{key}2/x"):
        store._fs.call_s3("create_multipart_upload", Bucket=BUCKET, Key=name)
    put_folder(folder, url)
    open_uploads = {upload["Key"] for upload in store._fs.list_multipart_uploads(BUCKET)}
    assert f"{key}/x" not in open_uploads and f"{key}2/x" in open_uploads


# -- the cache ----------------------------------------------------------------------------------------------


def test_fetch_brings_only_what_changed(url: str) -> None:
    store = Store(url)
    for name in ("one", "sub/two"):
        store.write(name, name.encode())
    folder = fetch(url)
    assert folder.name == url.rpartition("/")[2]
    assert (folder / "sub/two").read_bytes() == b"sub/two"
    kept = (folder / "one").stat().st_ino
    assert fetch(url) == folder and (folder / "one").stat().st_ino == kept
    store.write("sub/two", b"changed")
    store.write("three", b"3")
    assert fetch(url) == folder
    assert (folder / "sub/two").read_bytes() == b"changed" and (folder / "one").stat().st_ino == kept
    store.remove(["one"])
    assert sorted(p.name for p in fetch(url).rglob("*") if p.is_file()) == ["three", "two"]


def test_fetch_a_file(url: str) -> None:
    Store(url).write("rows.jsonl", b"{}\n")
    assert fetch(url + "/rows.jsonl").name == "rows.jsonl"
    assert fetch(url + "/rows.jsonl").read_bytes() == b"{}\n"
    with pytest.raises(UserError, match="there is nothing at this URL"):
        fetch(url + "/rows")


def test_fetch_of_a_run_takes_its_newest_whole_checkpoint(url: str, tmp_path: Path) -> None:
    store = Store(url)
    for name in ("recipe.yaml", "lock.json", "events.jsonl", "export/adapter/x"):
        store.write(name, b"{}")
    assert (fetch(url) / "checkpoints").is_dir()
    for step in (2, 4):
        folder = make_folder(tmp_path / str(step), {"w": b"w"})
        put_folder(folder, f"{url}/checkpoints/step-{step:06d}")
    store.write("checkpoints/step-000006/w", b"half")
    found = [p.relative_to(fetch(url)).as_posix() for p in fetch(url).rglob("w")]
    assert found == ["checkpoints/step-000004/w"]
    assert [p.parent.name for p in fetch(url, step=2).rglob("w")] == ["step-000002"]
    with pytest.raises(UserError, match="--checkpoint 6") as caught:
        fetch(url, step=6)
    assert caught.value.hint == "complete are: 2, 4"


# -- what goes wrong ----------------------------------------------------------------------------------------


def test_no_bucket(url: str) -> None:
    for call in (lambda s: s.list(), lambda s: s.read("x"), lambda s: s.write("x", b"")):
        with pytest.raises(UserError, match="there is no such bucket"):
            call(Store("s3://no-such-bucket/x"))


def test_no_credentials(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    set_env(monkeypatch, {})
    with pytest.raises(UserError, match="no credentials for the store") as caught:
        Store(url + "-none").list()
    assert "AWS_ACCESS_KEY_ID" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("endpoint", "kind", "what"),
    [
        ("http://127.0.0.1:1", StoreError, "the store cannot be reached"),
        ("nonsense", UserError, "Invalid endpoint"),
        ("{}/moto-api", UserError, "as no store does"),
    ],
    ids=["nobody listens", "no URL", "no store"],
)
def test_wrong_endpoint(
    url: str,
    server: ObjectStore,
    monkeypatch: pytest.MonkeyPatch,
    endpoint: str,
    kind: type[TunesmithError],
    what: str,
) -> None:
    set_env(monkeypatch, {"AWS_ENDPOINT_URL": endpoint.format(server.endpoint)})
    with pytest.raises(kind, match=what) as caught:
        Store(url).list()
    assert "AWS_ENDPOINT_URL" in (caught.value.hint or "") and "Traceback" not in str(caught.value)


def test_a_full_disk_is_told_before_anything_is_brought(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Store(url).write("x", b"x" * 100)
    monkeypatch.setattr("tunesmith.core.paths.free_bytes", lambda folder: 50)
    with pytest.raises(TunesmithError, match="needs 100 B of disk"):
        fetch(url)


@pytest.mark.parametrize(
    "text", ["https://host/rows.jsonl", "ray://head:10001", "nosuch://x/y", "s3://", "s3:///"]
)
def test_what_is_no_store(text: str) -> None:
    with pytest.raises(UserError):
        Store(text)


def test_a_store_whose_package_is_missing() -> None:
    with pytest.raises(UserError, match="ossfs") as caught:
        Store("oss://bucket/x")
    assert "fsspec" in (caught.value.hint or "")


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(MissingExtra, match="fsspec"):
        Store("s3://bucket/x")


def test_a_shared_folder_is_a_store_too(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "a", {"sub/x": b"x"})
    put_folder(folder, f"file://{tmp_path}/shared/deep")
    get_folder(f"file://{tmp_path}/shared/deep", tmp_path / "b")
    assert (tmp_path / "b/sub/x").read_bytes() == b"x"
