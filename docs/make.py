"""
Generate files of this folder from the program: its OpenAPI document, docstrings and settings.

    python docs/make.py reference [--check]    api.md, runtime-metrics.schema.json, the modules in design.md, and the
                                               settings in operations.md
    python docs/make.py images                 images/*.png, from a real browser on a busy process

With --check nothing is written; the exit status is 1 if a file differs from the generated one.
"""

import argparse
import ast
import asyncio
import json
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent

ROOT = HERE.parent
MODULES, END_OF_MODULES = "<!-- modules, from their docstrings: make reference -->", "<!-- end of modules -->"
SETTINGS, END_OF_SETTINGS = "<!-- settings, from sidecar/config.py: make reference -->", "<!-- end of settings -->"

HEAD = """# The API

One section per route: what it is for, its parameters, its answers, commands to try, and an answer. The same is
served by every sidecar at `/docs`, readable offline, and for programs at `/openapi.json`; this page is made from it
(`make reference`).

{description}

In the commands `$URL` is a sidecar: `vitalsd endpoints` lists yours, and `URL=http://127.0.0.1:9779` is the usual one.
What `/metrics` answers and `runtime-metrics.json` holds is also a JSON Schema:
[runtime-metrics.schema.json](runtime-metrics.schema.json).

A sidecar that was started with `--auth token` asks for the token of its runtime file. Write the line
`Authorization: Bearer TOKEN` to a file that only you can read, and send it with `curl -s -H @FILE "$URL/metrics"`: a
command line can be read by every user of the machine.

"""


def main() -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["reference", "images"])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if something would change")
    options = parser.parse_args()
    if options.what == "images":
        sys.path.insert(0, str(HERE.parent / "tests"))
        from support.pictures import take

        take(HERE / "images")
        return 0
    made = {
        "api.md": reference(schema()),
        "runtime-metrics.schema.json": metrics_schema(),
        "design.md": design((HERE / "design.md").read_text(encoding="utf-8")),
        "operations.md": operations((HERE / "operations.md").read_text(encoding="utf-8")),
    }
    stale = [name for name, text in made.items() if not _holds(HERE / name, text)]
    if options.check:
        for name in stale:
            print(f"docs/{name} is not as it would be made: make reference", file=sys.stderr)
        return 1 if stale else 0
    for name in stale:
        (HERE / name).write_text(made[name], encoding="utf-8")
        print(f"docs/{name}")
    return 0


def _holds(path: Path, text: str) -> bool:
    """Return whether the file at `path` has this content."""
    return path.exists() and path.read_text(encoding="utf-8") == text


def schema() -> dict[str, Any]:
    """Return the document that a sidecar answers at /openapi.json."""
    import httpx

    from vitalsd.http.app import create_app
    from vitalsd.sampling.sampler import Sampler
    from vitalsd.sampling.target_pool import Targets
    from vitalsd.sources.base import NoSuchProcessError, Source

    def no_source(*_: object) -> Source:
        raise NoSuchProcessError("no process is measured here")

    async def ask() -> dict[str, Any]:
        transport = httpx.ASGITransport(app=create_app(Targets(Sampler(no_source), no_source), list))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            answer: dict[str, Any] = (await client.get("/openapi.json")).json()
            return answer

    return asyncio.run(ask())


def metrics_schema() -> str:
    """Return the JSON Schema of the contract, as `vitalsd.contract.metrics` declares it."""
    from pydantic import TypeAdapter

    from vitalsd.contract.metrics import RuntimeMetrics

    adapter: TypeAdapter[Any] = TypeAdapter(RuntimeMetrics)
    made = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "RuntimeMetrics",
        "description": "What GET /metrics answers and runtime-metrics.json holds.",
        **adapter.json_schema(mode="serialization"),
    }
    return json.dumps(made, indent=2) + "\n"


def design(text: str) -> str:
    """Return docs/design.md with a new list of modules, from the first paragraphs of their docstrings."""
    rows = [row for package in packages() for row in _modules(package)]
    return _between(text, MODULES, END_OF_MODULES, _table(("File", "Content"), rows))


def operations(text: str) -> str:
    """Return docs/operations.md with a new table of settings, from `vitalsd.sidecar.config`."""
    import inspect

    import vitalsd
    from vitalsd.sidecar.config import SETTINGS as CONFIG_SETTINGS
    from vitalsd.sidecar.config import TIMEOUT, Setting

    calls = {f"`{call.__name__}`": inspect.signature(call).parameters for call in (vitalsd.start, vitalsd.spawn)}

    def row(name: str, setting: Setting) -> tuple[str, ...]:
        placeholder = setting.metavar or setting.time.upper() or "|".join(setting.choices)
        option = f"`{setting.option} {placeholder}`".replace(" `", "`") if setting.option else ""
        takers = ", ".join(call for call, parameters in calls.items() if name in parameters)
        default = setting.default_text or ("" if setting.default is None else f"`{setting.default}`")
        unit = "s" if setting.time else ""
        allowed = "" if setting.is_flag else setting.range_text.replace("'", "`")
        return f"`{name}`", default, allowed, unit, option, takers, setting.help

    rows = [row(name, setting) for name, setting in CONFIG_SETTINGS.items() if not setting.hidden]
    rows.append(row("timeout_s", TIMEOUT))
    head = ("Setting", "Default", "Range", "Unit", "Option of `vitalsd serve`", "Argument of", "Meaning")
    return _between(text, SETTINGS, END_OF_SETTINGS, _table(head, rows))


def _between(text: str, begin: str, end: str, content: str) -> str:
    """Return `text` with `content` between two markers."""
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n\n{content}\n{end}{after}"


def packages() -> list[Path]:
    """Return the folder of each package, in the order of imports, highest first."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layers = config["tool"]["importlinter"]["contracts"][0]["layers"]
    names = [layer for layer in layers if "|" not in layer] + ["vitalsd.pyinstaller_hooks", "vitalsd"]
    return [ROOT / ("clients" if name == "vitalsd_client" else "service") / name.replace(".", "/") for name in names]


def _modules(package: Path) -> list[tuple[str, str]]:
    """Return a row for a package and one for each module in it, with the first paragraph of its docstring."""
    files = sorted(package.glob("*.py") if package.name == "vitalsd" else package.rglob("*.py"), key=_folders_last)
    rows = []
    for file in files:
        name = file.parent if file.name == "__init__.py" else file
        shown = f"`{name.relative_to(package.parent)}{'/' if name.is_dir() else ''}`"
        docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        summary = " ".join(docstring.partition("\n\n")[0].split()).replace("``", "`")
        rows.append((f"**{shown}**" if name.is_dir() else shown, summary))
    return rows


def _folders_last(path: Path) -> tuple[str, bool, str]:
    return str(path.parent), path.name != "__init__.py", path.name


def reference(schema: dict[str, Any]) -> str:
    """Return docs/api.md."""
    from vitalsd.http.reference import markdown

    return HEAD.format(description=schema["info"]["description"]) + markdown(schema)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Return a Markdown table; vertical bars in cells are escaped."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join(f"| {' | '.join(cell.strip().replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
