"""Check what readers see in the documents: links lead to files, and the changelog can be scanned."""

import re
from pathlib import Path

import pytest

from support.paths import ROOT

DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "benchmarks" / "README.md"]
LINK = re.compile(r'\]\(([^)\s#]+)(?:#[^)]*)?\)|\b(?:src|srcset)="([^"]+)"')


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_document_links_lead_to_files(document: Path) -> None:
    """Each relative link and picture of a document exists in the repository."""
    links = ["".join(found) for found in LINK.findall(document.read_text(encoding="utf-8"))]
    assert [link for link in links if "://" not in link and not (document.parent / link).exists()] == []


def test_changelog_has_the_sections_of_keep_a_changelog() -> None:
    """Releases have only the sections of Keep a Changelog, and no line is longer than 120 characters."""
    lines = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if len(line) > 120] == []
    assert {line for line in lines if line.startswith("### ")} <= {
        f"### {name}" for name in ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")
    }
    assert [line for line in lines if line.startswith("## ")][-1] == "## 0.1.0"
