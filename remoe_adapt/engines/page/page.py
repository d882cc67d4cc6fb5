"""The page at `/`: one HTML file of this folder, without a build step and without a request to anybody else."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib import resources

_INLINE = re.compile(rb"<(script|style)>(.*?)</\1>", re.DOTALL)


@cache
def page_html() -> bytes:
    """The page, UTF-8. It asks `remoe/status` of its own server every second, and fills what has a `data-key`."""
    return resources.files("remoe_adapt.engines.page").joinpath("page.html").read_bytes()


def _policy() -> str:
    # By hash, so that no text of a status, as a model's name, can ever run as a script of the page.
    hashes: dict[bytes, list[str]] = {b"script": [], b"style": []}
    for kind, text in _INLINE.findall(page_html()):
        hashes[kind].append(f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'")
    script, style = (" ".join(hashes[kind]) for kind in (b"script", b"style"))
    return (
        f"default-src 'none'; script-src {script}; style-src {style}; img-src data:; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    )


# To be sent with the page: what it may load, and that it is asked for again after an update of the package.
PAGE_HEADERS = {
    "Content-Type": "text/html; charset=utf-8",
    "Content-Security-Policy": _policy(),
    "Cache-Control": "no-cache",
    "X-Content-Type-Options": "nosniff",
}
