"""Make the TLS context of uploads, and explain why it refused a certificate."""

import os
import re
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import ssl

__all__ = ["explain_distrust", "read_ca_file", "tls_context"]

MAX_CA_BYTES = 16 << 20
"""Limit to read of a file of certificates, bytes."""

STORES = (
    "/etc/ssl/certs/ca-certificates.crt",  # Debian, Ubuntu, Arch
    "/etc/pki/tls/certs/ca-bundle.crt",  # Fedora, Red Hat
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",  # the same, newer
    "/etc/ssl/ca-bundle.pem",  # SUSE
    "/etc/ssl/cert.pem",  # Alpine
)
"""Files of the authorities on Linux, for a frozen program: its OpenSSL looks only where the build machine had them."""

HASHED = re.compile(r"[0-9a-f]{8}\.[0-9]+", re.ASCII)
"""Names of the files that OpenSSL reads in a directory of certificates: a hash of the subject and a number."""

WRONG_TIME = frozenset((9, 10, -67818, -67819))
"""Codes for a certificate that is not valid now, of OpenSSL (positive) and Apple's Security framework (negative)."""
WRONG_HOST = frozenset((62, 64, -67602))
"""Codes for a certificate of another host, of OpenSSL (positive) and Apple's Security framework (negative)."""


def read_ca_file(ca_file: str | os.PathLike[str]) -> str:
    """
    Return the certificates in a PEM file as text, for `send`.

    Args:
        ca_file: path; the file may have other text between the certificates.

    Raises:
        ValueError: the file cannot be read, or has no certificate.
    """
    import ssl  # only here: without an authority of its own a program does not need it

    try:
        with open(ca_file, "rb") as file:
            content = file.read(MAX_CA_BYTES)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise ValueError(
            f"cannot read the certificates in {os.fspath(ca_file)!r}: {why}; name a file in PEM form"
        ) from None
    # Bytes outside ASCII are in comments only, and OpenSSL's parser for text in memory refuses them.
    text = content.decode("ascii", "ignore")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=text)
    except (ssl.SSLError, ValueError):  # ValueError: an empty text
        raise ValueError(
            f"cannot use {os.fspath(ca_file)!r} as certificates of authorities: it has no certificate in PEM form, or a"
            " damaged one; name a file with lines -----BEGIN CERTIFICATE-----"
        ) from None
    return text


def tls_context(authorities: str | None) -> "ssl.SSLContext":
    """
    Return a TLS context that trusts the authorities of the system and `authorities`.

    Linux: the files of OpenSSL, or those that SSL_CERT_FILE and SSL_CERT_DIR name. macOS: the keychains.

    `ssl.create_default_context` is not used: it writes the keys of the connection to the file that SSLKEYLOGFILE names,
    and since Python 3.13 it sets VERIFY_X509_STRICT, which refuses the authorities that `openssl req -x509` makes.

    Args:
        authorities: certificates in PEM form, as `read_ca_file` returns them.

    Raises:
        OSError: a file of the system has damaged certificates.
        ImportError: macOS: truststore is not installed.
    """
    import ssl

    context: ssl.SSLContext
    if sys.platform == "darwin":
        import truststore

        context = truststore.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    else:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_default_certs()
        if (store := _store_elsewhere()) is not None:
            context.load_verify_locations(cafile=store)
        # Trust a named certificate even if it is no root: for example that of the receiving server itself.
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    if authorities is not None:
        context.load_verify_locations(cadata=authorities)
    return context


def _store_elsewhere() -> str | None:
    """Return a file of authorities if OpenSSL was built with paths that do not exist here; ``None``: not needed."""
    import ssl

    # The variables restrict what is trusted, so nothing is added, even if their files do not exist.
    if "SSL_CERT_FILE" in os.environ or "SSL_CERT_DIR" in os.environ:
        return None
    looked = ssl.get_default_verify_paths()
    if looked.cafile is not None:
        return None
    if looked.capath is not None and _has_certificates(looked.capath):
        return None
    return next(filter(os.path.isfile, STORES), None)


def explain_distrust(error: BaseException) -> str | None:
    """Return why a certificate was refused, and what to do; ``None``: `error` has another cause."""
    import ssl

    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ssl.SSLCertVerificationError):
        cause = cause.__cause__ or cause.__context__
    if cause is None:
        return None
    why = getattr(cause, "verify_message", str(cause)).rstrip(".")
    code = getattr(cause, "verify_code", None)
    if code in WRONG_TIME:
        return f"the server's certificate is not valid now ({why}); check the clock of this machine and the certificate"
    if code in WRONG_HOST:
        return f"the server's certificate is for another host ({why}); check the URL and the certificate"
    fault = _fault_of_environment()
    if fault is not None:
        why += f"; {fault}"
        return f"the server's certificate is not trusted ({why}); correct the variable, or unset it"
    return (
        f"the server's certificate is not trusted ({why}); install the certificate of its authority on this machine, or"
        " name a file with it by ca_file, on the command line by --ca-file"
    )


def _fault_of_environment() -> str | None:
    """Return what is wrong with SSL_CERT_FILE or SSL_CERT_DIR, which OpenSSL does not report; ``None``: nothing."""
    import ssl

    if sys.platform == "darwin":  # the keychains are used, not the variables
        return None
    file, directories = os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR")
    if file is not None:
        try:
            if not os.path.isfile(file):
                os.stat(file)
                return f"SSL_CERT_FILE is {file!r}, which is not a file"
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cafile=file)
        except ssl.SSLError:
            return f"SSL_CERT_FILE is {file!r}, which has no certificate in PEM form, or a damaged one"
        except OSError as error:
            return f"SSL_CERT_FILE is {file!r}, which cannot be read: {error.strerror}"
    if directories is not None and not any(map(_has_certificates, directories.split(os.pathsep))):
        return f"SSL_CERT_DIR is {directories!r}, where no file has a name that OpenSSL looks at"
    return None


def _has_certificates(directory: str) -> bool:
    with suppress(OSError):
        return any(map(HASHED.fullmatch, os.listdir(directory)))
    return False
