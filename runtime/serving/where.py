"""Where a server listens, and to whom."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass, field

from ...attention.errors import FarspanError


@dataclass(frozen=True, kw_only=True)
class Where:
    """Where a server listens, and to whom. port: 0 takes a free one. api_key: what every request must
    bring."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        key = self.api_key
        if key is not None and not (key and key.isascii() and key.isprintable() and key == key.strip()):
            raise FarspanError(
                "The API key is empty, or has characters or outer spaces that no HTTP header can carry; "
                "choose another one."
            )
        if self.api_key is None and not is_local(self.host):
            raise FarspanError(
                f"--host {self.host} lets other machines in, which needs an API key: set FARSPAN_API_KEY, "
                "give --api-key, or listen on 127.0.0.1."
            )

    def listening(self) -> socket.socket:
        """A socket that listens there: clients can connect, and wait until they are served. Raises
        FarspanError where that is not possible."""
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(
                self.host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            made = socket.socket(family, kind, protocol)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(address)
            made.listen()
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise FarspanError(
                f"The server cannot listen on {self.host}, port {self.port} ({reason}): give another "
                "--port or --host."
            ) from None
        return made


def is_local(host: str) -> bool:
    """Whether a name or an address is that of this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
