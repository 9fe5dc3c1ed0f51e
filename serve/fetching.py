"""Start images from elsewhere: from hosts that the operator has named, and never from this network.

A client chooses the URL, so a fetch must not become a way to addresses that only this machine can reach. The name is
resolved once, every address of it has to be public, and the connection goes to the one that was looked at: a name that
resolves to something else a moment later (DNS rebinding) changes nothing. Each redirect is a new URL, checked as the
first. Proxies and credentials of the environment are not used. The size is bounded while it arrives, uncompressed.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass

import anyio
import httpx

from .errors import ApiError

MAX_BYTES = 32 * 2**20
MAX_URL = 2048
MAX_REDIRECTS = 3
SECONDS = 30.0
AT_ONCE = 4
PORTS = {"http": 80, "https": 443}
# IPv6 addresses that stand for IPv4 ones: a gateway would lead from them to any of those.
TRANSLATED = [
    ipaddress.IPv6Network(net)
    for net in ("::/96", "::ffff:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48", "2001::/32", "2002::/16")
]


def is_public(address: str) -> bool:
    """Whether an IP address is one of the Internet: not private, loopback, link-local, multicast, nor translated."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address) and (ip.is_site_local or any(ip in net for net in TRANSLATED)):
        return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


async def resolve(host: str, port: int) -> Sequence[str]:
    """The addresses of a name, as this machine's resolver gives them."""
    found = await anyio.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


@dataclass(frozen=True)
class Fetcher:
    """Fetches from `hosts`: names, or `name:port` where the port is not the scheme's own."""

    hosts: frozenset[str]
    resolve: Callable[[str, int], Awaitable[Sequence[str]]] = resolve
    allows: Callable[[str], bool] = is_public
    tls: ssl.SSLContext | bool = True

    async def fetch(self, url: str) -> bytes:
        """The content behind a URL. Raises ApiError 422 for one that may not be fetched, and for one that fails."""
        try:
            with anyio.fail_after(SECONDS):
                return await self._follow(url)
        except TimeoutError:
            raise _failed(f"it took longer than {SECONDS:g} s") from None
        except (httpx.HTTPError, OSError, UnicodeError) as error:
            raise _failed(f"the connection failed ({type(error).__name__})") from None

    async def _follow(self, url: str) -> bytes:
        at = self._checked(url)
        async with httpx.AsyncClient(trust_env=False, verify=self.tls, timeout=10) as client:
            for _ in range(MAX_REDIRECTS + 1):
                asked = await self._request(client, at)
                async with _sent(client, asked) as answer:
                    if not answer.has_redirect_location:
                        return await _read(answer)
                    target = self._checked(str(at.join(answer.headers["location"])))
                if at.scheme == "https" and target.scheme != "https":
                    raise _refused("leads from https to http")
                at = target
        raise _failed(f"it redirects more than {MAX_REDIRECTS} times")

    def _checked(self, url: str) -> httpx.URL:
        if len(url) > MAX_URL:
            raise _refused(f"has {len(url)} characters; up to {MAX_URL} are taken")
        try:
            parsed = httpx.URL(url)
        except (httpx.InvalidURL, ValueError):
            raise _refused("is none that can be read") from None
        if parsed.scheme not in PORTS or not parsed.host:
            raise _refused("is not of the form https://host/path")
        if parsed.userinfo:
            raise _refused("holds a user name or password")
        host = parsed.raw_host.decode("ascii").lower().rstrip(".")
        port = PORTS[parsed.scheme] if parsed.port is None else parsed.port
        named = host if port == PORTS[parsed.scheme] else f"{host}:{port}"
        if named not in self.hosts:
            raise _refused(
                f"names the host {named[:80]!r}, which is not among those that this server fetches from"
            )
        return parsed

    async def _request(self, client: httpx.AsyncClient, url: httpx.URL) -> httpx.Request:
        """A request to an address that has been looked at, under the name that the URL gives, for TLS too."""
        addresses = await self.resolve(url.raw_host.decode("ascii"), url.port or PORTS[url.scheme])
        if not addresses or not all(map(self.allows, addresses)):
            raise _refused("names a host with an address that is not public")
        headers = {"host": url.netloc.decode("ascii"), "accept": "image/*", "accept-encoding": "identity"}
        extensions = {"sni_hostname": url.raw_host.decode("ascii")}
        return client.build_request(
            "GET", url.copy_with(host=addresses[0]), headers=headers, extensions=extensions
        )


@contextlib.asynccontextmanager
async def _sent(client: httpx.AsyncClient, request: httpx.Request) -> AsyncIterator[httpx.Response]:
    """An answer whose body is yet to be read, closed at the end whatever happened."""
    answer = await client.send(request, stream=True, follow_redirects=False)
    try:
        yield answer
    finally:
        await answer.aclose()


async def _read(answer: httpx.Response) -> bytes:
    if answer.status_code != httpx.codes.OK:
        raise _failed(f"the host answered with the status {answer.status_code}")
    if answer.headers.get("content-encoding", "identity").lower() != "identity":
        raise _failed("the host compressed it, though it was asked not to")
    content = bytearray()
    async for chunk in answer.aiter_raw():
        content += chunk
        if len(content) > MAX_BYTES:
            raise _failed(f"it is larger than {MAX_BYTES} bytes")
    return bytes(content)


def _refused(why: str) -> ApiError:
    return ApiError(422, "image_url_refused", f"The image_url {why}.", param="input_reference")


def _failed(why: str) -> ApiError:
    return ApiError(
        422, "image_url_failed", f"The image could not be fetched: {why}.", param="input_reference"
    )
