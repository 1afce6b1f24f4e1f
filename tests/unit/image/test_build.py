"""Names, contexts, the image lock, and files with images, without a daemon."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from tunesmith.core.errors import UserError
from tunesmith.image.archive import check_file, save_images, sum_file
from tunesmith.image.bases import Base, choose_base
from tunesmith.image.build import build_commands, image_names, make_context
from tunesmith.image.check import import_fix
from tunesmith.image.dockerfile import ImageSpec
from tunesmith.image.lock import pinned, read_lock

DIGEST = "sha256:" + "1" * 64
WHEEL = "tunesmith-0.1.0-py3-none-any.whl"


def spec(**values: object) -> ImageSpec:
    return ImageSpec(**{"base": choose_base(None), "wheel": WHEEL} | values)  # type: ignore[arg-type]


def test_names_of_the_images() -> None:
    assert image_names(("train", "serve")) == {"train": "tunesmith:train", "serve": "tunesmith:serve"}
    assert image_names(("serve",), "team/llm") == {"serve": "team/llm:serve"}
    assert image_names(("train",), "host:5000/llm:1.0") == {"train": "host:5000/llm:1.0"}
    with pytest.raises(UserError, match="one name for 2 images"):
        image_names(("train", "serve"), "llm:1.0")
    with pytest.raises(UserError, match="digest"):
        image_names(("train",), f"llm@{DIGEST}")


def test_commands() -> None:
    one = spec(stages=("serve",))
    assert build_commands(one, image_names(("serve",)), "host") == [
        ["build", "--network", "host", "--target", "serve", "--tag", "tunesmith:serve", "."]
    ]
    with pytest.raises(UserError, match="--network"):
        build_commands(one, image_names(("serve",)), "container:other")


def test_the_context_has_all_that_is_copied(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name in ("rich-15.0.0-py3-none-any.whl", "tunesmith-0.0.9-py3-none-any.whl"):
        (wheels / name).write_bytes(b"wheel")
    (wheels / "notes.txt").write_text("no")

    def own(folder: Path) -> Path:
        path = folder / "tunesmith-0.1.0-py3-none-any.whl"
        path.write_bytes(b"own")
        return path

    context = tmp_path / "context"
    make_context(
        context, spec(wheelhouse=True), constraints="rich==15.0.0\n", own_wheel=own, wheelhouse=wheels
    )
    found = sorted(str(path.relative_to(context)) for path in context.rglob("*") if path.is_file())
    assert found == [
        "Dockerfile", "build/constraints.txt", "build/pins.py",
        "build/tunesmith-0.1.0-py3-none-any.whl", "build/wheels/rich-15.0.0-py3-none-any.whl",
    ]  # fmt: skip


def test_an_empty_wheelhouse_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no wheels"):
        make_context(tmp_path / "c", spec(), constraints="", own_wheel=lambda f: f, wheelhouse=tmp_path)


def test_the_lock_pins_the_base(tmp_path: Path) -> None:
    path = tmp_path / "image.lock.json"
    base = choose_base(None)
    assert read_lock(path) == {}
    path.write_text(json.dumps({"images": {base.name: {"digest": DIGEST}}}))
    assert pinned(base, read_lock(path)).reference == f"{base.name}@{DIGEST}"
    assert pinned(Base(name="other:1", kind="own"), read_lock(path)).digest is None


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"images": []}', '{"images": {"a": "b"}}', '{"images": {"a": {"digest": "latest"}}}'],
)
def test_what_is_no_lock_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "image.lock.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"image\.lock\.json"):
        read_lock(path)


def test_a_file_is_compared_with_its_sum(tmp_path: Path) -> None:
    file = tmp_path / "image.tar"
    file.write_bytes(b"layers")
    right = hashlib.sha256(b"layers").hexdigest()
    with pytest.raises(UserError, match="nobody can tell"):
        check_file(file)
    assert check_file(file, right.upper()) == right
    sum_file(file).write_text(f"{right}  image.tar\n")
    assert check_file(file) == right
    file.write_bytes(b"layer")
    with pytest.raises(UserError, match="cut off or changed"):
        check_file(file)
    sum_file(file).write_text("nonsense\n")
    with pytest.raises(UserError, match="is not a SHA-256"):
        check_file(file)
    with pytest.raises(UserError, match="no such file"):
        check_file(tmp_path / "none.tar")


@pytest.mark.parametrize("name", ["image", "image.zip", "image.gz", "image.tar.xz"])
def test_endings(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="what kind of file"):
        save_images(["busybox"], tmp_path / name)


@pytest.mark.parametrize(
    ("said", "fix"),
    [
        (
            "ImportError: flash_attn_2_cuda.so: undefined symbol: _ZN3c104cuda9SetDeviceEab",
            "--no-build-isolation",
        ),
        ("ImportError: libcuda.so.1: cannot open shared object file", "--gpus all"),
        ("RuntimeError: can't start new thread", "20.10.10"),
        ("ModuleNotFoundError: No module named 'einops'", "tunesmith image build"),
    ],
)
def test_remedies_of_imports(said: str, fix: str) -> None:
    assert fix in import_fix("flash_attn", said)
