"""Check the id and the version of the application that a client belongs to."""

import re
from typing import NamedTuple

__all__ = ["APP", "APP_VERSION", "Application", "check_app", "check_app_version"]

APP = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
"""An application id: 1 to 64 characters that are safe in file names, because it is part of them."""
APP_VERSION = re.compile(r"[!-~]([ -~]{0,62}[!-~])?", re.ASCII)
"""A version of an application: 1 to 64 printable ASCII characters without a space at either end."""


class Application(NamedTuple):
    """Id and version of an application; both are ``None`` for a client that passed nothing."""

    app: str | None = None
    """The application id; characters as in `APP`."""
    app_version: str | None = None

    @classmethod
    def checked(cls, app: str | None, app_version: str | None) -> "Application":
        """
        Return the application after a check of its id and version.

        Raises:
            ValueError: an id or version has a length or a character that is not allowed.
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
        ValueError: it cannot; the message states the form of an id.
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
        ValueError: it cannot; the message states the form of a version.
    """
    if not APP_VERSION.fullmatch(app_version):
        raise ValueError(
            "an application version has 1 to 64 printable ASCII characters, and no space at its ends;"
            f" got {app_version!r:.80}"
        )
    return app_version
