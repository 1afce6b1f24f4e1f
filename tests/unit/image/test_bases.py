"""Driver to CUDA to image, and what is refused."""

from __future__ import annotations

import pytest

from tunesmith.core.errors import UserError
from tunesmith.image.bases import TABLE, VLLM, Gpu, choose_base, cuda_major, driver_branch, own_base

RTX_3090 = Gpu("NVIDIA GeForce RTX 3090", 8.6)
V100 = Gpu("Tesla V100-SXM2-32GB", 7.0)


@pytest.mark.parametrize(
    ("driver", "image", "cuda", "minor"),
    [
        ("595.10", "nvcr.io/nvidia/pytorch:25.12-py3", (13, 1), False),
        ("590.44.01", "nvcr.io/nvidia/pytorch:25.12-py3", (13, 1), False),
        ("580.95.05", "nvcr.io/nvidia/pytorch:25.10-py3", (13, 0), False),
        ("579.99", "nvcr.io/nvidia/pytorch:25.06-py3", (12, 9), False),
        ("570.124.06", "nvcr.io/nvidia/pytorch:25.03-py3", (12, 8), False),
        ("550.54.14", "nvcr.io/nvidia/pytorch:25.03-py3", (12, 8), True),
        ("525.60.13", "nvcr.io/nvidia/pytorch:25.03-py3", (12, 8), True),
    ],
)
def test_the_image_follows_the_driver(driver: str, image: str, cuda: tuple[int, int], minor: bool) -> None:
    base = choose_base(driver, [RTX_3090])
    assert (base.name, base.cuda, base.minor_compat) == (image, cuda, minor)
    assert base.vllm == VLLM[cuda[0]]


@pytest.mark.parametrize("driver", ["524.99", "470.57.02", "450.80.02", "390.77"])
def test_a_driver_that_is_too_old_is_refused_with_the_remedy(driver: str) -> None:
    with pytest.raises(UserError) as caught:
        choose_base(driver, [RTX_3090])
    assert driver in caught.value.what and "525" in caught.value.what
    assert caught.value.hint and "580" in caught.value.hint and "--family cpu" in caught.value.hint


def test_geforce_is_told_that_forward_compatibility_is_not_for_it() -> None:
    assert any("804" in note for note in choose_base("550.54.14", [RTX_3090]).notes)
    assert not any("804" in note for note in choose_base("550.54.14", [Gpu("NVIDIA A100", 8.0)]).notes)
    assert choose_base("580.95.05", [RTX_3090]).notes == ()


def test_volta_does_not_get_cuda_13() -> None:
    base = choose_base("590.44.01", [RTX_3090, V100])
    assert base.cuda == (12, 9)
    assert choose_base("590.44.01", [Gpu("unknown")]).cuda == (13, 1)


def test_the_cuda_family_takes_its_own_rows() -> None:
    assert choose_base("580.65.06", family="cuda").name == "nvidia/cuda:13.0.2-devel-ubuntu24.04"
    assert choose_base("535.183.01", family="cuda").minor_compat


def test_without_a_driver_the_image_is_for_cpu() -> None:
    base = choose_base(None)
    assert (base.name, base.kind, base.cuda, base.vllm) == ("python:3.11-slim", "cpu", None, None)
    assert choose_base("550.54.14", family="cpu").kind == "cpu"
    with pytest.raises(UserError, match="no NVIDIA driver answers"):
        choose_base(None, family="ngc")


@pytest.mark.parametrize("text", ["", "55", "550.54.14.1.2", "550; rm -rf /", "five", "550.54.14\n"])
def test_what_is_not_a_driver_version_is_named(text: str) -> None:
    with pytest.raises(UserError, match="is not a driver version"):
        driver_branch(text)


def test_every_row_of_the_table_can_be_reached() -> None:
    for row in TABLE:
        assert choose_base(f"{row.driver}.1", family=row.kind).name == row.name
        assert cuda_major(row.driver) == row.cuda[0]


def test_an_image_of_the_user_brings_what_the_table_knows() -> None:
    assert own_base("nvcr.io/nvidia/pytorch:25.06-py3").cuda == (12, 9)
    assert own_base("nvcr.io/nvidia/pytorch:24.01-py3").kind == "ngc"
    own = own_base("registry.example/team/base:1")
    assert (own.kind, own.cuda, own.vllm) == ("own", None, None)
