"""A bundle in the making, and what verify says of every kind of damage."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tunesmith.core.errors import TunesmithError, UserError
from tunesmith.hub.bundle_files import PARTIAL, find_faults, put, read_entry
from tunesmith.hub.bundle_manifest import MANIFEST, SUMS, Manifest, open_manifest
from tunesmith.hub.bundle_store import Store, check_disk, slug

FILES = {"a.txt": b"first\n", "deep/b.bin": bytes(range(256)), "empty": b""}


def fill(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def make(bundle: Path, *, volume_bytes: int | None = None, files: dict[str, bytes] = FILES) -> Manifest:
    store = Store(bundle, volume_bytes=volume_bytes)
    request = {"size": len(files)}
    if store.keep("data", "rows", request) is None:
        store.add("data", "rows", "data", request, fill(store.staging("data", "rows"), files))
    return store.finish()


def told(bundle: Path) -> list[str]:
    return [fault.path for fault in find_faults(bundle, open_manifest(bundle))]


def test_a_whole_bundle_has_no_fault_and_coreutils_agree(tmp_path: Path) -> None:
    made = make(tmp_path / "b")
    assert open_manifest(tmp_path / "b") == made and told(tmp_path / "b") == []
    assert not (tmp_path / "b" / PARTIAL).exists()
    done = subprocess.run(["sha256sum", "--check", "--strict", SUMS], cwd=tmp_path / "b", capture_output=True)
    assert done.returncode == 0, done.stderr


def test_a_flipped_bit_in_any_byte_of_any_file_is_found_and_named(tmp_path: Path) -> None:
    bundle = tmp_path / "b"
    make(bundle, volume_bytes=100)
    for path in sorted(p for p in bundle.rglob("*") if p.is_file()):
        name, whole = str(path.relative_to(bundle)), path.read_bytes()
        for place in range(len(whole)):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            try:
                assert name in told(bundle), (name, place)
            except UserError as error:
                assert name == MANIFEST and MANIFEST in error.what, (name, place)
        path.write_bytes(whole)
    assert told(bundle) == []


def test_missing_extra_short_long_renamed_and_linked_files_are_named(tmp_path: Path) -> None:
    bundle = tmp_path / "b"
    make(bundle)
    target = bundle / "data" / "a.txt"
    whole = target.read_bytes()
    target.write_bytes(whole[:-1])
    assert told(bundle) == ["data/a.txt"]
    target.write_bytes(whole + b"x")
    assert told(bundle) == ["data/a.txt"]
    target.rename(bundle / "data" / "c.txt")
    assert told(bundle) == ["data/a.txt", "data/c.txt"]
    target.symlink_to("c.txt")
    faults = find_faults(bundle, open_manifest(bundle))
    assert str(faults[0]) == "data/a.txt: a link, not a file"
    target.unlink()
    (bundle / "data" / "c.txt").unlink()
    target.write_bytes(whole)
    (bundle / SUMS).unlink()
    assert told(bundle) == [SUMS]


@pytest.mark.parametrize("volume_bytes", [1, 7, 100, 128, 255, 256, 1000])
def test_large_files_are_cut_and_joined_again(tmp_path: Path, volume_bytes: int) -> None:
    bundle = tmp_path / "b"
    manifest = make(bundle, volume_bytes=volume_bytes)
    sizes = [p.stat().st_size for p in (bundle / "data").rglob("*") if p.is_file()]
    assert max(sizes) <= max(volume_bytes, 0) and told(bundle) == []
    for name, content in FILES.items():
        assert b"".join(read_entry(bundle, manifest.files[f"data/{name}"])) == content
    assert sum(sizes) == sum(map(len, FILES.values()))


def test_packages_stay_whole(tmp_path: Path) -> None:
    store = Store(tmp_path / "b", volume_bytes=10)
    store.add("packages", "debian-12", "packages/debian-12", {}, fill(store.staging("packages", "d"), FILES))
    manifest = store.finish()
    assert not any(entry.pieces for entry in manifest.files.values()) and told(tmp_path / "b") == []


def test_a_second_call_keeps_what_is_whole_and_collects_what_is_not(tmp_path: Path) -> None:
    bundle = tmp_path / "b"
    first = make(bundle)
    when = (bundle / "data" / "a.txt").stat().st_mtime_ns
    assert make(bundle) == first and (bundle / "data" / "a.txt").stat().st_mtime_ns == when
    (bundle / "data" / "a.txt").write_bytes(b"FIRST\n")
    assert make(bundle) == first and told(bundle) == []
    (bundle / "data" / "stray").write_bytes(b"x")
    assert make(bundle) == first and not (bundle / "data" / "stray").exists()


def test_a_call_that_was_stopped_goes_on_item_by_item(tmp_path: Path) -> None:
    bundle = tmp_path / "b"
    store = Store(bundle)
    store.add("data", "one", "data/one", {}, fill(store.staging("data", "one"), FILES))
    fill(store.staging("data", "two"), {"half": b"downloaded"})
    with pytest.raises(UserError, match="never finished"):
        open_manifest(bundle)
    again = Store(bundle)
    assert again.keep("data", "one", {}) is not None
    assert (again.staging("data", "two") / "half").read_bytes() == b"downloaded"
    again.add("data", "two", "data/two", {}, again.staging("data", "two"))
    assert [item.name for item in again.finish().items] == ["one", "two"] and told(bundle) == []


def test_from_the_first_change_on_an_older_manifest_no_longer_counts(tmp_path: Path) -> None:
    bundle = tmp_path / "b"
    make(bundle)
    Store(bundle)
    assert not (bundle / MANIFEST).exists()
    assert make(bundle).items


def test_another_request_is_collected_anew(tmp_path: Path) -> None:
    store = Store(tmp_path / "b")
    store.add("data", "rows", "data", {"revision": 1}, fill(store.staging("data", "rows"), FILES))
    store.finish()
    assert Store(tmp_path / "b").keep("data", "rows", {"revision": 2}) is None


def test_a_damaged_journal_means_everything_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = tmp_path / "b"
    make(bundle)
    (bundle / MANIFEST).write_text("{")
    assert make(bundle).items and told(bundle) == []
    assert "collected anew" in capsys.readouterr().err


def test_a_folder_with_other_things_is_not_touched(tmp_path: Path) -> None:
    fill(tmp_path, {"thesis.tex": b"x"})
    with pytest.raises(UserError, match="something else than a bundle"):
        Store(tmp_path)
    with pytest.raises(UserError, match="is a file"):
        Store(tmp_path / "thesis.tex")
    assert list(tmp_path.iterdir()) == [tmp_path / "thesis.tex"]


def test_put_never_leaves_wrong_bytes_in_place(tmp_path: Path) -> None:
    bundle, target = tmp_path / "b", tmp_path / "out" / "b.bin"
    entry = make(bundle).files["data/deep/b.bin"]
    put(bundle, entry, target)
    assert target.read_bytes() == FILES["deep/b.bin"]
    (bundle / "data" / "deep" / "b.bin").write_bytes(bytes(256))
    with pytest.raises(TunesmithError, match="changed while it was copied"):
        put(bundle, entry, target)
    assert target.read_bytes() == FILES["deep/b.bin"] and list(target.parent.iterdir()) == [target]


def test_too_small_a_disk_is_said_first(tmp_path: Path) -> None:
    with pytest.raises(TunesmithError, match=r"model x needs 1024\.0 TiB of disk"):
        check_disk(tmp_path, 1 << 50, what="model x")


def test_names_become_plain_parts_of_a_path() -> None:
    assert slug("owner/name:tag") == "owner--name--tag"
    assert slug("../../etc") == "etc" and slug("..") == "item" and slug("a b\n") == "a-b-"


def test_the_manifest_is_plain_json(tmp_path: Path) -> None:
    make(tmp_path / "b")
    value = json.loads((tmp_path / "b" / MANIFEST).read_text())
    assert value["files"]["data/a.txt"]["bytes"] == 6 and value["items"][0]["part"] == "data"
