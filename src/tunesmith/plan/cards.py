"""The NVIDIA cards that people have or rent: memory, rates, links. No other maker's.

Rates are dense (no sparsity) at the data sheet's boost clock, products accumulated in fp32, as training does:
GeForce cards do that at half the rate that their sheets print for fp16 accumulation. They are from NVIDIA's
data sheet of each data-centre and RTX professional card (where it prints the sparse rate, half of it), and
for GeForce and Titan from the architecture papers: Turing (2018), Ampere GA102 (2020), Ada (2022), Blackwell
RTX (2025). Nominal, that is worked out from cores, clock and the rates of a card with the same cores:
rtx3060, rtx3080, rtx3090ti, rtx4060ti, rtx4070, rtx4070tis, rtx4080s, rtx4090d, rtx5060ti, rtx5070ti, a10g,
a16, l20, and rtxpro6000 in int8.

What the driver leaves of the memory is the `total capacity` of torch's out-of-memory messages in public issue
threads, the lowest seen; of a10, a10g, a40, a6000, l40s, a100-40, v100, h100-pcie, h200, b200 and rtxpro6000
it is from memory and not looked up again.

A letter in its place is a rule: g, GDDR: 0.55 GiB less than nominal; e, GDDR with error correction on: a
sixteenth and 0.55 GiB less; h, HBM: 2% less. No sheet tells what a CUDA context takes: 140.9 MiB on a T4
(measured), else 64 MiB and 3.5 MiB for each multiprocessor, which is 351 MiB on an RTX 3090, where 256 to 291
MiB have been seen before any kernel was loaded.

PCIe (nominal: 31.5 GB/s for 4.0 x16) and NVLink are in one direction, where sheets add both up. A GH200's way
to its processor is a link of 450 GB/s. NVLink of cards in PCIe slots needs a bridge, and joins two of them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any, Literal, get_args

from tunesmith.core.errors import UserError
from tunesmith.core.gpu import DRIVER, Gpu, first_gpu
from tunesmith.core.units import GIB

Rate = Literal["fp32", "tf32", "fp16", "bf16", "int8"]
RATES: tuple[Rate, ...] = get_args(Rate)
BASE_CONTEXT_MIB = 64.0
MULTIPROCESSOR_CONTEXT_MIB = 3.5
CONTEXT_MIB = {"t4": 140.9}
GDDR_LOSS_GIB = 0.55
HBM_SHARE = 0.98
PCIE_GB_S = {7: 15.75, 8: 31.5}  # by the first figure of the capability; newer ones have PCIe 5.0
NEWEST_PCIE_GB_S = 63.0

# multiprocessors (sm), compute capability (cc), GiB nominal and usable, TFLOP/s, GB/s, names
TABLE = """
name         sm  cc   GiB usable fp32  tf32   fp16  bf16   int8   memory pcie  link  driver's names
rtx2080ti    68  7.5  11  10.57  13.4  -      53.8  -      215.2  616    15.75 50    NVIDIA GeForce RTX 2080 Ti
titanrtx     72  7.5  24  g      16.3  -      130.5 -      261    672    15.75 50    NVIDIA TITAN RTX
rtx3060      28  8.6  12  g      12.7  12.7   25.5  25.5   101.9  360    31.5  0     NVIDIA GeForce RTX 3060
rtx3080      68  8.6  10  g      29.8  29.8   59.5  59.5   238    760    31.5  0     NVIDIA GeForce RTX 3080
rtx3090      82  8.6  24  23.56  35.6  35.6   71.2  71.2   284.7  936    31.5  56.25 NVIDIA GeForce RTX 3090
rtx3090ti    84  8.6  24  g      40    40     80    80     320    1008   31.5  56.25 NVIDIA GeForce RTX 3090 Ti
rtx4060ti-8  34  8.9  8   g      22.1  22.1   44.1  44.1   176.5  288    15.75 0     NVIDIA GeForce RTX 4060 Ti
rtx4060ti-16 34  8.9  16  g      22.1  22.1   44.1  44.1   176.5  288    15.75 0     NVIDIA GeForce RTX 4060 Ti
rtx4070      46  8.9  12  g      29.1  29.1   58.3  58.3   233.2  504    31.5  0     NVIDIA GeForce RTX 4070
rtx4070tis   66  8.9  16  g      44.1  44.1   88.2  88.2   352.8  672    31.5  0     NVIDIA GeForce RTX 4070 Ti SUPER
rtx4080      76  8.9  16  g      48.7  48.7   97.5  97.5   389.9  716.8  31.5  0     NVIDIA GeForce RTX 4080
rtx4080s     80  8.9  16  g      52.2  52.2   104.4 104.4  417.6  736.3  31.5  0     NVIDIA GeForce RTX 4080 SUPER
rtx4090     128  8.9  24  23.51  82.6  82.6   165.2 165.2  660.6  1008   31.5  0     NVIDIA GeForce RTX 4090
rtx4090d    114  8.9  24  23.51  73.5  73.5   147.1 147.1  588.4  1008   31.5  0     NVIDIA GeForce RTX 4090 D
rtx5060ti-8  36  12.0 8   g      23.7  23.7   47.4  47.4   189.7  448    31.5  0     NVIDIA GeForce RTX 5060 Ti
rtx5060ti-16 36  12.0 16  g      23.7  23.7   47.4  47.4   189.7  448    31.5  0     NVIDIA GeForce RTX 5060 Ti
rtx5070ti    70  12.0 16  g      43.9  43.9   87.9  87.9   351.5  896    63    0     NVIDIA GeForce RTX 5070 Ti
rtx5080      84  12.0 16  g      56.3  56.3   112.6 112.6  450.2  960    63    0     NVIDIA GeForce RTX 5080
rtx5090     170  12.0 32  31.35  104.8 104.8  209.5 209.5  838    1792   63    0     NVIDIA GeForce RTX 5090
a4000        48  8.6  16  g      19.2  38.3   76.7  76.7   153.4  448    31.5  0     NVIDIA RTX A4000
a5000        64  8.6  24  g      27.8  55.5   111.1 111.1  222.2  768    31.5  56.25 NVIDIA RTX A5000
a6000        84  8.6  48  47.4   38.7  77.4   154.8 154.8  309.7  768    31.5  56.25 NVIDIA RTX A6000
rtx6000ada  142  8.9  48  e      91.1  182.1  364.2 364.2  728.5  960    31.5  0     NVIDIA RTX 6000 Ada Generation
rtxpro6000  188  12.0 96  94.97  125   251.9  503.8 503.8  1007.6 1792   63    0     NVIDIA RTX PRO 6000 Blackwell Workstation Edition, NVIDIA RTX PRO 6000 Blackwell Server Edition
t4           40  7.5  16  14.56  8.1   -      65    -      130    320    15.75 0     Tesla T4
v100-16      80  7.0  16  15.77  15.7  -      125   -      -      900    15.75 150   Tesla V100-SXM2-16GB
v100-32      80  7.0  32  31.73  15.7  -      125   -      -      900    15.75 150   Tesla V100-SXM2-32GB
v100-16-pcie 80  7.0  16  15.77  14    -      112   -      -      900    15.75 0     Tesla V100-PCIE-16GB
v100-32-pcie 80  7.0  32  31.73  14    -      112   -      -      900    15.75 0     Tesla V100-PCIE-32GB
a2           10  8.6  16  e      4.5   9      18    18     36     200    15.75 0     NVIDIA A2
a10          72  8.6  24  22.06  31.2  62.5   125   125    250    600    31.5  0     NVIDIA A10
a10g         80  8.6  24  22.06  35    35     70    70     140    600    31.5  0     NVIDIA A10G
a16          10  8.6  16  e      4.5   9      17.9  17.9   35.9   200    31.5  0     NVIDIA A16
a30          56  8.0  24  h      10.3  82     165   165    330    933    31.5  100   NVIDIA A30
a40          84  8.6  48  44.34  37.4  74.8   149.7 149.7  299.3  696    31.5  56.25 NVIDIA A40
l4           58  8.9  24  21.95  30.3  60     121   121    242    300    31.5  0     NVIDIA L4
l20          92  8.9  48  44.53  59.8  59.8   119.5 119.5  239    864    31.5  0     NVIDIA L20
l40         142  8.9  48  44.4   90.5  90.5   181   181    362    864    31.5  0     NVIDIA L40
l40s        142  8.9  48  44.4   91.6  183    362   362    733    864    31.5  0     NVIDIA L40S
a100-40     108  8.0  40  39.38  19.5  156    312   312    624    1555   31.5  300   NVIDIA A100-SXM4-40GB, NVIDIA A100-PCIE-40GB
a100-80     108  8.0  80  79.15  19.5  156    312   312    624    2039   31.5  300   NVIDIA A100-SXM4-80GB
a100-80-pcie 108 8.0  80  79.15  19.5  156    312   312    624    1935   31.5  300   NVIDIA A100 80GB PCIe
a800-80     108  8.0  80  79.15  19.5  156    312   312    624    2039   31.5  200   NVIDIA A800-SXM4-80GB, NVIDIA A800 80GB PCIe
h100        132  9.0  80  79.18  67    494.7  989.4 989.4  1979   3350   63    450   NVIDIA H100 80GB HBM3
h100-pcie   114  9.0  80  79.1   51    378    756   756    1513   2000   63    300   NVIDIA H100 PCIe
h100-nvl    132  9.0  94  93.0   60    417.5  835.5 835.5  1671   3900   63    300   NVIDIA H100 NVL
h800        132  9.0  80  79.18  67    494.7  989.4 989.4  1979   3350   63    200   NVIDIA H800
h20          78  9.0  96  95.0   44    74     148   148    296    4000   63    450   NVIDIA H20
h200        132  9.0  141 139.72 67    494.7  989.4 989.4  1979   4800   63    450   NVIDIA H200
gh200       132  9.0  96  h      67    494.7  989.4 989.4  1979   4000   450   450   NVIDIA GH200 480GB
b200        148  10.0 180 178.35 75    1125   2250  2250   4500   8000   63    900   NVIDIA B200
"""  # noqa: E501 - a table


@dataclass(frozen=True, kw_only=True)
class Card:
    """A GPU. memory_gib: nominal; usable_gib: what the driver has for programs, their CUDA contexts included.

    tflops: dense, by format of the factors, None where the card has no such products or it is not known;
    memory_gb_s: of its memory; pcie_gb_s: to the host, and link_gb_s: NVLink to its neighbours (0: none), in
    one direction; context_mib: what a program's CUDA context takes; capability: compute capability.
    """

    name: str
    memory_gib: float
    usable_gib: float
    tflops: Mapping[Rate, float | None]
    memory_gb_s: float
    pcie_gb_s: float
    link_gb_s: float
    context_mib: float
    capability: tuple[int, int]

    @property
    def room_bytes(self) -> int:
        """Bytes that torch can reserve when nothing else runs on the card."""
        return int(self.usable_gib * GIB - self.context_mib * 1024**2)

    def rate(self, kind: Rate) -> float:
        """TFLOP/s of products of that format. Raises UserError where the card has none or it is not known."""
        rate = self.tflops[kind]
        if rate is not None:
            return rate
        if not any(self.tflops.values()):
            raise UserError(
                f"the rates of the card '{self.name}' are not known", hint="measure them on it, by a probe"
            )
        raise UserError(
            f"the card '{self.name}' has no {kind} matrix products",
            hint="train in fp16" if kind == "bf16" else "choose another precision",
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(replace(self, tflops={})) | {"tflops": dict(self.tflops)}


def _context_mib(name: str, multiprocessors: int) -> float:
    return CONTEXT_MIB.get(name, BASE_CONTEXT_MIB + MULTIPROCESSOR_CONTEXT_MIB * multiprocessors)


def _usable_gib(memory_gib: float, cell: str) -> float:
    rules = {
        "g": memory_gib - GDDR_LOSS_GIB,
        "e": memory_gib * 15 / 16 - GDDR_LOSS_GIB,
        "h": memory_gib * HBM_SHARE,
    }
    return round(rules[cell] if cell in rules else float(cell), 2)


def _read(line: str) -> tuple[Card, list[str]]:
    """A row of the table: the card, and its driver's names."""
    name, units, capability, gib, usable, *figures, names = line.split(maxsplit=13)
    major, _, minor = capability.partition(".")
    rates = [None if cell == "-" else float(cell) for cell in figures[: len(RATES)]]
    memory_gb_s, pcie_gb_s, link_gb_s = map(float, figures[len(RATES) :])
    card = Card(
        name=name,
        memory_gib=float(gib),
        usable_gib=_usable_gib(float(gib), usable),
        tflops=MappingProxyType(dict(zip(RATES, rates, strict=True))),
        memory_gb_s=memory_gb_s,
        pcie_gb_s=pcie_gb_s,
        link_gb_s=link_gb_s,
        context_mib=_context_mib(name, int(units)),
        capability=(int(major), int(minor)),
    )
    return card, names.split(", ")


_ROWS = [_read(line) for line in TABLE.strip().splitlines()[1:]]
CARDS: Mapping[str, Card] = MappingProxyType({card.name: card for card, _ in _ROWS})
_SILENT = {
    "nvidia", "geforce", "tesla", "quadro", "rtx", "gpu", "graphics", "generation", "edition", "workstation",
    "server", "blackwell", "sxm", "sxm2", "sxm4", "sxm5", "hbm2", "hbm2e", "hbm3", "hbm3e",
}  # fmt: skip


def _key(text: str) -> str:
    """A card's name without what people write in different ways: `NVIDIA A100-SXM4-80GB` -> `a10080`."""
    words = [word for word in re.split(r"[^a-z0-9]+", text.lower()) if word not in _SILENT]
    joined = "".join(re.sub(r"^(\d+)(g|gb|gib)$", r"\1", word) for word in words)
    return joined.replace("rtx", "").replace("super", "s")


def _keys(card: Card, names: list[str]) -> set[str]:
    """All that a card is called; its memory may be added to a name that does not tell it."""
    plain = {_key(text) for text in (card.name, *names)}
    return plain | {f"{key}{card.memory_gib:.0f}" for key in plain}


_CALLED = Counter(key for card, names in _ROWS for key in _keys(card, names))
_NAMED = {key: card for card, names in _ROWS for key in _keys(card, names) if _CALLED[key] == 1}


def card_named(text: str) -> Card:
    """The card that `text` means: `3090`, `RTX 3090`, `rtx3090` and `NVIDIA GeForce RTX 3090` are one.

    `h100` is the SXM card. Raises UserError, with the nearest names, for none and for one of several, as
    `a100` is, which comes with 40 and 80 GB.
    """
    key = _key(text)
    if key in _NAMED:
        return _NAMED[key]
    kinds = [name for name in CARDS if key and _key(name).startswith(key)]
    if len(kinds) > 1:
        raise UserError(f"'{text}' may be one of several cards", hint=f"say which: {', '.join(kinds)}")
    close = get_close_matches(key, _NAMED, n=6, cutoff=0.7)
    near = list(dict.fromkeys([*kinds, *(_NAMED[match].name for match in close)]))[:3]
    likely = f"did you mean {' or '.join(near)}? " if near else ""
    raise UserError(
        f"'{text}' is no card that is known here", hint=f"{likely}NVIDIA cards known: {', '.join(CARDS)}"
    )


def this_card(driver: str = DRIVER) -> Card | None:
    """The first GPU of this machine, with the memory that its driver tells; None where there is none.

    Of a card that is not in the table, and of a MIG slice, the rates stay unknown (None).
    """
    gpu = first_gpu(driver)
    if gpu is None:
        return None
    usable = gpu.memory_bytes / GIB
    card = None if " MIG " in gpu.name else _listed(gpu.name, usable)
    return replace(card, usable_gib=usable) if card else _unlisted(gpu)


def _listed(name: str, usable_gib: float) -> Card | None:
    """The card of that driver's name; of those that come with more or less memory, the one that fits."""
    named = [card for card, names in _ROWS if _key(name) in _keys(card, names)]
    fitting = [card for card in named if abs(card.memory_gib - usable_gib) < card.memory_gib / 8]
    return fitting[0] if fitting else None


def _unlisted(gpu: Gpu) -> Card:
    usable = gpu.memory_bytes / GIB
    return Card(
        name=gpu.name,
        memory_gib=float(-(-usable // 1)),
        usable_gib=usable,
        tflops=MappingProxyType(dict.fromkeys(RATES)),
        memory_gb_s=gpu.memory_gb_s,
        pcie_gb_s=PCIE_GB_S.get(gpu.capability[0], NEWEST_PCIE_GB_S),
        link_gb_s=0.0,
        context_mib=_context_mib(gpu.name, gpu.multiprocessors),
        capability=gpu.capability,
    )
