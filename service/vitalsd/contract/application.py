"""The application that a client says it is: an id and a version."""

import re
from typing import NamedTuple

__all__ = ["APP", "APP_VERSION", "Application", "check_app", "check_app_version"]

APP = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
"""An application id is part of file names."""
APP_VERSION = re.compile(r"[!-~]([ -~]{0,62}[!-~])?", re.ASCII)


class Application(NamedTuple):
    """What the client passed; both are ``None`` for a client that passed nothing."""

    app: str | None = None
    """The application id; characters as in `APP`."""
    app_version: str | None = None

    @classmethod
    def checked(cls, app: str | None, app_version: str | None) -> "Application":
        """
        Return the application, or raise.

        Raises:
            ValueError: an id or version has other characters than it may have.
        """
        if app is not None:
            check_app(app)
        if app_version is not None:
            check_app_version(app_version)
        return cls(app, app_version)


def check_app(app: str) -> str:
    """
    Return `app` if it can be an application id.

    Raises:
        ValueError: it cannot; the message says what an id looks like.
    """
    if not APP.fullmatch(app):
        raise ValueError(
            "an application id has 1 to 64 characters of A-Z a-z 0-9 . _ - and begins with a letter or digit;"
            f" got {app!r:.80}"
        )
    return app


def check_app_version(app_version: str) -> str:
    """
    Return `app_version` if it can be the version of an application.

    Raises:
        ValueError: it is not.
    """
    if not APP_VERSION.fullmatch(app_version):
        raise ValueError(
            "an application version has 1 to 64 printable ASCII characters, and no space at its ends;"
            f" got {app_version!r:.80}"
        )
    return app_version
