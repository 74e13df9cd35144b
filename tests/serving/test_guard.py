"""Who may come in: keys and sizes, at the door of the real HTTP face."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.types import Message, Receive, Scope, Send

from rlhf_ray.errors import ConfigError
from rlhf_ray.roles.scorer import RewardScorer
from rlhf_ray.serving.args import RewardServiceArgs
from rlhf_ray.serving.guard import Guard
from rlhf_ray.serving.http import http_app
from rlhf_ray.serving.keys import is_key, read_keys
from rlhf_ray.serving.reward_service import RewardService

KEY, OTHER = "a-key-of-some-length", "another-key-of-length"
REQUEST = {"prompt": "p", "responses": ["a"]}


@pytest.fixture
async def client(scorer: RewardScorer, tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    (tmp_path / "keys").write_text(f"# ours\n{KEY}\n\n{OTHER}  # theirs\nwith#in-a-long-key\n")
    service = RewardService(RewardServiceArgs(model="given", max_body_mb=0.001, batch_wait_ms=0), scorer)
    app = http_app(service, key_digests=read_keys(tmp_path / "keys"))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://service") as client:
        yield client


@pytest.mark.parametrize("path", ["/v1/score", "/v1/compare", "/get_reward", "/classify", "/rerank", "/nowhere"])
@pytest.mark.parametrize(
    "header",
    [None, "", KEY, f"Basic {KEY}", "Bearer", "Bearer ", f"Bearer {KEY[:-1]}", f"Bearer {KEY}x", "Bearer \xff"],
)
async def test_without_a_key_every_door_is_shut(client: httpx.AsyncClient, path: str, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    reply = await client.post(path, json=REQUEST, headers=headers)  # type: ignore[arg-type]
    assert reply.status_code == 401
    assert reply.headers["WWW-Authenticate"] == "Bearer"
    assert "Authorization: Bearer KEY" in reply.json()["detail"]


async def test_each_key_opens_and_probes_need_none(client: httpx.AsyncClient) -> None:
    for key in (KEY, OTHER):
        for scheme in ("Bearer", "bearer"):
            reply = await client.post("/v1/score", json=REQUEST, headers={"Authorization": f"{scheme} {key}"})
            assert reply.status_code == 200
    assert (await client.get("/v1/models")).status_code == 401
    for path in ("/healthz", "/readyz", "/docs", "/openapi.json"):
        assert (await client.get(path)).status_code == 200


async def test_below_another_route_the_same_doors_are_open_and_shut(scorer: RewardScorer) -> None:
    service = RewardService(RewardServiceArgs(model="given"), scorer)
    app = FastAPI()
    app.mount("/x", http_app(service, key_digests=[hashlib.sha256(KEY.encode()).hexdigest()]))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://service") as client:
        assert (await client.get("/x/healthz")).status_code == 200
        assert (await client.get("/x/v1/models")).status_code == 401
        assert (await client.get("/x/v1/models", headers={"Authorization": f"Bearer {KEY}"})).status_code == 200
        assert (await client.get("/x/healthz/v1/score")).status_code == 401


@pytest.mark.parametrize("route", ["", "/x"])
async def test_the_openapi_page_needs_no_other_host_and_no_key(scorer: RewardScorer, route: str) -> None:
    service = RewardService(RewardServiceArgs(model="given"), scorer)
    app = Starlette()
    app.mount(route, http_app(service, key_digests=[hashlib.sha256(KEY.encode()).hexdigest()]))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://service") as client:
        page = (await client.get(f"{route}/docs")).text
        assert "//" not in re.sub(r"^\s*//.*$", "", page, flags=re.MULTILINE)  # but for comments of its script
        links = re.findall(r"""(?:src|href)="([^"]*)"|url: '([^']*)'""", page)
        replies = [await client.get(src or url) for src, url in links]
        types = {str(reply.url.path).rpartition(".")[2]: reply.headers["content-type"] for reply in replies}
        assert (await client.get(f"{route}/redoc", headers={"Authorization": f"Bearer {KEY}"})).status_code == 404
    assert [reply.status_code for reply in replies] == [200] * 4
    assert {suffix: kind.partition(";")[0] for suffix, kind in types.items()} == {
        "js": "text/javascript",
        "css": "text/css",
        "png": "image/png",
        "json": "application/json",
    }
    script, style = (next(r.text for r in replies if r.url.path.endswith(end)) for end in (".js", ".css"))
    assert "SwaggerUIBundle" in script
    assert not re.search(r"@import|url\((?!['\"]?data:)", style)


async def test_a_body_that_says_it_is_too_large_is_not_read() -> None:
    async def never(scope: Scope, receive: Receive, send: Send) -> None:
        raise AssertionError("the request went through")

    async def unread() -> Message:
        raise AssertionError("the body was read")

    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    refusals: list[int] = []
    guard = Guard(never, key_digests=(), max_body_bytes=1000, on_refusal=refusals.append)
    scope = {"type": "http", "path": "/v1/score", "headers": [(b"content-length", b"1001")]}
    await guard(scope, unread, send)
    assert sent[0]["status"] == 413
    assert refusals == [413]


async def test_a_key_is_written_nowhere(client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    good = await client.post("/v1/score", json={"prompt": ""}, headers={"Authorization": f"Bearer {KEY}"})
    bad = await client.post("/v1/score", json=REQUEST, headers={"Authorization": f"Bearer {KEY}-wrong"})
    assert (good.status_code, bad.status_code) == (422, 401)
    assert KEY not in caplog.text + good.text + bad.text


async def test_a_body_that_is_too_large_is_refused_said_or_not(client: httpx.AsyncClient) -> None:
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    said = await client.post("/v1/score", content=b"x" * 2000, headers=headers)

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(4):
            yield b" " * 500

    unsaid = await client.post("/v1/score", content=pieces(), headers=headers)
    for reply in (said, unsaid):
        assert reply.status_code == 413
        assert "larger than 0.001 MB" in reply.json()["detail"]
        assert "serve.max_body_mb" in reply.json()["detail"]


async def test_a_page_elsewhere_is_not_let_in(client: httpx.AsyncClient) -> None:
    reply = await client.options(
        "/v1/score", headers={"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    )
    assert reply.status_code == 401
    assert not any(name.startswith("access-control") for name in reply.headers)


def test_keys_come_from_the_environment_where_no_file_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_RAY_API_KEYS", f"{KEY}, {OTHER},")
    digests = read_keys(None)
    assert len(digests) == 2
    assert KEY not in str(digests)
    assert is_key(KEY, digests)
    assert is_key(OTHER, digests)
    assert not is_key("", digests)
    monkeypatch.delenv("RLHF_RAY_API_KEYS")
    assert read_keys(None) == frozenset()


def test_keys_that_cannot_protect_are_refused(tmp_path: Path) -> None:
    short, empty = tmp_path / "short", tmp_path / "empty"
    short.write_text("tiny\n")
    empty.write_text("# none yet\n")
    with pytest.raises(ConfigError, match=r"a key in serve.api_keys_file = .* is shorter than 16 characters") as error:
        read_keys(short)
    assert "tiny" not in str(error.value).replace(str(tmp_path), "")
    (tmp_path / "odd").write_text("schlüssel-von-guter-länge\n")
    with pytest.raises(ConfigError, match=r"a letter beyond ASCII"):
        read_keys(tmp_path / "odd")
    (tmp_path / "hash").write_text("abcdefghijklmnop#rest\n")
    assert is_key("abcdefghijklmnop#rest", read_keys(tmp_path / "hash"))
    assert not is_key("abcdefghijklmnop", read_keys(tmp_path / "hash"))
    with pytest.raises(ConfigError, match=r"holds no key"):
        read_keys(empty)
    with pytest.raises(ConfigError, match=r"cannot be read"):
        read_keys(tmp_path / "none")
