"""
Serve the live page: one document with its style and script inside, so that it requests only data.

The content security policy allows both by their hashes, computed from the files, and allows the script to connect to
this server only. Trusted Types without any policy turn each way of making markup from text into an error.
"""

import base64
import hashlib
from functools import cache
from importlib.resources import files

from fastapi.responses import HTMLResponse

from vitalsd.http.operation import CommandExample, Operation, OperationRoute

__all__ = ["page_routes", "policy"]


SCRIPTS = ("series.js", "source.js", "charts.js", "table.js", "reasons.js", "signals.js", "page.js")
SCRIPT = """"use strict";
// Names of threads come from the program that is measured: they only ever reach textContent or fillText, and the
// policy of this page (Trusted Types, none allowed) would refuse anything else.
(() => {
const $ = (id) => document.getElementById(id);
%s
})();
"""
"""Frame of the script: its files share one function scope, and define nothing on ``window``."""


PAGE = Operation(
    path="/",
    summary="The live page",
    description="CPU, memory and every thread over time, in a browser. It requests nothing but this API.",
    answer="The page.",
    media_types={"text/html": ""},
    commands=(
        CommandExample(
            "Its content security policy", 'curl -s -o /dev/null -D - "$URL/" | grep -i "^content-security"'
        ),
    ),
)


def page_routes() -> list[OperationRoute]:
    """Return the route ``/``; the first request makes the page."""

    @cache
    def document() -> tuple[str, dict[str, str]]:
        folder = files(__name__)
        html, style, *parts = (
            folder.joinpath(name).read_text(encoding="utf-8") for name in ("index.html", "style.css", *SCRIPTS)
        )
        script = SCRIPT.replace("%s", "\n".join(parts))
        rules = policy(
            script=script,
            style=style,
            more="connect-src 'self'; img-src data:; require-trusted-types-for 'script'; trusted-types 'none'",
        )
        page = html.replace("/*STYLE*/", style).replace("/*SCRIPT*/", script)
        return page, {"Content-Security-Policy": rules}

    async def page() -> HTMLResponse:
        content, headers = document()
        return HTMLResponse(content, headers=headers)

    return [OperationRoute(PAGE, page)]


def policy(*, style: str, script: str | None = None, more: str = "") -> str:
    """Return a content security policy that allows exactly this style and script, and the sources in `more`."""
    rules = ["default-src 'none'", f"style-src '{_hash(style)}'"]
    if script is not None:
        rules.append(f"script-src '{_hash(script)}'")
    return "; ".join([*rules, *([more] if more else []), "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"])


def _hash(text: str) -> str:
    """Return the hash of an inline style or script as a CSP source, without quotes."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
