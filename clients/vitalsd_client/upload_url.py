"""Check the URL of the server for reports, and the URL of a proxy."""

import ipaddress
from urllib.parse import urlsplit

__all__ = ["check_proxy", "check_url"]


def check_url(url: str) -> str:
    """
    Return `url` if a report may be sent there: https, or plain http on this machine.

    Raises:
        ValueError: a report may not be sent there.
    """
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        usable = False
    if not usable:
        raise ValueError(f"{url!r} is not an http or https URL; one looks like https://reports.example.com/reports")
    if parts.username is not None:
        raise ValueError("a password in a URL ends up in logs; let the server accept reports without one")
    if parts.scheme == "http" and not _is_here(parts.hostname or ""):
        raise ValueError(f"a report goes to another machine over https only, not to {url!r}")
    return url


def check_proxy(proxy: str) -> str:
    """
    Return `proxy` if it is the URL of a proxy.

    Raises:
        ValueError: it is not; the message does not repeat it, because it may contain a password.
    """
    import httpx  # only where there is a proxy

    try:
        host = httpx.Proxy(proxy).url.host
    except (ValueError, httpx.InvalidURL):
        host = ""
    if not host:
        raise ValueError("proxy is not the URL of one; such looks like http://127.0.0.1:3128")
    return proxy


def _is_here(host: str) -> bool:
    """Return whether `host` is localhost or a loopback address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
