"""Pruning rates: their grammar, one for each conv, and how many kernels each prunes."""

import math
import re

from explib.errors import ParamError

EPSILON = 1e-9  # 0.7 * 10 is 7, and ceil(0.3 * 10) is 3, whatever binary fractions say

_TERM = re.compile(r"\[\s*([0-9]*\.?[0-9]+|[0-9]+\.)\s*\](?:\s*\*\s*([0-9]{1,5}))?")


def parse_rates(text: str) -> list[float]:
    """Pruning rates from `[0.1]*2+[0.4]*2`: `[rate]` with an optional `*count`, joined by `+`.

    A rate is the share of a conv's kernels to prune, 0 up to but not including 1. ParamError
    names the offending term.
    """
    rates = []
    for term in text.split("+"):
        match = _TERM.fullmatch(term.strip())
        if not match:
            raise ParamError(
                f"compress_rate: cannot read {term.strip()!r}; give terms like [0.4]*17 joined by +"
            )
        rate, count = float(match[1]), int(match[2] or 1)
        if not rate < 1:
            raise ParamError(f"compress_rate: rate {rate} in {term.strip()!r}; give 0 to below 1")
        if not 1 <= count <= 10_000:
            raise ParamError(f"compress_rate: count {count} in {term.strip()!r}; give 1 to 10000")
        rates += [rate] * count
    return rates


def spread_rates(rates: list[float], places: int, what: str = "convs") -> list[float]:
    """One rate for each of `places`; a single rate serves all. ParamError on any other count."""
    if len(rates) == 1:
        return rates * places
    if len(rates) != places:
        raise ParamError(
            f"compress_rate: {len(rates)} rates for {places} {what}; give {places}, or one for all"
        )
    return rates


def keep_floor(rates: list[float], binary: bool = False) -> float:
    """The published share of each redundant set that stays: 1 - max(rates) - 0.1, at least 0.

    binary: as binary fractions give it, 0.30000000000000004 for a largest rate of 0.6.
    """
    share = 1 - max(rates, default=math.nan) - 0.1
    return max(0.0, share if binary else round(share, 12)) if rates else math.nan


def number_to_prune(rate: float, kernels: int) -> int:
    """n = int(rate * kernels)."""
    return int(rate * kernels + EPSILON)
