"""Numbers and lists in words."""

from __future__ import annotations

from collections.abc import Sequence


def amount(value: float) -> str:
    """Two or three digits: 0.52, 7.3, 148, 12,300."""
    if value >= 1e6:
        return f"{value / 1e6:.3g} million"
    if value >= 100:
        return f"{float(f'{value:.3g}'):,.0f}"
    return f"{value:.2g}"


def ratio(value: float) -> str:
    """2.3, 14, 1.04: how many times."""
    return f"{value:.3g}" if 0.95 < value < 1.05 else f"{value:.2g}"


def listed(words: Sequence[object]) -> str:
    """a, b and c"""
    texts = [str(word) for word in words]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}" if texts else "none"


def ranged(values: Sequence[float]) -> str:
    """1.3 to 2.2; one number where both ends read the same."""
    low, high = ratio(min(values)), ratio(max(values))
    return low if low == high else f"{low} to {high}"


def percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def plural(count: int, word: str) -> str:
    """1 run, 3 runs"""
    return f"{count:,} {word}" if count == 1 else f"{count:,} {word}s"
