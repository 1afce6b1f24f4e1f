"""Models and files of a bundle: collected from the caches of one machine, placed in those of another."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hub_server import serve_hub
from tests.repos import contents, make_model
from tunesmith.core.errors import TunesmithError, UserError
from tunesmith.core.hub_cache import hub_cache
from tunesmith.hub.bundle_manifest import Item, Manifest, open_manifest
from tunesmith.hub.bundle_models import (
    Collected,
    collect,
    conflicts,
    describe_folder,
    is_placed,
    place,
    place_of,
)
from tunesmith.hub.bundle_store import Store
from tunesmith.hub.made import is_whole, made_once
from tunesmith.hub.remote import fetch_model


def other_machine(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(folder / "hub"))
    monkeypatch.setenv("TUNESMITH_CACHE", str(folder / "tunesmith"))


def bundle_of(bundle: Path, wanted: Collected) -> tuple[Manifest, Item]:
    store = Store(bundle)
    item = collect(store, wanted)
    return store.finish(), item


def test_a_hub_model_is_found_offline_on_the_other_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    other_machine(monkeypatch, tmp_path / "one")
    source = make_model(tmp_path / "source")
    with serve_hub({"owner/tiny": source}) as hub:
        found = fetch_model("owner/tiny", endpoints=[hub.url], progress=False)
    wanted = describe_folder(found.folder)
    assert wanted is not None and wanted.name == "owner/tiny"
    manifest, item = bundle_of(tmp_path / "b", wanted)

    other_machine(monkeypatch, tmp_path / "two")
    assert not is_placed(manifest, item, tmp_path)
    place(tmp_path / "b", manifest, item, tmp_path)
    place(tmp_path / "b", manifest, item, tmp_path)
    assert is_placed(manifest, item, tmp_path)
    again = fetch_model("owner/tiny", offline=True, progress=False)
    assert again.folder.is_relative_to(tmp_path / "two") and again.revision == found.revision
    assert again.files == found.files
    assert contents(again.folder) == contents(found.folder)


def test_a_made_model_is_whole_at_its_new_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other_machine(monkeypatch, tmp_path / "one")
    made = made_once("mine", lambda folder: (folder / "config.json").write_text("{}") and None, need_bytes=1)
    wanted = describe_folder(made)
    assert wanted is not None
    manifest, item = bundle_of(tmp_path / "b", wanted)
    other_machine(monkeypatch, tmp_path / "two")
    place(tmp_path / "b", manifest, item, tmp_path)
    assert place_of(item, tmp_path) == tmp_path / "two" / "tunesmith" / "models" / "mine"
    assert is_whole(place_of(item, tmp_path))


def test_a_damaged_model_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other_machine(monkeypatch, tmp_path / "one")
    made = made_once("mine", lambda folder: (folder / "config.json").write_text("{}") and None, need_bytes=1)
    wanted = describe_folder(made)
    assert wanted is not None
    manifest, item = bundle_of(tmp_path / "b", wanted)
    other_machine(monkeypatch, tmp_path / "two")
    (tmp_path / "b" / item.root / "config.json").write_text("[]")
    with pytest.raises(TunesmithError, match="changed while it was copied"):
        place(tmp_path / "b", manifest, item, tmp_path)
    assert not place_of(item, tmp_path).exists()


def test_files_of_the_user_are_never_written_over(tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text("{}\n")
    wanted = Collected("data", "rows", "data/0", {"kind": "project", "place": "data"}, {"rows.jsonl": source})
    manifest, item = bundle_of(tmp_path / "b", wanted)
    project = tmp_path / "project"
    place(tmp_path / "b", manifest, item, project)
    assert (project / "data" / "rows.jsonl").read_text() == "{}\n"
    place(tmp_path / "b", manifest, item, project)
    (project / "data" / "rows.jsonl").write_text("[]\n")
    assert conflicts(manifest, item, project) == [project / "data" / "rows.jsonl"]
    with pytest.raises(UserError, match="is there already"):
        place(tmp_path / "b", manifest, item, project)
    assert (project / "data" / "rows.jsonl").read_text() == "[]\n"


def test_a_file_that_changed_is_collected_again(tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text("{1}\n")
    wanted = Collected("data", "rows", "data/0", {"kind": "project"}, {"rows.jsonl": source})
    bundle_of(tmp_path / "b", wanted)
    source.write_text("{2}\n")
    bundle_of(tmp_path / "b", wanted)
    assert (tmp_path / "b" / "data" / "0" / "rows.jsonl").read_text() == "{2}\n"
    assert open_manifest(tmp_path / "b").files["data/0/rows.jsonl"].bytes == 4


@pytest.mark.parametrize(
    ("name", "request_"),
    [
        ("x", {"kind": "project", "place": "../outside"}),
        ("../x", {"kind": "made"}),
        ("x", {"kind": "hub", "repo": "../../x", "commit": "c"}),
        ("x", {"kind": "hub", "repo": "models--a--b", "commit": "../c"}),
    ],
)
def test_no_item_is_placed_outside(tmp_path: Path, name: str, request_: dict[str, str]) -> None:
    with pytest.raises(UserError, match="not one inside the bundle"):
        place_of(Item("model", name, "r", request_, ()), tmp_path)


def test_a_folder_in_no_cache_is_the_users_own(tmp_path: Path) -> None:
    assert describe_folder(tmp_path) is None
    assert describe_folder(hub_cache() / "models--a--b" / "other" / "c") is None
