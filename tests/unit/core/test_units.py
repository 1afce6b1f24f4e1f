import pytest

from tunesmith.core.units import bytes_text, duration_text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * 1024**3, "3.0 GiB"), (2**50, "1024.0 TiB")],
)
def test_bytes(value: int, text: str) -> None:
    assert bytes_text(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.04, "0.0 s"), (59.9, "59.9 s"), (75, "1 min 15 s"), (3599.6, "1 h 0 min"), (7260, "2 h 1 min")],
)
def test_duration(value: float, text: str) -> None:
    assert duration_text(value) == text
