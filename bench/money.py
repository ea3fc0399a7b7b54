"""What a million tokens costs, from the price of a card that the user gives. No price is shipped.

usd per Mtok = usd per card and hour x cards / (tokens per second x 3600) x 1e6
"""

from __future__ import annotations

from typing import Any

from ..formats.spec import FormatError


def usd_per_mtok(usd_per_card_hour: float, tok_s: float, cards: int = 1) -> float:
    """Dollars of a million tokens at `tok_s` tokens per second of all `cards` together."""
    _sane(usd_per_card_hour, cards)
    if not tok_s > 0:
        raise ValueError(f"tok_s {tok_s}: expected tokens per second above 0")
    return usd_per_card_hour * cards / (tok_s * 3600) * 1e6


def section(
    usd_per_card_hour: float | None,
    *,
    cards: int = 1,
    prefill_s: float | None = None,
    decode_s: float | None = None,
    tokens_in: int = 0,
    tokens_out: int = 0,
) -> dict[str, Any] | None:
    """The section "money" of a Record, None without a price.

    `prefill_s` seconds took in `tokens_in`, `decode_s` seconds made `tokens_out`: each kind of token pays for its own time, and
    "total" is the time of both over the tokens of both. A time that was not measured leaves its figures None.
    """
    if usd_per_card_hour is None:
        return None
    _sane(usd_per_card_hour, cards)

    def price(seconds: float | None, tokens: int) -> float | None:
        return usd_per_mtok(usd_per_card_hour, tokens / seconds, cards) if seconds and tokens else None

    both = None if prefill_s is None or decode_s is None else prefill_s + decode_s
    each = {
        "in": price(prefill_s, tokens_in),
        "out": price(decode_s, tokens_out),
        "total": price(both, tokens_in + tokens_out),
    }
    return {"usd_per_card_hour": usd_per_card_hour, "usd_per_mtok": each}


def _sane(usd_per_card_hour: float, cards: int) -> None:
    if not 0 < usd_per_card_hour < float("inf") or cards < 1:
        raise FormatError(f"--usd-hour {usd_per_card_hour}: expected dollars of one card and hour, above 0")
