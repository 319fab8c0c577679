"""The chat page at `/`: one file, whose own script and style are all that it may run."""

import base64
import hashlib
import re
from importlib import resources

from fastapi import APIRouter, Response


def page_router() -> APIRouter:
    """Serves the page as it is on disk now."""
    content = resources.files("isotherm.server").joinpath("web/index.html").read_bytes()
    headers = {
        "content-security-policy": content_security_policy(content),
        "cross-origin-opener-policy": "same-origin",
        "cross-origin-resource-policy": "same-origin",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
        "cache-control": "no-cache",
    }
    router = APIRouter()

    @router.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def page() -> Response:
        return Response(content, headers=headers, media_type="text/html")

    return router


def content_security_policy(content: bytes) -> str:
    """Lets the inline script and style of `content` run by their hashes, which no text that is put in can match."""
    hashes = {}
    for name in (b"script", b"style"):
        (inline,) = re.findall(rb"<%b>(.*?)</%b>" % (name, name), content, re.DOTALL)
        hashes[name] = base64.b64encode(hashlib.sha256(inline).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{hashes[b'script']}'; style-src 'sha256-{hashes[b'style']}'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
