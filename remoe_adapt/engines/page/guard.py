"""Who may ask a server of ours: whoever bears its key, or, where there is none, whoever names it as this machine does.

A page of a web site can send requests to this machine's ports, and can be given a name that leads here; without a key
the name in the request is what tells such a page from a program of the user's.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress


def key_digest(key: str | bytes) -> bytes:
    """What is kept of a key: digests have one length, and are compared in one time, whatever the key is."""
    return hashlib.sha256(key.encode() if isinstance(key, str) else key).digest()


def bears(authorization: bytes, digest: bytes) -> bool:
    """Whether the header `Authorization` has the key of this digest as a bearer token."""
    scheme, _, token = authorization.partition(b" ")
    return scheme.lower() == b"bearer" and hmac.compare_digest(key_digest(token.strip()), digest)


def names_this_machine(host: str) -> bool:
    """Whether the header `Host` is an address or this machine's own name, which nobody's DNS could point elsewhere."""
    host = host.lower()
    name = host[1 : host.find("]")] if host.startswith("[") else host.partition(":")[0]
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine can reach what listens there."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
