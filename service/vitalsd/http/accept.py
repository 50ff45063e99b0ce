"""
Choose the form of an answer by the ``Accept`` header of a request (RFC 9110 section 12.5.1).

Neither Starlette nor FastAPI parses the header, and `prometheus_client.exposition.choose_encoder` ignores qualities and
never refuses, so this module does.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["JSON_OFFER", "Offer", "choose"]

TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
RANGE = re.compile(rf"\s*({TOKEN})/({TOKEN})\s*((?:;[^;]*)*)", re.ASCII)
QUALITY = re.compile(r"0?\.[0-9]+|0\.?|1(?:\.0*)?", re.ASCII)  # RFC 9110 has no `.2`, which Java 8 sends.
MAX_RANGES = 64
"""Media ranges of a header to read at most: the work for one request is bounded."""


class Offer(NamedTuple):
    """Describe a form of an answer: its media type, and the value of the parameter ``version`` that selects it."""

    media_type: str
    version: str = ""
    """Empty: the type has no versions."""
    is_default_version: bool = True
    """Whether a range of this media type without a version means this form."""


JSON_OFFER = Offer("application/json")


class _Range(NamedTuple):
    """Hold one media range of the header."""

    kind: str
    subtype: str
    version: str
    quality: float

    def specificity(self, offer: Offer) -> int:
        """Return how exactly this means `offer`: 3 with its version, 2, 1 ``type/*``, 0 ``*/*``; -1 if not at all."""
        kind, _, subtype = offer.media_type.partition("/")
        if (self.kind, self.subtype) == ("*", "*"):
            return 0
        if self.kind != kind:
            return -1
        if self.subtype == "*":
            return 1
        if self.subtype != subtype:
            return -1
        if not self.version or not offer.version:
            return 2 if offer.is_default_version else -1
        return 3 if self.version == offer.version else -1


def choose(accept: str, offers: Sequence[Offer]) -> Offer | None:
    """
    Return the offer that `accept` prefers, None if it accepts none of them.

    Args:
        accept: the header; empty: everything is accepted.
        offers: the first one is chosen among those of equal quality.
    """
    if not accept.strip():
        return offers[0]
    ranges = [parsed for part in accept.split(",")[:MAX_RANGES] if (parsed := _parse(part)) is not None]
    qualities = [_quality(ranges, offer) for offer in offers]
    best = max(qualities)
    return offers[qualities.index(best)] if best > 0 else None


def _quality(ranges: Sequence[_Range], offer: Offer) -> float:
    """Return the quality of the range that means `offer` most exactly; 0 if none does."""
    meant = [(each.specificity(offer), each.quality) for each in ranges]
    return max((each for each in meant if each[0] >= 0), default=(0, 0.0))[1]


def _parse(part: str) -> _Range | None:
    """Return one media range, with quality 1 if that is missing or malformed; None if it is not a media range."""
    found = RANGE.fullmatch(part)
    if found is None:
        return None
    parameters: dict[str, str] = {}
    for parameter in found[3].split(";"):
        name, _, value = parameter.partition("=")
        parameters[name.strip().lower()] = value.strip().strip('"')
    quality = parameters.get("q", "1")
    return _Range(
        found[1].lower(),
        found[2].lower(),
        parameters.get("version", ""),
        float(quality) if QUALITY.fullmatch(quality) else 1.0,
    )
