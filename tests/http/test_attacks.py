"""
What a page of another site can do to a sidecar: nothing. A real Chromium asks, a real server is asked.

``evil.test`` is a name of the attacker's server on this machine. ``rebound.test`` is a name that pointed
to the attacker, at the sidecar's own port, when the page was loaded, and points to the sidecar since:
a relay stands for the change, because what the browser sends is the same.
"""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from types import TracebackType

import pytest

from support.browser import Browser
from support.edge import Counted, Edge, whole_app
from support.sidecars import eventually

pytestmark = pytest.mark.live

RULES = "--host-resolver-rules=MAP evil.test 127.0.0.1, MAP rebound.test 127.0.0.2"
PAGE = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 36\r\nConnection: close\r\n\r\n"
    b"<!doctype html><title>x</title><body>"[:36]
)


class Attacker:
    """
    A web server that has one page, at every path but /redirect?URL, which redirects there.

    Args:
        address: where it listens; port 0 takes a free one.
        relay_to: if given, only /attack is the page, and all else goes to this port as it came.
    """

    def __init__(self, address: tuple[str, int], relay_to: int | None = None) -> None:
        self._listener = socket.create_server(address)
        self.port = self._listener.getsockname()[1]
        self._relay_to = relay_to
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            connection.settimeout(20)
            head = b""
            while b"\r\n\r\n" not in head:
                part = connection.recv(65536)
                if not part:
                    return
                head += part
            if head.startswith(b"GET /redirect?"):
                to = head.split()[1].partition(b"?")[2]
                connection.sendall(b"HTTP/1.1 302 Found\r\nLocation: %b\r\nContent-Length: 0\r\n\r\n" % to)
            elif self._relay_to is None or b" /attack " in head:
                connection.sendall(PAGE)
            else:
                self._relay(head, connection)

    def _relay(self, head: bytes, connection: socket.socket) -> None:
        assert self._relay_to is not None
        with socket.create_connection(("127.0.0.1", self._relay_to), 20) as sidecar:
            sidecar.sendall(head.replace(b"keep-alive", b"close", 1))
            while part := sidecar.recv(65536):
                connection.sendall(part)

    def __enter__(self) -> "Attacker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()


@pytest.fixture(scope="module")
def counted() -> Counted:
    return Counted(whole_app())


@pytest.fixture(scope="module")
def edge(counted: Counted) -> Iterator[Edge]:
    with Edge(counted) as running:
        yield running


@pytest.fixture(scope="module")
def attacker() -> Iterator[Attacker]:
    with Attacker(("127.0.0.1", 0)) as running:
        yield running


@pytest.fixture(scope="module")
def rebinding(edge: Edge) -> Iterator[Attacker]:
    port = int(edge.url.rpartition(":")[2])
    try:
        running = Attacker(("127.0.0.2", port), relay_to=port)
    except OSError as error:
        pytest.skip(f"only one loopback address here: {error}")
    with running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser(RULES) as running:
        yield running


WAIT = """
const settled = (promise) => Promise.race([
  promise.then((value) => String(value), (error) => "failed"),
  new Promise((done) => setTimeout(done, 10000, "nothing came of it")),
]);
const element = (tag, attributes) => new Promise((done) => {
  const made = document.createElement(tag);
  made.onload = made.onloadeddata = () => done("loaded");
  made.onerror = () => done("failed");
  Object.assign(made, attributes);
  document.body.append(made);
});
const speculate = (kind, url) => {
  const rules = document.createElement('script');
  rules.type = 'speculationrules';
  rules.textContent = JSON.stringify({[kind]: [{source: 'list', urls: [url], eagerness: 'immediate'}]});
  document.body.append(rules);
  return Promise.resolve('sent');
};
const said = (answer) => `${answer.type} ${answer.status}`;
"""

# What the page tries, and what it may learn at most.
SHAPES = {
    "fetch": ("fetch(T + '/metrics').then(said)", "failed"),
    "fetch without CORS": ("fetch(T + '/metrics', {mode: 'no-cors'}).then(said)", "failed"),
    "fetch with credentials": (
        "fetch(T + '/metrics', {mode: 'no-cors', credentials: 'include'}).then(said)",
        "failed",
    ),
    "fetch of localhost": ("fetch(L + '/metrics', {mode: 'no-cors'}).then(said)", "failed"),
    "fetch of 0.0.0.0": ("fetch(Z + '/metrics', {mode: 'no-cors'}).then(said)", "failed"),
    "fetch with a header": ("fetch(T + '/metrics', {headers: {Authorization: 'Bearer x'}}).then(said)", "failed"),
    "post": (
        "fetch(T + '/marks', {method: 'POST', mode: 'no-cors', body: '{\"label\":\"x\"}'}).then(said)",
        "failed",
    ),
    "post of JSON": (
        "fetch(T + '/marks', {method: 'POST', headers: {'Content-Type': 'application/json'}, body: '{}'}).then(said)",
        "failed",
    ),
    "beacon": ("Promise.resolve(navigator.sendBeacon(T + '/marks', 'label'))", "true"),
    "image": ("element('img', {src: T + '/metrics'})", "failed"),
    "image without referrer": ("element('img', {referrerPolicy: 'no-referrer', src: T + '/metrics'})", "failed"),
    "script": ("element('script', {src: T + '/metrics'})", "failed"),
    "module": ("import(T + '/metrics').then(() => 'loaded')", "failed"),
    "style": ("element('link', {rel: 'stylesheet', href: T + '/metrics'})", "failed"),
    "video": ("element('video', {preload: 'auto', src: T + '/report.zip'})", "failed"),
    "object": ("element('object', {data: T + '/metrics'})", "failed"),
    "frame": (
        "element('iframe', {referrerPolicy: 'no-referrer', src: T + '/'})"
        ".then(() => { try { return frames[0].document.body.textContent } catch { return 'hidden' } })",
        "hidden",
    ),
    "form": (
        "(() => { const frame = document.createElement('iframe'); frame.name = 'f'; document.body.append(frame);"
        " const form = document.createElement('form'); Object.assign(form, {method: 'post', target: 'f',"
        " enctype: 'text/plain', action: T + '/marks'}); document.body.append(form);"
        " return new Promise((done) => { frame.onload = () => done('sent'); form.submit(); }) })()",
        "sent",
    ),
    "sandboxed frame": (
        "new Promise((done) => { onmessage = (message) => done(message.data); const frame ="
        " document.createElement('iframe'); frame.sandbox = 'allow-scripts'; frame.srcdoc ="
        " `<script>fetch('${T}/metrics').then(() => parent.postMessage('read', '*'),"
        " () => parent.postMessage('failed', '*'))</scr` + 'ipt>'; document.body.append(frame); })",
        "failed",
    ),
    "events": (
        "new Promise((done) => { const source = new EventSource(T + '/stream'); source.onmessage = () => done('read');"
        " source.onerror = () => { source.close(); done('failed') } })",
        "failed",
    ),
    "web socket": (
        "new Promise((done) => { const made = new WebSocket(T.replace('http', 'ws') + '/stream');"
        " made.onopen = () => done('read'); made.onerror = () => done('failed') })",
        "failed",
    ),
    "preload": ("element('link', {rel: 'preload', as: 'fetch', crossOrigin: '', href: T + '/metrics'})", "failed"),
    "module preload": ("element('link', {rel: 'modulepreload', href: T + '/metrics'})", "failed"),
    "prefetch": ("element('link', {rel: 'prefetch', href: T + '/report.zip'})", "failed"),
    "speculation, prefetch": ("speculate('prefetch', T + '/report.zip?window_ms=10')", "sent"),
    "speculation, prerender": ("speculate('prerender', T + '/metrics?window_ms=10')", "sent"),
    "ping": (
        "(() => { const link = document.createElement('a'); Object.assign(link, {href: '#', ping: T + '/marks'});"
        " document.body.append(link); link.click(); return Promise.resolve('sent') })()",
        "sent",
    ),
    "audio": ("element('audio', {preload: 'auto', src: T + '/stream'})", "failed"),
    "background": (
        "(() => { document.body.style.background = `url(${T}/metrics)`; return Promise.resolve('sent') })()",
        "sent",
    ),
    "font": ("new FontFace('f', `url(${T}/metrics)`).load().then(() => 'loaded')", "failed"),
    "redirected image": ("element('img', {src: '/redirect?' + T + '/report.zip'})", "failed"),
    "worker": (
        "new Promise((done) => {"
        " const made = new Worker(URL.createObjectURL(new Blob([`importScripts('${T}/metrics')`])));"
        " made.onmessage = () => done('read'); made.onerror = () => done('failed') })",
        "failed",
    ),
}


def attempt(browser: Browser, edge: Edge, script: str) -> str:
    port = edge.url.rpartition(":")[2]
    places = f"const T = 'http://127.0.0.1:{port}', L = 'http://localhost:{port}', Z = 'http://0.0.0.0:{port}';"
    return str(browser.run(f"(async () => {{ {places} {WAIT} return settled({script}) }})()"))


def arrives(edge: Edge, before: int) -> None:
    """Wait until one request more has been answered, or refused."""
    eventually(lambda: edge.answered > before)


@pytest.mark.parametrize("origin", ["evil.test", "localhost", "127.0.0.1"])
def test_page_of_another_origin_runs_no_handler_and_reads_nothing(
    browser: Browser, edge: Edge, counted: Counted, attacker: Attacker, origin: str
) -> None:
    """
    However a page asks, from another site or another port of this machine: no handler runs, no byte is read.

    Each request does arrive, so it is our refusal that is shown here and not the browser's.
    """
    counted.reached.clear()
    learnt: dict[str, str] = {}
    for name, (script, _) in SHAPES.items():
        before = edge.answered
        browser.open(f"http://{origin}:{attacker.port}/")
        browser.eventually("document.readyState", lambda state: state == "complete")
        learnt[name] = attempt(browser, edge, script)
        if name != "fetch of 0.0.0.0":  # which newer browsers do not send
            arrives(edge, before)
        assert counted.reached == [], name
    assert learnt == {name: most for name, (_, most) in SHAPES.items()}


@pytest.mark.parametrize("path", ["/report.zip", "/metrics?window_ms=60000", "/stream", "/openapi.json"])
def test_typed_address_of_another_site_that_redirects_reads_no_data(
    browser: Browser, edge: Edge, counted: Counted, attacker: Attacker, path: str
) -> None:
    """The sidecar sees an address that a user typed; only pages without data have such addresses."""
    counted.reached.clear()
    before = edge.answered
    browser.open(f"http://evil.test:{attacker.port}/redirect?{edge.url}{path}")
    arrives(edge, before)
    assert counted.reached == []
    before = edge.answered
    browser.open(f"http://evil.test:{attacker.port}/redirect?{edge.url}/docs")
    arrives(edge, before)
    assert counted.reached == ["GET /docs"]


@pytest.mark.parametrize("path", ["/", "/metrics?window_ms=60000", "/report.zip", "/stream", "/openapi.json"])
def test_link_from_another_site_without_a_token_is_refused(
    browser: Browser, edge: Edge, counted: Counted, attacker: Attacker, path: str
) -> None:
    """Without a token, with which it may lead to the page, it leads nowhere: in the same window or a new one."""
    counted.reached.clear()
    for script in (f"void (location = '{edge.url}{path}')", f"void window.open('{edge.url}{path}')"):
        before = edge.answered
        browser.open(f"http://evil.test:{attacker.port}/")
        browser.eventually("document.readyState", lambda state: state == "complete")
        browser.call("Runtime.evaluate", expression=script, userGesture=True)
        arrives(edge, before)
    assert counted.reached == []


def test_link_from_another_site_opens_the_page_without_access_to_it(counted: Counted, attacker: Attacker) -> None:
    """
    A token protects all other routes.

    The page is then on its own: the window that opened it has no hold on it, and does not learn what it shows.
    """
    counted.reached.clear()
    with Edge(counted, token="a" * 43) as edge, Browser(RULES) as browser:
        browser.open(f"http://evil.test:{attacker.port}/")
        browser.eventually("document.readyState", lambda state: state == "complete")
        script = f"void (opened = window.open('{edge.url}/'))"
        browser.call("Runtime.evaluate", expression=script, userGesture=True)
        eventually(lambda: counted.reached[:1] == ["GET /"])
        browser.eventually("opened.closed")
        assert browser.run("(() => { try { return opened.document.title } catch { return 'hidden' } })()") == "hidden"


def test_dns_rebinding_page_reads_only_421(browser: Browser, edge: Edge, counted: Counted, rebinding: Attacker) -> None:
    """The browser sees one origin, so the page reads every answer, and each of them is 421."""
    counted.reached.clear()
    origin = f"http://rebound.test:{rebinding.port}"
    for path in ("/metrics", "/", "/stream", "/report.zip", "/healthz"):
        browser.open(f"{origin}/attack")
        browser.eventually("document.readyState", lambda state: state == "complete")
        before = edge.answered
        answer = browser.run(f"fetch('{path}').then(async (a) => [a.status, await a.text()])")
        assert edge.answered > before
        assert answer[0] == 421
        assert json.loads(answer[1])["reason"] == "misdirected"
    browser.open(f"{origin}/")
    browser.eventually("document.body && document.body.innerText", lambda text: text and "misdirected" in text)
    assert counted.reached == []


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost"])
def test_page_opened_by_a_typed_address_gets_its_data(edge: Edge, counted: Counted, name: str) -> None:
    """An address that was typed opens it, and what it asks for it gets."""
    counted.reached.clear()
    with Browser() as browser:
        browser.open(edge.url.replace("127.0.0.1", name) + "/")
        eventually(lambda: any(each != "GET /" for each in counted.reached), 15)
        browser.listen(0.5)
        assert counted.reached[0] == "GET /"
        assert [each for each in browser.complaints if "403" in each or "421" in each or "policy" in each] == []
