"""Uploads over TLS: the trusted authorities, and the error for a certificate that is not trusted."""

import json
import re
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import truststore
import uvicorn

from client.test_spool import a_bundle, only, spooling, stored
from examples.receiver import create_app
from support.sidecars import VITALSD, environment, eventually
from support.tools import program
from vitalsd_client import Spool, upload_tls
from vitalsd_client.upload import UploadFailure, UploadReceipt, UploadResult

linux = pytest.mark.skipif(sys.platform != "linux", reason="on macOS the keychains are trusted, not files")

NOT_TRUSTED = re.compile(
    r"the server's certificate is not trusted \([^()]+\); install the certificate of its authority on this machine,"
    r" or name a file with it by ca_file, on the command line by --ca-file"
)


class Authority:
    """
    A certificate authority of the tests, made by openssl.

    Args:
        folder: made for its files.
    """

    def __init__(self, folder: Path) -> None:
        self._openssl = program("openssl", package="openssl")
        self._folder = folder
        folder.mkdir()
        self.file = folder / "ca.pem"
        self._run("req", "-x509", *self._key("ca"), "-out", "ca.pem", "-days", "30", "-subj", f"/CN={folder.name}")

    def server(self, name: str, host: str = "DNS:localhost", days: int = 30) -> tuple[Path, Path]:
        """Return the files of a certificate for `host`, valid for `days` from now, and of its key."""
        extensions = f"subjectAltName={host}\nextendedKeyUsage=serverAuth\n"
        (self._folder / f"{name}.ext").write_text(extensions)
        self._run("req", "-new", *self._key(name), "-out", f"{name}.csr", "-subj", "/CN=receiver")
        issue = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", str(days), "-extfile", f"{name}.ext")
        self._run("x509", "-req", "-in", f"{name}.csr", "-out", f"{name}.pem", *issue)
        return self._folder / f"{name}.pem", self._folder / f"{name}.key"

    def directory(self) -> Path:
        """Return a directory with the certificate under the name by which OpenSSL looks for it."""
        hashed = self._run("x509", "-in", "ca.pem", "-noout", "-subject_hash").strip()
        folder = self._folder / "certificates"
        folder.mkdir()
        (folder / f"{hashed}.0").write_bytes(self.file.read_bytes())
        return folder

    def _key(self, name: str) -> tuple[str, ...]:
        return ("-newkey", "rsa:2048", "-nodes", "-keyout", f"{name}.key")

    def _run(self, *arguments: str) -> str:
        done = subprocess.run([self._openssl, *arguments], cwd=self._folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout


@contextmanager
def receiving_tls(store: Path, certificate: tuple[Path, Path]) -> Iterator[str]:
    """Run the example receiver with a certificate, on a thread; give its URL."""
    config = uvicorn.Config(
        create_app(store),
        host="127.0.0.1",
        port=0,
        http="h11",
        ws="none",
        log_config=None,
        access_log=False,
        ssl_certfile=certificate[0],
        ssl_keyfile=certificate[1],
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        eventually(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"https://localhost:{port}/reports"
    finally:
        server.should_exit = True
        thread.join(10)


@pytest.fixture(scope="module")
def authorities(tmp_path_factory: pytest.TempPathFactory) -> tuple[Authority, Authority]:
    """Make the authority of the receiver, and another one."""
    folder = tmp_path_factory.mktemp("authorities")
    return Authority(folder / "ours"), Authority(folder / "another")


@pytest.fixture
def ours(authorities: tuple[Authority, Authority]) -> Path:
    return authorities[0].file


@pytest.fixture(scope="module")
def certificate(authorities: tuple[Authority, Authority]) -> tuple[Path, Path]:
    return authorities[0].server("receiver")


@pytest.fixture
def receiver(tmp_path: Path, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR", "SSLKEYLOGFILE"):
        monkeypatch.delenv(name, raising=False)
    with receiving_tls(tmp_path / "store", certificate) as url:
        yield url


def sent(spool: Spool) -> UploadResult:
    """Add a report, send it, and return how the attempt ended."""
    report_id = spool.add(a_bundle())
    (outcome,) = spool.send(report_id=report_id)
    return outcome.attempt


def refused(spool: Spool) -> str:
    """Add a report, and return why it could not be sent; it is kept."""
    attempt = sent(spool)
    assert isinstance(attempt, UploadFailure)
    assert not attempt.final
    assert only(spool).state == "pending"
    return attempt.reason


# What is trusted


def test_upload_authority_unknown_refused_with_what_to_do(tmp_path: Path, receiver: str) -> None:
    """Keep the report in the spool; give a reason that is one sentence and names the options."""
    assert NOT_TRUSTED.fullmatch(refused(spooling(tmp_path, receiver)))
    assert stored(tmp_path) == []


def test_upload_ca_file_trusted(tmp_path: Path, receiver: str, ours: Path) -> None:
    """Take a path as text or as an object, with any comment in the file, which may be removed afterwards."""
    copy = tmp_path / "ca.pem"
    copy.write_bytes("# Unsere Zertifizierungsstelle, gültig bis März\n".encode() + ours.read_bytes())
    spools = spooling(tmp_path, receiver, ca_file=str(copy)), spooling(tmp_path, receiver, ca_file=copy)
    copy.unlink()
    for spool in spools:
        assert isinstance(sent(spool), UploadReceipt)
    assert len(stored(tmp_path)) == 2


@linux
@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "SSL_CERT_DIR"])
def test_upload_authority_in_environment_trusted(
    tmp_path: Path,
    receiver: str,
    authorities: tuple[Authority, Authority],
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
) -> None:
    """Trust what OpenSSL trusts; add an own authority to that, and do not replace it."""
    place = authorities[0].file if variable == "SSL_CERT_FILE" else authorities[0].directory()
    monkeypatch.setenv(variable, str(place))
    assert isinstance(sent(spooling(tmp_path, receiver)), UploadReceipt)
    assert isinstance(sent(spooling(tmp_path, receiver, ca_file=authorities[1].file)), UploadReceipt)


@linux
def test_upload_ssl_cert_file_missing_is_no_crash(
    tmp_path: Path, receiver: str, ours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trust less, and an own authority still."""
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "nowhere.pem"))
    assert "SSL_CERT_FILE" in refused(spooling(tmp_path, receiver))
    assert isinstance(sent(spooling(tmp_path, receiver, ca_file=ours)), UploadReceipt)


@linux
@pytest.mark.parametrize(
    ("variable", "value", "fault"),
    [
        ("SSL_CERT_FILE", "nowhere.pem", "which cannot be read: No such file or directory"),
        ("SSL_CERT_FILE", "junk.pem", "which has no certificate in PEM form, or a damaged one"),
        ("SSL_CERT_FILE", "", "which is not a file"),
        ("SSL_CERT_DIR", "nowhere", "where no file has a name that OpenSSL looks at"),
    ],
)
def test_upload_variable_of_openssl_wrong_refused_with_its_name(
    tmp_path: Path, receiver: str, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, fault: str
) -> None:
    """Say what OpenSSL ignores silently: the variable, its value and what is wrong with it."""
    (tmp_path / "junk.pem").write_text("-----BEGIN CERTIFICATE-----\njunk\n-----END CERTIFICATE-----\n")
    monkeypatch.setenv(variable, str(tmp_path / value))
    reason = refused(spooling(tmp_path, receiver))
    assert f"; {variable} is {str(tmp_path / value)!r}, {fault}); correct the variable, or unset it" in reason


@linux
def test_upload_store_elsewhere_trusted(
    tmp_path: Path, receiver: str, ours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Find the store of this Linux with an OpenSSL that was built for another one, as in a frozen program."""
    nothing = SimpleNamespace(cafile=None, capath=str(tmp_path))
    monkeypatch.setattr(ssl, "get_default_verify_paths", lambda: nothing)
    monkeypatch.setattr(upload_tls, "STORES", (str(tmp_path / "nowhere.pem"), str(ours)))
    assert isinstance(sent(spooling(tmp_path, receiver)), UploadReceipt)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "nowhere.pem"))
    spooling(tmp_path, receiver).add(a_bundle())
    (outcome,) = spooling(tmp_path).send()
    assert isinstance(outcome.attempt, UploadFailure), "what is set to restrict the trust restricts it"


@linux
def test_upload_certificate_of_the_server_itself_trusted(
    tmp_path: Path, authorities: tuple[Authority, Authority]
) -> None:
    """Take a file with the certificate of the server, without that of its authority."""
    certificate = authorities[1].server("pinned")
    with receiving_tls(tmp_path / "store", certificate) as url:
        assert isinstance(sent(spooling(tmp_path, url, ca_file=certificate[0])), UploadReceipt)


def test_upload_macos_trusts_by_truststore(
    tmp_path: Path, receiver: str, ours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Leave it to the keychains, which OpenSSL does not read; add an own authority."""
    made = []

    class Context(truststore.SSLContext):
        def __init__(self, protocol: int) -> None:
            super().__init__(protocol)
            made.append(self)

    monkeypatch.setattr(truststore, "SSLContext", Context)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert NOT_TRUSTED.fullmatch(refused(spooling(tmp_path, receiver)))
    assert isinstance(sent(spooling(tmp_path, receiver, ca_file=ours)), UploadReceipt)
    assert len(made) == 2
    monkeypatch.setitem(sys.modules, "truststore", None)
    spool = spooling(tmp_path / "without", receiver)
    assert refused(spool).startswith("a Python package that the upload needs does not load: import of truststore")


def test_upload_proxy_with_tls_trusts_the_same(
    tmp_path: Path, receiver: str, ours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Judge the certificate of a proxy as that of a server, and log no keys of that connection either."""
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "keys"))
    proxy, nowhere = receiver.removesuffix("/reports"), "http://127.0.0.1:9/"
    assert NOT_TRUSTED.fullmatch(refused(spooling(tmp_path, nowhere, proxy=proxy)))
    attempt = sent(spooling(tmp_path / "trusted", nowhere, proxy=proxy, ca_file=ours))
    assert isinstance(attempt, UploadFailure)
    assert attempt.reason == "the server answered 404", "the example receiver is no proxy, but it was reached"
    assert not (tmp_path / "keys").exists()


def test_upload_keys_are_not_logged(tmp_path: Path, receiver: str, ours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give no key away because SSLKEYLOGFILE is in the environment of a host program."""
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "keys"))
    assert isinstance(sent(spooling(tmp_path, receiver, ca_file=ours)), UploadReceipt)
    assert not (tmp_path / "keys").exists()


# Error texts


def test_upload_certificate_of_another_host_refused(tmp_path: Path, authorities: tuple[Authority, Authority]) -> None:
    """Name the host as the reason, and not the authority."""
    certificate = authorities[0].server("elsewhere", "DNS:elsewhere.example")
    with receiving_tls(tmp_path / "store", certificate) as url:
        reason = refused(spooling(tmp_path, url, ca_file=authorities[0].file))
    assert reason.startswith("the server's certificate is for another host (")
    assert reason.endswith("); check the URL and the certificate")


def test_upload_certificate_expired_refused(tmp_path: Path, authorities: tuple[Authority, Authority]) -> None:
    """Name the time as the reason: the clock here or the certificate is wrong."""
    certificate = authorities[0].server("expired", days=0)
    time.sleep(1.1)
    with receiving_tls(tmp_path / "store", certificate) as url:
        reason = refused(spooling(tmp_path, url, ca_file=authorities[0].file))
    assert reason.startswith("the server's certificate is not valid now (")
    assert reason.endswith("); check the clock of this machine and the certificate")


def bad_ca_file(folder: Path, kind: str, good: Path) -> Path:
    """Return a path at which there are no certificates."""
    path = folder / "bad.pem"
    if kind == "directory":
        path.mkdir()
    elif kind != "missing":
        text = good.read_text()
        contents = {"empty": "", "key": good.with_name("ca.key").read_text(), "text": "hello", "cut": text[:400]}
        path.write_text({**contents, "second damaged": text + text.replace("MII", "???")}[kind])
    return path


BAD_FILES = {
    "missing": "No such file or directory",
    "directory": "Is a directory",
    "empty": "it has no certificate",
    "key": "it has no certificate",
    "text": "it has no certificate",
    "cut": "or a damaged one",
    "second damaged": "or a damaged one",
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_spool_ca_file_bad_raises_at_once(tmp_path: Path, ours: Path, kind: str) -> None:
    """Raise ValueError when the spool is made, with the path, the reason and what to do."""
    bad = bad_ca_file(tmp_path, kind, ours)
    with pytest.raises(ValueError, match=BAD_FILES[kind]) as raised:
        spooling(tmp_path, "https://example.com/", ca_file=bad)
    assert repr(str(bad)) in str(raised.value)
    assert "; name a file " in str(raised.value)
    assert not (tmp_path / "spool").exists()


def test_spool_ca_file_nul_in_path_raises(tmp_path: Path) -> None:
    """Raise ValueError, with the reason of the system call that was never made."""
    with pytest.raises(ValueError, match="null byte"):
        spooling(tmp_path, "https://example.com/", ca_file="a\0b")


# The command


def vitalsd(home: Path, *arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*VITALSD, *arguments], capture_output=True, text=True, timeout=40, env=environment(home) | variables, cwd=home
    )


def test_report_ca_file_trusted_and_without_refused(tmp_path: Path, receiver: str, ours: Path) -> None:
    """Take --ca-file in `report --upload` and `spool send`; without it keep the report, and say why in a sentence."""
    out = vitalsd(tmp_path, "report", "--upload", receiver, "--direct")
    assert out.returncode == 1
    (line,) = [line for line in out.stderr.splitlines() if ": not sent: " in line]
    assert NOT_TRUSTED.fullmatch(line.partition(": not sent: ")[2])
    out = vitalsd(tmp_path, "spool", "send", "--ca-file", str(ours))
    assert (out.returncode, out.stderr) == (0, "")
    assert "sent, receipt R-" in out.stdout
    out = vitalsd(tmp_path, "report", "--upload", receiver, "--ca-file", str(ours), "--direct", "--json")
    assert out.returncode == 0, out.stderr
    result: Any = json.loads(out.stdout)
    assert result["report_id"] in stored(tmp_path)
    assert len(stored(tmp_path)) == 2


@linux
def test_report_ssl_cert_file_trusted(tmp_path: Path, receiver: str, ours: Path) -> None:
    """Trust the store of the system, as OpenSSL finds it, without any option; log no keys."""
    variables = {"SSL_CERT_FILE": str(ours), "SSLKEYLOGFILE": str(tmp_path / "keys")}
    out = vitalsd(tmp_path, "report", "--upload", receiver, "--direct", **variables)
    assert out.returncode == 0, out.stderr
    assert len(stored(tmp_path)) == 1
    assert not (tmp_path / "keys").exists()


@pytest.mark.parametrize("command", [("report", "--direct", "--upload", "https://localhost:9/"), ("spool", "send")])
def test_report_ca_file_bad_is_wrong_usage(tmp_path: Path, command: tuple[str, ...]) -> None:
    """Exit with status 2 and one sentence; measure nothing and write nothing."""
    (tmp_path / "bad.pem").write_text("no certificate")
    for path, why in ("nowhere.pem", "No such file or directory"), ("bad.pem", "it has no certificate in PEM form"):
        out = vitalsd(tmp_path, *command, "--ca-file", path)
        assert (out.returncode, out.stdout) == (2, "")
        (line,) = [line for line in out.stderr.splitlines() if line.startswith("Error: ")]
        assert f"'{path}'" in line
        assert why in line
        assert out.stderr.endswith(f"{line}\n")
        assert "Traceback" not in out.stderr
    assert list(tmp_path.glob("*.zip")) == []


def test_report_ca_file_without_upload_is_wrong_usage(tmp_path: Path, ours: Path) -> None:
    """Refuse an option that would do nothing."""
    out = vitalsd(tmp_path, "report", "--direct", "--ca-file", str(ours))
    assert out.returncode == 2
    assert out.stderr.endswith("Error: --ca-file does nothing without --upload\n")
