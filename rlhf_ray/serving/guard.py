"""The door of the service: an ASGI middleware that lets in who has a key and what is not too large."""

from __future__ import annotations

from collections.abc import Callable, Collection

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rlhf_ray.serving.keys import is_key

PAGE_FILES = "/docs/files"
"""Where the scripts and the style of /docs are: they are served from here, so the page needs no other host."""

OPEN_PATHS = frozenset(
    {"/healthz", "/readyz", "/docs", "/openapi.json"}
    | {f"{PAGE_FILES}/{name}" for name in ("swagger-ui-bundle.js", "swagger-ui.css", "favicon.png")}
)
"""Answered without a key: a probe has none, and the documentation holds no secret."""


class Guard:
    """Answers 401 to who has no key and 413 to a body that is too large, before anything reads the request."""

    def __init__(
        self, app: ASGIApp, *, key_digests: Collection[str], max_body_bytes: int, on_refusal: Callable[[int], None]
    ) -> None:
        """
        Args:
            key_digests: of the keys that open the door; with none it stands open.
            on_refusal: hears of each status that is answered here.
        """
        self._app = app
        self._key_digests = key_digests
        self._max_body_bytes = max_body_bytes
        self._on_refusal = on_refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._key_digests and _path(scope) not in OPEN_PATHS and not is_key(_presented(scope), self._key_digests):
            answer = JSONResponse(
                {"detail": "this needs an API key: send the header Authorization: Bearer KEY"},
                401,
                headers={"WWW-Authenticate": "Bearer"},
            )
            self._on_refusal(401)
            await answer(scope, receive, send)
            return
        body = await self._body(scope, receive)
        if body is None:
            self._on_refusal(413)
            limit = f"{self._max_body_bytes / 1e6:g}"
            detail = f"the body is larger than {limit} MB; send several requests, or raise serve.max_body_mb"
            await JSONResponse({"detail": detail}, 413)(scope, receive, send)
            return
        await self._app(scope, _replay(body, receive), send)

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body; None when it is too large, which a header may say before it has come."""
        said = _header(scope, b"content-length")
        if said.isdigit() and int(said) > self._max_body_bytes:
            return None
        body = bytearray()
        while True:
            message = await receive()
            body += message.get("body", b"")
            if len(body) > self._max_body_bytes:
                return None
            if not message.get("more_body", False):
                return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body at once; what comes after it (the caller hangs up) as it comes."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return pending.pop() if pending else await receive()

    return replay


def _path(scope: Scope) -> str:
    """Below the route that the application is mounted at."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def _presented(scope: Scope) -> str:
    scheme, _, key = _header(scope, b"authorization").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def _header(scope: Scope, name: bytes) -> str:
    return next((value.decode("latin-1") for found, value in scope["headers"] if found == name), "")
