"""
Collect what PyInstaller does not find by itself: commands imported by name, the page, and the templates of the agent.

A client that is its own sidecar needs all of them.
"""

from contextlib import suppress
from importlib.metadata import PackageNotFoundError
from pathlib import Path

from PyInstaller.utils.hooks import (  # type: ignore[import-untyped]
    collect_data_files,
    collect_submodules,
    copy_metadata,
    get_package_paths,
)

HOOKS = "vitalsd.pyinstaller_hooks"

hiddenimports = collect_submodules("vitalsd", filter=lambda name: not name.startswith(HOOKS))
datas = collect_data_files("vitalsd", excludes=["pyinstaller_hooks"])
root, package = map(Path, get_package_paths("vitalsd"))
for folder in ("launchd", "systemd"):
    if not (package / folder).is_dir():  # in a checkout they are beside the source root
        datas += [(str(path), f"vitalsd/{folder}") for path in (root.parent / folder).glob("*")]
with suppress(PackageNotFoundError):  # a vendored copy has no metadata
    datas += copy_metadata("vitalsd")
