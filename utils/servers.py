"""What commands that serve others have in common."""

import ipaddress
import re
import socket

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?b?)")
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def parse_size(text: str) -> int:
    """Return the bytes of a size such as "500mb" or "1.5 GB"; units are powers of 1024.

    Raises:
        ValueError: no size, or 0.
    """
    match = _SIZE.fullmatch(text.strip().lower())
    size = 0 if match is None else int(float(match[1]) * _UNITS[match[2].rstrip("b")])
    if size == 0:
        raise ValueError(f"{text!r}: no size; expected one such as 500mb or 1gb.")
    return size


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def open_port(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Args:
        host: name or address of this machine.
        port: 0 = any that is free.

    Raises:
        ValueError: the port is taken, or the host isn't this machine.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=256)
    except (OSError, OverflowError) as error:
        raise ValueError(f"{host}:{port}: can't listen there ({error}). Choose another --host or --port.") from error
