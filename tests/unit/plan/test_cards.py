"""The table of cards, the names that people give them, and the card of this machine."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tunesmith.core.errors import UserError
from tunesmith.core.units import GIB
from tunesmith.plan.cards import CARDS, RATES, Card, card_named, this_card

DRIVER = """
#include <stddef.h>
#include <string.h>
int cuInit(unsigned flags) { return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGet(int *device, int number) { *device = 0; return 0; }
int cuDeviceGetName(char *name, int length, int device) { strncpy(name, "NAME", length); return 0; }
int cuDeviceTotalMem_v2(size_t *total, int device) { *total = (size_t)MIB << 20; return 0; }
int cuDeviceGetAttribute(int *value, int number, int device) {
    *value = number == 16 ? 100 : number == 36 ? 5000000 : number == 37 ? 256 : number == 75 ? MAJOR : 6;
    return 0;
}
"""


def driver(folder: Path, name: str, mib: int, major: int = 8) -> str:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    source, library = folder / "driver.c", folder / "libdriver.so"
    text = DRIVER.replace("NAME", name).replace("MIB", str(mib)).replace("MAJOR", str(major))
    source.write_text(text)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    return str(library)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("3090", "rtx3090"),
        ("RTX 3090", "rtx3090"),
        ("rtx3090-24GB", "rtx3090"),
        ("NVIDIA GeForce RTX 3090", "rtx3090"),
        ("4070 Ti Super", "rtx4070tis"),
        ("RTX 4090 D", "rtx4090d"),
        ("RTX 4060 Ti 16GB", "rtx4060ti-16"),
        ("RTX 6000 Ada Generation", "rtx6000ada"),
        ("TITAN RTX", "titanrtx"),
        ("Tesla T4", "t4"),
        ("a100-80", "a100-80"),
        ("A100 40G", "a100-40"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA A100 80GB PCIe", "a100-80-pcie"),
        ("h100", "h100"),
        ("H100 SXM5 80GB", "h100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("H100 NVL", "h100-nvl"),
        ("GH200", "gh200"),
        ("V100-32GB", "v100-32"),
    ],
)
def test_one_card_has_many_spellings(text: str, name: str) -> None:
    assert card_named(text).name == name


@pytest.mark.parametrize("name", CARDS)
def test_every_card_is_found_by_its_name(name: str) -> None:
    assert card_named(name) is CARDS[name]


@pytest.mark.parametrize(
    ("text", "fault", "hint"),
    [
        ("a100", "one of several", "say which: a100-40, a100-80, a100-80-pcie"),
        ("RTX 4060 Ti", "one of several", "rtx4060ti-8, rtx4060ti-16"),
        ("A800", "is no card", "did you mean a800-80"),
        ("rtx3091", "is no card", "did you mean rtx3090"),
        ("MI300X", "is no card", "NVIDIA cards known: rtx2080ti, titanrtx, "),
        ("", "is no card", "NVIDIA cards known: "),
    ],
)
def test_other_names_are_refused_with_the_nearest(text: str, fault: str, hint: str) -> None:
    with pytest.raises(UserError, match=f"'{text}' .*{fault}") as raised:
        card_named(text)
    assert hint in (raised.value.hint or "")


@pytest.mark.parametrize("card", CARDS.values(), ids=list(CARDS))
def test_figures_agree_with_one_another(card: Card) -> None:
    assert 0.88 * card.memory_gib < card.usable_gib < card.memory_gib
    assert 0 < card.room_bytes < card.usable_gib * GIB
    before_ampere = card.capability < (8, 0)
    assert (card.tflops["bf16"] is None) == (card.tflops["tf32"] is None) == before_ampere
    if not before_ampere:
        assert card.tflops["bf16"] == card.tflops["fp16"]
    # 8-bit products go at twice the rate of 16-bit ones, at four times where fp32 accumulation halves those
    if card.tflops["int8"] is not None:
        assert card.tflops["int8"] / card.rate("fp16") == pytest.approx(4, rel=0.02) or card.tflops[
            "int8"
        ] / card.rate("fp16") == pytest.approx(2, rel=0.02)


def test_figures_of_the_data_sheets() -> None:
    h100, rtx3090 = CARDS["h100"], CARDS["rtx3090"]
    assert (h100.rate("bf16"), h100.memory_gb_s, h100.link_gb_s, h100.capability) == (
        989.4,
        3350,
        450,
        (9, 0),
    )
    # an RTX 3090's sheet: 142 TFLOP/s in fp16 when sums are fp16; half of it when they are fp32
    assert rtx3090.rate("fp16") == pytest.approx(142.3 / 2, rel=0.001)
    assert CARDS["t4"].context_mib == 140.9
    assert rtx3090.context_mib == 64 + 82 * 3.5
    assert CARDS["rtx5080"].usable_gib == 16 - 0.55
    assert CARDS["a2"].usable_gib == pytest.approx(15 - 0.55)


def test_a_rate_that_a_card_has_not_is_refused() -> None:
    with pytest.raises(UserError, match="'t4' has no bf16") as raised:
        CARDS["t4"].rate("bf16")
    assert raised.value.hint == "train in fp16"
    with pytest.raises(UserError, match="'v100-16' has no int8"):
        CARDS["v100-16"].rate("int8")


def test_a_card_as_json() -> None:
    found = CARDS["t4"].as_dict()
    assert set(found["tflops"]) == set(RATES)
    assert (found["name"], found["capability"], found["tflops"]["bf16"]) == ("t4", (7, 5), None)


def test_this_card_is_the_listed_one_with_the_drivers_memory(tmp_path: Path) -> None:
    assert this_card(str(tmp_path / "nothing.so")) is None
    found = this_card(driver(tmp_path, "NVIDIA GeForce RTX 3090", 24123))
    assert found is not None
    assert (found.name, found.usable_gib) == ("rtx3090", 24123 / 1024)
    assert found.rate("bf16") == 71.2


@pytest.mark.parametrize(("mib", "name"), [(7800, "rtx4060ti-8"), (15950, "rtx4060ti-16")])
def test_cards_of_one_name_are_told_apart_by_their_memory(tmp_path: Path, mib: int, name: str) -> None:
    found = this_card(driver(tmp_path, "NVIDIA GeForce RTX 4060 Ti", mib))
    assert found is not None and found.name == name


@pytest.mark.parametrize(
    ("name", "mib"),
    [
        ("NVIDIA Thing 1", 20000),
        ("NVIDIA GeForce RTX 3090", 48000),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", 19968),
    ],
)
def test_of_an_unlisted_card_the_rates_stay_unknown(tmp_path: Path, name: str, mib: int) -> None:
    found = this_card(driver(tmp_path, name, mib))
    assert found is not None
    assert (found.name, found.usable_gib, found.capability) == (name, mib / 1024, (8, 6))
    # 5 GHz, two transfers, 256 bits
    assert (found.memory_gb_s, found.pcie_gb_s, found.context_mib) == (320, 31.5, 64 + 350)
    with pytest.raises(UserError, match=r"rates of the card .* not known"):
        found.rate("bf16")


def test_the_documents_table_is_this_one() -> None:
    page = (Path(__file__).parents[3] / "docs/concepts/cards.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ") and line.count("|") == 13][1:]
    assert rows == [_row(card) for card in CARDS.values()]


def _row(card: Card) -> str:
    rates = [card.tflops[kind] for kind in RATES]
    figures = [card.memory_gib, card.usable_gib, card.context_mib, *rates, card.memory_gb_s, card.pcie_gb_s]
    cells = ["–" if figure is None else f"{figure:g}" for figure in [*figures, card.link_gb_s or None]]
    return f"| {card.name} | {' | '.join(cells)} |"
