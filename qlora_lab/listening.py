"""Sockets that servers of this project listen on."""

import ipaddress
import os
import socket

from qlora_lab.errors import DataError


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Raises:
        DataError: the address cannot be had.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else error  # names that nobody knows have no number
        raise DataError(f"cannot listen on {host}, port {port}: {why}; try another port or host") from error


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
