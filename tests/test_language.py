"""The language rule of CONTRIBUTING.md, counted."""

import re
from pathlib import Path

import pytest

from support.paths import ROOT

WORDS = re.compile(
    r"\b(?:who|whom|whose|whoever|nobody|somebody|anybody|told|by now|for ever|forever|likewise)\b", re.IGNORECASE
)
"""Words that hide the actor of a sentence. Raise no limit: rewrite the sentence."""
CODE_LIMIT = 1.0
"""Words per 1000 lines of code, with its comments, docstrings, help texts and messages."""
TEST_LIMIT = 1.0
"""Words per 1000 lines of tests and their helpers."""
DOCUMENT_LIMIT = 6.0
"""Words per 1000 lines of documents."""
CODE_SUFFIXES = {".c", ".py", ".sh", ".js", ".css", ".html", ".plist", ".service", ".socket", ".yml"}
TERMS = (
    *("throttle", "rate limit", "evict", "backpressure", "backoff", "CSRF", "DNS rebinding", "downsample"),
    *("single flight", "ring buffer", "admission", "load shedding"),
)
"""Mechanisms that exist, by the names under which the field knows them."""


def code_files() -> list[Path]:
    """Return the files of code and of templates, without tests."""
    roots = ("service", "clients", "benchmarks", "launchd", "systemd", ".github")
    files = [path for root in roots for path in (ROOT / root).rglob("*") if path.suffix in CODE_SUFFIXES]
    return [*files, *(ROOT / "docs").glob("*.py"), ROOT / "Makefile", ROOT / "Dockerfile"]


def files_of_tests() -> list[Path]:
    """Return the tests and their helpers, without this file, which lists the words."""
    return [path for path in (ROOT / "tests").rglob("*") if path.suffix in CODE_SUFFIXES and path != Path(__file__)]


def documents() -> list[Path]:
    """Return the documents that users and contributors read."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")]


@pytest.mark.parametrize(
    ("paths", "limit"),
    [(code_files(), CODE_LIMIT), (files_of_tests(), TEST_LIMIT), (documents(), DOCUMENT_LIMIT)],
    ids=["code", "tests", "documents"],
)
def test_text_with_words_that_hide_the_actor_is_rare(paths: list[Path], limit: float) -> None:
    """Each limit is per 1000 lines."""
    places: list[str] = []
    lines = 0
    for path in paths:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            lines += 1
            places += [f"{path.relative_to(ROOT)}:{number}: {match[0]}" for match in WORDS.finditer(line)]
    assert lines > 1000
    assert len(places) * 1000 / lines <= limit, "\n".join(places)


def test_words_of_the_rule_in_a_sentence_are_found() -> None:
    """Upper case counts, and a word within another one does not."""
    assert [match[0] for match in WORDS.finditer("Who told? The whole of it, for ever.")] == ["Who", "told", "for ever"]


@pytest.mark.parametrize("term", TERMS)
def test_mechanism_by_its_term_of_the_field_is_found_in_the_code(term: str) -> None:
    """`-`, `_` and a line's end count as a space."""
    pattern = re.compile(term.replace(" ", r"[-_\s]?"), re.IGNORECASE)
    assert any(pattern.search(path.read_text(encoding="utf-8")) for path in code_files() if path.suffix == ".py")
