"""A reward service elsewhere, over HTTP: token ids out, one score back.

    POST URL/v1/score  {"items": [{"prompt_ids": [int], "response_ids": [int]}], "model": NAME if one is asked for}
                    →  {"scores": [float], "raw_scores": [float], "model": "name@hash"}
    GET  URL/readyz →  200 once it scores

An endpoint that fails is left out, and looked at again until it is ready; one that is busy is let alone for the time
that it asks for. There is a next try at once where another endpoint is free, and else after a while that doubles.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from rlhf_ray.errors import NoScoreError, ScorerError
from rlhf_ray.types import Rollout, Score

log = logging.getLogger("rlhf_ray.scorer")

CALLS_PER_ENDPOINT = 64
"""Calls under way at once, times the number of endpoints; further rollouts wait here."""

CONNECT_SECONDS = 5.0
"""Longest time that an endpoint may take to accept a connection, or to say whether it is ready."""

LONGEST_DELAY = 60.0
"""Seconds: neither a doubled delay nor a Retry-After is longer."""

QUOTED = 300
"""Characters of an unexpected reply that a message quotes."""


class _TryAgainError(Exception):
    """A call failed in a way that may pass; the endpoint's ``problem`` says how."""


@dataclass(slots=True, eq=False)
class _Endpoint:
    url: str
    ready: bool = True
    """False while it is left out."""
    busy_until: float = 0.0
    """Loop time until which it wants no calls."""
    calls: int = 0
    """Under way."""
    asked: int = 0
    problem: str = ""
    """Its last one."""
    looks: int = 0
    """Since it was left out."""
    next_look: float = 0.0
    look: asyncio.Task[None] | None = None


class RemoteScorer:
    """Scores rollouts by their own token ids at any of several endpoints, the least loaded first."""

    def __init__(
        self,
        urls: Sequence[str],
        *,
        model: str | None = None,
        api_key: str | None = None,
        timeout_seconds: float = 30.0,
        tries: int = 8,
        first_delay: float = 0.5,
    ) -> None:
        """
        Args:
            urls: base URLs that serve the same model.
            model: name of the model to ask for; None: whichever is the service's default.
            api_key: sent as a bearer token; appears in no message.
            timeout_seconds: without an answer, after which a call has failed.
            tries: calls made for one rollout before giving up.
            first_delay: seconds to wait when no endpoint is free; doubled each further time, with jitter.
        """
        self._model = {"model": model} if model else {}
        self._tries = tries
        self._first_delay = first_delay
        self._endpoints = [_Endpoint(url) for url in urls]
        self._places = asyncio.Semaphore(CALLS_PER_ENDPOINT * len(self._endpoints))
        self._client = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx.Timeout(timeout_seconds, connect=min(timeout_seconds, CONNECT_SECONDS)),
            # Servers close idle connections after some seconds: a shorter life here, or a call would meet a closed one.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=2.0),
        )

    async def score(self, rollout: Rollout) -> Score:
        """
        Raises:
            NoScoreError: the service answered NaN, infinity or null.
            ScorerError: it refused the request, answered in another form, or failed on every try.
        """
        item = {"prompt_ids": list(rollout.prompt.token_ids), "response_ids": list(rollout.response_ids)}
        waits, failure = 0, None
        for attempt in range(1, self._tries + 1):
            async with self._places:
                self._look_where_due()
                if endpoint := self._free():
                    try:
                        return await self._call(endpoint, {"items": [item], **self._model})
                    except _TryAgainError as error:
                        failure = error
            if attempt < self._tries and not self._free():
                waits += 1
                await self._wait(waits)
        problems = "; ".join(f"{endpoint.url}: {endpoint.problem}" for endpoint in self._endpoints if endpoint.problem)
        raise ScorerError(
            f"no score after {self._tries} tries ({problems}); see that the service is up, or raise the scorer's tries "
            "or timeout_s"
        ) from failure

    async def close(self) -> None:
        """Close the connections."""
        for endpoint in self._endpoints:
            if endpoint.look is not None:
                endpoint.look.cancel()
        await self._client.aclose()

    def _free(self) -> _Endpoint | None:
        """The least loaded endpoint that is ready and not busy."""
        free = [endpoint for endpoint in self._endpoints if endpoint.ready and endpoint.busy_until <= _now()]
        return min(free, key=lambda endpoint: (endpoint.calls, endpoint.asked), default=None)

    async def _call(self, endpoint: _Endpoint, body: dict[str, Any]) -> Score:
        endpoint.calls += 1
        endpoint.asked += 1
        try:
            reply = await self._client.post(f"{endpoint.url}/v1/score", json=body)
        except httpx.RequestError as error:
            self._leave_out(endpoint, _described(error))
            raise _TryAgainError from error
        finally:
            endpoint.calls -= 1
        pause = _retry_after(reply)
        if reply.status_code in (408, 429) or (reply.status_code == 503 and pause is not None):
            endpoint.problem = _problem(reply)
            pause = self._first_delay if pause is None else min(pause, LONGEST_DELAY)
            endpoint.busy_until = max(endpoint.busy_until, _now() + pause)
            raise _TryAgainError
        if reply.status_code >= 500:
            self._leave_out(endpoint, _problem(reply))
            raise _TryAgainError
        if reply.status_code != 200:
            raise ScorerError(f"{endpoint.url} refused the request: {_problem(reply)}")
        return _read_score(endpoint.url, reply)

    async def _wait(self, times: int) -> None:
        """Until an endpoint may be free again: what the busy ones asked for, and a delay; then look at the others."""
        busy = [endpoint.busy_until - _now() for endpoint in self._endpoints if endpoint.ready]
        await asyncio.sleep(max(0.0, min(busy, default=0.0)) + self._delay(times))
        if looks := [self._look(endpoint) for endpoint in self._endpoints if not endpoint.ready]:
            await asyncio.wait(looks)  # not gather: who is cancelled here must not cancel what others wait for too

    def _delay(self, times: int) -> float:
        return min(self._first_delay * 2.0 ** min(times - 1, 16), LONGEST_DELAY) * random.uniform(0.5, 1.5)

    def _leave_out(self, endpoint: _Endpoint, problem: str) -> None:
        endpoint.problem = problem
        if endpoint.ready:
            log.warning("%s is left out until it is ready: %s", endpoint.url, problem)
            endpoint.ready, endpoint.looks = False, 0
            endpoint.next_look = _now() + self._delay(1)

    def _look_where_due(self) -> None:
        for endpoint in self._endpoints:
            if not endpoint.ready and endpoint.next_look <= _now():
                self._look(endpoint)

    def _look(self, endpoint: _Endpoint) -> asyncio.Task[None]:
        """Ask an endpoint that was left out whether it is ready; all who want to know share one question."""
        if endpoint.look is None or endpoint.look.done():
            endpoint.look = asyncio.create_task(self._ask_whether_ready(endpoint))
        return endpoint.look

    async def _ask_whether_ready(self, endpoint: _Endpoint) -> None:
        endpoint.looks += 1
        try:
            reply = await self._client.get(f"{endpoint.url}/readyz", timeout=CONNECT_SECONDS)
        except httpx.RequestError as error:
            endpoint.problem = _described(error)
        else:
            endpoint.ready = reply.status_code == 200
            if endpoint.ready:
                log.info("%s is ready again", endpoint.url)
            else:
                endpoint.problem = f"not ready, {_problem(reply)}"
        endpoint.next_look = _now() + self._delay(endpoint.looks)


def _now() -> float:
    return asyncio.get_running_loop().time()


def _read_score(url: str, reply: httpx.Response) -> Score:
    """Raises ``NoScoreError`` for NaN, infinity or null, and ``ScorerError`` for a reply of another form."""
    complaint = f"{url} answered without one finite score: {reply.text[:QUOTED]}"
    try:
        answer = reply.json()
        (value,), (raw,), version = answer["scores"], answer["raw_scores"], answer["model"]
        if isinstance(version, str) and all(type(x) in (int, float) and math.isfinite(x) for x in (value, raw)):
            return Score(value=float(value), raw=float(raw), reward_version=version)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ScorerError(complaint) from error
    formed = isinstance(version, str) and all(x is None or type(x) in (int, float) for x in (value, raw))
    raise (NoScoreError if formed else ScorerError)(complaint)


def _problem(reply: httpx.Response) -> str:
    """The status, and what the server says of it."""
    try:
        detail = reply.json()["detail"]
    except (KeyError, TypeError, ValueError):
        detail = reply.text
    return f"HTTP {reply.status_code}: {str(detail)[:QUOTED]}"


def _described(error: httpx.RequestError) -> str:
    """Some of httpx's errors, time-outs above all, have a name and no words."""
    return f"{type(error).__name__}: {error}".rstrip(": ")


def _retry_after(reply: httpx.Response) -> float | None:
    """Seconds that a Retry-After header asks for, as a number or a date; None without one that can be read."""
    text = reply.headers.get("Retry-After", "")
    if text.isdecimal():
        return float(text)
    try:
        return max(0.0, (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):
        return None
