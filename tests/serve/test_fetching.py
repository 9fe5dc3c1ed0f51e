"""Fetching start images, from a real HTTP server on this machine: every way that leads elsewhere is closed.

The resolver is the test's own, as no name resolves here; the addresses are looked at by the server's own rules unless a
test is about what comes after them.
"""

from __future__ import annotations

import asyncio
import shutil
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from wan_runtime.serve import fetching
from wan_runtime.serve.errors import ApiError
from wan_runtime.serve.fetching import Fetcher, is_public

CONTENT = b"\x89PNG whatever"
NAME = "images.example"


class Handler(BaseHTTPRequestHandler):
    """Answers by path, and notes what it was asked."""

    seen: list[tuple[str, str]]  # path and Host

    def do_GET(self) -> None:
        self.seen.append((self.path, self.headers["host"]))
        port = self.connection.getsockname()[1]
        redirects = {
            "/once": "/image", "/loop": "/loop", "/away": f"http://other.example:{port}/image",
            "/local": f"http://127.0.0.1:{port}/image", "/file": "file:///etc/passwd",
            "/credentials": f"http://a:b@{NAME}:{port}/image", "/rebound": f"http://rebound.example:{port}/image",
            "/unreadable": "http://a:b/", "/port": f"http://{NAME}:99999/", "/decimal": f"http://2130706433:{port}/image",
            "/mapped": f"http://[::ffff:169.254.169.254]:{port}/image", "/latin": "http://\xff.example/",
            "/idna": "http://-\xff-.example/",
        }  # fmt: skip
        if self.path in redirects:
            self.send_response(302)
            self.send_header("location", redirects[self.path])
            self.end_headers()
            return
        self.send_response(404 if self.path == "/gone" else 200)
        if self.path == "/compressed":
            self.send_header("content-encoding", "gzip")
        self.end_headers()
        try:
            for _ in range(64 if self.path == "/endless" else 1):
                self.wfile.write(b"\0" * 2**20 if self.path == "/endless" else CONTENT)
                if self.path == "/slow":
                    time.sleep(2)
        except OSError:
            pass  # cut off

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def host() -> Iterator[ThreadingHTTPServer]:
    Handler.seen = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def resolving(*answers: Sequence[str]) -> tuple[Callable[..., object], list[str]]:
    """A resolver that answers so in turn, then for ever as the last time, and what it was asked."""
    asked: list[str] = []

    async def resolve(name: str, _: int) -> Sequence[str]:
        asked.append(name)
        return answers[min(len(asked), len(answers)) - 1]

    return resolve, asked


def fetch(url: str, *, hosts: Sequence[str], answers: Sequence[Sequence[str]] = (("127.0.0.1",),),
          allows: Callable[[str], bool] = lambda ip: ip == "127.0.0.1", **options: object) -> bytes:  # fmt: skip
    resolve, _ = resolving(*answers)
    fetcher = Fetcher(frozenset(hosts), resolve=resolve, allows=allows, **options)  # type: ignore[arg-type]
    return asyncio.run(fetcher.fetch(url))


def refused(url: str, **options: object) -> ApiError:
    with pytest.raises(ApiError) as error:
        fetch(url, **options)  # type: ignore[arg-type]
    assert error.value.status == 422 and error.value.param == "input_reference"
    return error.value


@pytest.mark.parametrize("path", ["/image", "/once"])
def test_an_allowed_host_is_fetched_from_under_its_name(host: ThreadingHTTPServer, path: str) -> None:
    at = f"{NAME}:{host.server_port}"
    assert fetch(f"http://{at}{path}", hosts=[at]) == CONTENT
    assert Handler.seen[-1] == ("/image", at)


def test_a_name_is_resolved_once_and_the_connection_goes_where_was_looked(host: ThreadingHTTPServer) -> None:
    """DNS rebinding: the second answer would be an address that nobody has looked at, and is never asked for."""
    at = f"{NAME}:{host.server_port}"
    resolve, asked = resolving(["127.0.0.1"], ["10.0.0.1"])
    fetcher = Fetcher(frozenset([at]), resolve=resolve, allows=lambda ip: ip == "127.0.0.1")  # type: ignore[arg-type]
    assert asyncio.run(fetcher.fetch(f"http://{at}/image")) == CONTENT
    assert asked == [NAME]


def test_a_redirect_is_resolved_and_looked_at_again(host: ThreadingHTTPServer) -> None:
    port = host.server_port
    hosts = [f"{NAME}:{port}", f"rebound.example:{port}"]
    error = refused(f"http://{NAME}:{port}/rebound", hosts=hosts, answers=(["127.0.0.1"], ["10.0.0.1"]))
    assert error.code == "image_url_refused" and "not public" in error.message
    assert [path for path, _ in Handler.seen] == ["/rebound"]


@pytest.mark.parametrize(
    "path",
    [
        "/away",
        "/local",
        "/file",
        "/credentials",
        "/port",
        "/decimal",
        "/mapped",
        "/latin",
    ],
)
def test_a_redirect_to_what_may_not_be_fetched_is_refused(host: ThreadingHTTPServer, path: str) -> None:
    at = f"{NAME}:{host.server_port}"
    assert refused(f"http://{at}{path}", hosts=[at]).code == "image_url_refused"
    assert [seen for seen, _ in Handler.seen] == [path]


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("/loop", "more than 3 times"),
        ("/gone", "status 404"),
        ("/endless", "larger than"),
        ("/compressed", "compressed"),
        ("/unreadable", "connection failed"),
        ("/idna", "connection failed"),
    ],
)
def test_what_fails_is_told(host: ThreadingHTTPServer, path: str, why: str) -> None:
    at = f"{NAME}:{host.server_port}"
    error = refused(f"http://{at}{path}", hosts=[at])
    assert error.code == "image_url_failed" and why in error.message
    assert len(Handler.seen) <= 4


def test_a_host_that_trickles_is_given_up(host: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "SECONDS", 0.5)
    at = f"{NAME}:{host.server_port}"
    assert "longer than 0.5 s" in refused(f"http://{at}/slow", hosts=[at]).message


@pytest.mark.parametrize(
    "url",
    [
        "http://other.example/image", "http://images.example.evil/image", "http://evil-images.example/image",
        "http://images.example:8080/image", "http://images.example@127.0.0.1/image", "http://127.0.0.1/image",
        "http://user:secret@images.example/image", "ftp://images.example/image", "file:///etc/passwd", "gopher://images.example",
        "//images.example/image", "images.example/image", "/etc/passwd", "http:///image", "", "http://[::1]/", "http://[",
        "http://images.example\\@127.0.0.1/", "http://images.example#@127.0.0.1/"[:7] + "x" * 3000,
        "https://images.example:80/image", "javascript:alert(1)", "http://0x7f.1/", "http://2130706433/",
    ],
)  # fmt: skip
def test_other_urls_are_refused_before_any_name_is_looked_up(url: str) -> None:
    resolve, asked = resolving(["93.184.216.34"])
    fetcher = Fetcher(frozenset([NAME]), resolve=resolve)  # type: ignore[arg-type]
    with pytest.raises(ApiError) as error:
        asyncio.run(fetcher.fetch(url))
    assert (error.value.status, error.value.code, asked) == (422, "image_url_refused", [])


INNER = [
    "127.0.0.1", "127.8.8.8", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0",
    "224.0.0.1", "255.255.255.255", "192.0.2.1", "198.18.0.1", "240.0.0.1",
    "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "fec0::1", "ff02::1", "2001:db8::1",
    "::ffff:127.0.0.1", "::ffff:169.254.169.254", "::ffff:8.8.8.8", "::127.0.0.1", "64:ff9b::7f00:1",
    "64:ff9b:1::a00:1", "2002:7f00:1::", "2001:0:7f00:1::",
]  # fmt: skip


@pytest.mark.parametrize("address", INNER)
def test_a_name_with_an_address_that_is_not_public_is_refused(address: str) -> None:
    assert not is_public(address)
    for answer in ([address], ["93.184.216.34", address]):
        error = refused("https://images.example/x", hosts=[NAME], answers=(answer,), allows=is_public)
        assert error.code == "image_url_refused" and address not in error.message


@pytest.mark.parametrize("address", ["93.184.216.34", "8.8.8.8", "2606:2800:220:1:248:1893:25c8:1946"])
def test_addresses_of_the_internet_are_public(address: str) -> None:
    assert is_public(address)


def test_a_name_that_does_not_resolve_fails() -> None:
    fetcher = Fetcher(frozenset(["nowhere.invalid"]))
    with pytest.raises(ApiError) as error:
        asyncio.run(fetcher.fetch("https://nowhere.invalid/x"))
    assert error.value.code == "image_url_failed"


def test_the_environments_proxy_is_not_used(
    host: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    at = f"{NAME}:{host.server_port}"
    assert fetch(f"http://{at}/image", hosts=[at]) == CONTENT


def certificate(folder: Path, name: str) -> Path:
    """A self-signed certificate for a name, and its key, in one file."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("there is no `openssl` on this machine to make a certificate with")
    path, key = folder / "certificate.pem", folder / "key.pem"
    command = (
        f"{openssl} req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 1 -subj /CN={name}"
    )
    where = ["-addext", f"subjectAltName=DNS:{name}", "-keyout", str(key), "-out", str(path)]
    subprocess.run([*command.split(), *where], check=True, capture_output=True)
    path.write_bytes(path.read_bytes() + key.read_bytes())
    return path


def test_over_tls_the_certificate_has_to_be_for_the_name(host: ThreadingHTTPServer, tmp_path: Path) -> None:
    path = certificate(tmp_path, NAME)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(path)
    host.socket = server.wrap_socket(host.socket, server_side=True)
    trusted = ssl.create_default_context(cafile=str(path))
    at, wrong = (f"{name}:{host.server_port}" for name in (NAME, "other.example"))
    assert fetch(f"https://{at}/image", hosts=[at], tls=trusted) == CONTENT
    assert Handler.seen == [("/image", at)]
    assert refused(f"https://{wrong}/image", hosts=[wrong], tls=trusted).code == "image_url_failed"
    assert refused(f"https://{at}/image", hosts=[at]).code == "image_url_failed"  # nobody vouches for it
    assert (
        "to http"
        in refused(f"https://{at}/away", hosts=[at, f"other.example:{host.server_port}"], tls=trusted).message
    )
