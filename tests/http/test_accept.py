"""Choosing the form of an answer by the header Accept: `vitalsd.http.accept`."""

import pytest

from vitalsd.http.accept import JSON_OFFER, Offer, choose
from vitalsd.http.routes.metrics import OFFERS

PROMETHEUS = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,application/openmetrics-text;version=0.0.1;"
    "q=0.5,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)
CHROMIUM = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8"


@pytest.mark.parametrize(
    ("accept", "form"),
    [
        ("", "json"),
        ("*/*", "json"),
        ("application/*", "json"),
        ("application/json", "json"),
        ("application/json, text/plain, */*", "json"),
        (CHROMIUM, "json"),
        (PROMETHEUS, "application/openmetrics-text"),
        ("application/openmetrics-text;version=0.0.1,text/plain;version=0.0.4;q=0.5", "text/plain;version=0.0.4"),
        ("text/plain;version=0.0.4;q=1,*/*;q=0.1", "text/plain;version=0.0.4"),
        ("text/plain", "text/plain;version=0.0.4"),
        ("text/plain;version=1.0.0", "text/plain;version=1.0.0"),
        ("TEXT/PLAIN; charset=utf-8", "text/plain;version=0.0.4"),
        ('application/openmetrics-text;version="1.0.0"', "application/openmetrics-text"),
        ("application/json;q=0, */*", "application/openmetrics-text"),
        ("text/html", None),
        ("text/plain;version=7", None),
        ("*/*;q=0", None),
        ("*/*;q=2", "json"),
        ("*/*;q=0.", None),
        ("text/html, image/gif, image/jpeg, *; q=.2, */*; q=.2", "json"),
        ("text/plain;q=1.0000, */*;q=0.9999", "text/plain;version=0.0.4"),
        ("garbage", None),
        (";;,,/", None),
    ],
)  # fmt: skip
def test_choose_form_of_metrics_by_accept(accept: str, form: str | None) -> None:
    """Scrapers get text, clients that do not ask for it get JSON, and those that accept neither get nothing."""
    offer = choose(accept, tuple(OFFERS))
    assert (offer and (OFFERS[offer] or "json")) == form


@pytest.mark.parametrize(
    ("accept", "media_type"),
    [
        ("", "application/json"),
        ("*/*", "application/json"),
        (CHROMIUM, "application/json"),
        ("text/csv", "text/csv"),
        ("TEXT/CSV; charset=utf-8", "text/csv"),
        ("application/json, text/csv", "application/json"),
        ("text/csv, application/json", "application/json"),
        ("text/csv, */*;q=0.1", "text/csv"),
        ("text/csv;q=0.5, application/json", "application/json"),
        ("text/csv;q=0", None),
        ("text/html", None),
    ],
)  # fmt: skip
def test_choose_form_of_a_table_by_accept(accept: str, media_type: str | None) -> None:
    """CSV is for clients that prefer it to JSON."""
    offer = choose(accept, (JSON_OFFER, Offer("text/csv")))
    assert (offer and offer.media_type) == media_type
