"""Where the files of a user are: `vitalsd.discovery.directories`."""

import os
import stat
import sys
from pathlib import Path

import pytest

from vitalsd.discovery.directories import (
    MAX_SOCKET_PATH,
    EndpointError,
    check_socket_path,
    private_directory,
    runtime_directories,
    runtime_directory,
    state_directory,
)


def test_directory_variables_replace_all_defaults(tmp_path: Path) -> None:
    """VITALSD_RUNTIME_DIR and VITALSD_STATE_DIR win over everything."""
    environ = {"VITALSD_RUNTIME_DIR": str(tmp_path / "r"), "VITALSD_STATE_DIR": str(tmp_path / "s")}
    environ |= {"XDG_RUNTIME_DIR": str(tmp_path), "HOME": str(tmp_path)}
    assert runtime_directories(environ) == [tmp_path / "r"]
    assert runtime_directory(environ) == tmp_path / "r"
    assert state_directory(environ) == tmp_path / "s"
    assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o700


def test_directories_of_a_login_are_below_xdg_or_home(tmp_path: Path) -> None:
    """On Linux the runtime directory is below XDG_RUNTIME_DIR, or else below the home, as the state directory is."""
    if sys.platform == "darwin":
        expected = tmp_path / "Library/Application Support/vitalsd"
        assert runtime_directories({"HOME": str(tmp_path)})[0] == expected / "run"
        assert state_directory({"HOME": str(tmp_path)}) == expected
        return
    environ = {"XDG_RUNTIME_DIR": str(tmp_path), "HOME": str(tmp_path), "XDG_STATE_HOME": str(tmp_path)}
    assert runtime_directories(environ)[0] == tmp_path / "vitalsd"
    assert runtime_directories(environ)[-1] == tmp_path / ".local/state/vitalsd/run"
    assert state_directory(environ) == tmp_path / "vitalsd"
    assert state_directory({"HOME": str(tmp_path)}) == tmp_path / ".local/state/vitalsd"
    relative = {"XDG_RUNTIME_DIR": "here", "XDG_STATE_HOME": "here", "HOME": str(tmp_path)}
    assert state_directory(relative) == tmp_path / ".local/state/vitalsd"


def test_directories_under_sudo_ignore_the_other_users_environment(tmp_path: Path) -> None:
    """Under sudo -E nothing of ours is put into the directories that the environment still names."""
    if os.geteuid() != 0:
        pytest.skip("only root can give a directory away")
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    os.chown(theirs, 65534, 65534)
    environ = {"XDG_RUNTIME_DIR": str(theirs), "HOME": str(theirs)}
    assert not [path for path in runtime_directories(environ) if path.is_relative_to(theirs)]


def test_directory_that_is_no_private_directory_is_refused(tmp_path: Path) -> None:
    """A symlink, a file, another user's directory, one for others and one that they may write: each in a sentence."""
    real = private_directory(tmp_path / "real")
    (tmp_path / "link").symlink_to(real)
    (tmp_path / "file").touch()
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "shared" / "theirs").mkdir(parents=True)
    (tmp_path / "shared").chmod(0o755)
    cases = {
        "link": "symbolic link",
        "dangling": "symbolic link",
        "file": "not a directory",
        "open": "written by other",
        "shared": "open to other users.* chmod 700 ",
        "file/x": "cannot use",
    }
    if os.geteuid() == 0:
        (tmp_path / "theirs").mkdir()
        os.chown(tmp_path / "theirs", 65534, 65534)
        cases["theirs"] = "belongs to user 65534"
    for name, reason in cases.items():
        with pytest.raises(EndpointError, match=reason):
            private_directory(tmp_path / name)
    assert stat.S_IMODE((tmp_path / "shared").stat().st_mode) == 0o755


def test_state_directory_unusable_has_a_reason_with_the_variable(tmp_path: Path) -> None:
    """The reason may be anything in its place below the home directory."""
    for parent in (".local", "Library"):
        (tmp_path / parent).touch()
    with pytest.raises(EndpointError, match=r"cannot use .*; set VITALSD_STATE_DIR to use another"):
        state_directory({"HOME": str(tmp_path)})


def test_directory_readable_by_others_becomes_0700(tmp_path: Path) -> None:
    """A directory of ours that others could only read becomes 0700; missing parents are made private too."""
    (tmp_path / "mine").mkdir(0o755)
    old = os.umask(0o777)
    try:
        private_directory(tmp_path / "mine")
        private_directory(tmp_path / "a" / "b")
    finally:
        os.umask(old)
    for name in ("mine", "a", "a/b"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o700


def test_runtime_directory_too_long_for_a_socket_still_has_the_file(tmp_path: Path) -> None:
    """It is used if there is no other; the limit of sun_path is in bytes and is checked before bind."""
    too_long = tmp_path / ("ü" * 60)
    assert runtime_directory({"VITALSD_RUNTIME_DIR": str(too_long)}) == too_long
    longest = Path("/" + "x" * (MAX_SOCKET_PATH - 1))
    check_socket_path(longest)
    with pytest.raises(EndpointError):
        check_socket_path(Path(f"{longest}x"))
