"""The client of a reward service elsewhere, against a real HTTP server that can misbehave."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from fastapi import Response
from fastapi.responses import JSONResponse

from rlhf_ray.errors import NoScoreError, ScorerError
from rlhf_ray.interfaces import Scorer
from rlhf_ray.roles.remote_scorer import RemoteScorer, _retry_after
from rlhf_ray.types import Prompt, Rollout, Score

Start = Callable[[], Any]
Make = Callable[..., RemoteScorer]


def rollout(tokens: int = 5) -> Rollout:
    return Rollout(
        prompt=Prompt(prompt_id=7, text="a prompt", token_ids=(1, 2, 3), seed=0),
        response_ids=tuple(range(10, 10 + tokens)),
        rollout_logprobs=(0.0,) * tokens,
        policy_versions=(0,) * tokens,
        finish_reason="stop",
        text="a response",
    )


def problem(status: int, detail: str = "no", **headers: str) -> Response:
    return JSONResponse({"detail": detail}, status, headers={name.replace("_", "-"): v for name, v in headers.items()})


@pytest.fixture
async def make() -> AsyncIterator[Make]:
    """Makes scorers that hurry, and closes them."""
    made: list[RemoteScorer] = []

    def start(*urls: str, **options: Any) -> RemoteScorer:
        made.append(RemoteScorer(urls, **({"first_delay": 0.02, "timeout_seconds": 5.0} | options)))
        return made[-1]

    yield start
    for scorer in made:
        await scorer.close()


async def until(holds: Callable[[], bool], act: Callable[[], Awaitable[Any]]) -> None:
    """``act`` again and again until something holds."""
    async with asyncio.timeout(20):
        while not holds():
            await act()
            await asyncio.sleep(0.01)


async def test_token_ids_go_out_as_they_are_and_one_score_comes_back(score_services: Start, make: Make) -> None:
    service = score_services()
    scorer: Scorer = make(service.url, model="helpful", api_key="s3cret")
    assert await scorer.score(rollout(5)) == Score(value=0.5, raw=5.0, reward_version="length@1")
    item = {"prompt_ids": [1, 2, 3], "response_ids": [10, 11, 12, 13, 14]}
    assert service.asked == [{"items": [item], "model": "helpful", "key": "Bearer s3cret"}]


async def test_without_a_key_or_a_model_none_is_sent(score_services: Start, make: Make) -> None:
    service = score_services()
    await make(service.url).score(rollout())
    assert service.asked[0].keys() == {"items", "key"}
    assert service.asked[0]["key"] is None


@pytest.mark.parametrize("failure", [problem(500), problem(502), problem(503), problem(504), Response(status_code=599)])
async def test_a_server_error_is_tried_again_once_the_service_is_ready(
    score_services: Start, make: Make, failure: Response
) -> None:
    service = score_services()
    service.replies = [failure, failure]
    assert (await make(service.url).score(rollout(3))).raw == 3
    assert len(service.asked) == 3
    assert service.looks == 2


async def test_a_time_out_and_a_refused_connection_lead_to_another_endpoint_at_once(
    score_services: Start, make: Make
) -> None:
    slow, gone, fine = score_services(), score_services(), score_services()
    slow.replies = [30.0]
    gone.stop()
    scorer = make(slow.url, gone.url, fine.url, timeout_seconds=2.0, first_delay=1000.0)
    assert (await scorer.score(rollout(3))).raw == 3
    assert (len(slow.asked), len(gone.asked), len(fine.asked)) == (1, 0, 1)


async def test_an_endpoint_that_failed_gets_no_rollout_until_it_is_ready(
    score_services: Start, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    sick, fine = score_services(), score_services()
    sick.replies, sick.ready = [problem(500, "out of memory")], False
    scorer = make(sick.url, fine.url)
    with caplog.at_level(logging.INFO, logger="rlhf_ray"):
        await until(lambda: sick.looks >= 3, lambda: scorer.score(rollout()))
        assert len(sick.asked) == 1
        sick.ready = True
        await until(lambda: len(sick.asked) >= 2, lambda: scorer.score(rollout()))
    assert f"{sick.url} is left out until it is ready: HTTP 500: out of memory" in caplog.messages
    assert f"{sick.url} is ready again" in caplog.messages


async def test_a_service_that_was_down_is_found_again_by_all_who_wait(score_services: Start, make: Make) -> None:
    service = score_services()
    service.stop()
    scorer = make(service.url, tries=30)
    waiting = [asyncio.create_task(scorer.score(rollout(n))) for n in range(1, 21)]
    await asyncio.sleep(0.1)
    waiting[0].cancel()  # what it waits for, the others wait for too
    service.start()
    scores = await asyncio.gather(*waiting[1:])
    assert [score.raw for score in scores] == list(range(2, 21))


async def test_rollouts_spread_over_the_endpoints(score_services: Start, make: Make) -> None:
    services = [score_services() for _ in range(3)]
    scorer = make(*(service.url for service in services))
    await asyncio.gather(*(scorer.score(rollout()) for _ in range(30)))
    assert [len(service.asked) for service in services] == [10, 10, 10]


@pytest.mark.parametrize("status", [408, 429, 503])
async def test_a_busy_endpoint_is_let_alone_for_as_long_as_it_asks(
    score_services: Start, make: Make, status: int
) -> None:
    service = score_services()
    service.replies = [problem(status, Retry_After="1")]
    assert (await make(service.url).score(rollout(3))).raw == 3
    first, second = service.asked_at
    assert second - first >= 1
    assert service.looks == 0, "busy is not broken"


async def test_another_endpoint_serves_while_one_is_busy(score_services: Start, make: Make) -> None:
    busy, free = score_services(), score_services()
    busy.replies = [problem(429, Retry_After="50")]
    scorer = make(busy.url, free.url, first_delay=1000.0)
    for _ in range(5):
        await scorer.score(rollout())
    assert (len(busy.asked), len(free.asked)) == (1, 5)


async def test_a_busy_answer_without_a_time_is_tried_again(score_services: Start, make: Make) -> None:
    service = score_services()
    service.replies = [problem(429), problem(408)]
    assert (await make(service.url).score(rollout(3))).raw == 3


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("7", 7.0), ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0), ("soon", None), ("-1", None), ("1.5", None), ("", None)],
)
def test_retry_after_is_read_as_a_number_or_a_date(text: str, seconds: float | None) -> None:
    import httpx

    assert _retry_after(httpx.Response(429, headers={"Retry-After": text})) == seconds


@pytest.mark.parametrize(("status", "detail"), [(401, "unknown key"), (404, "no model x"), (413, "big"), (422, "id 9")])
async def test_a_refusal_is_final_and_quotes_the_service(
    score_services: Start, make: Make, status: int, detail: str
) -> None:
    service = score_services()
    service.replies = [problem(status, detail)]
    with pytest.raises(ScorerError, match=f"^{service.url} refused the request: HTTP {status}: {detail}$"):
        await make(service.url).score(rollout())
    assert len(service.asked) == 1


async def test_a_redirect_is_not_followed(score_services: Start, make: Make) -> None:
    service, other = score_services(), score_services()
    service.replies = [Response(status_code=307, headers={"Location": f"{other.url}/v1/score"})]
    with pytest.raises(ScorerError, match="HTTP 307"):
        await make(service.url, api_key="s3cret").score(rollout())
    assert other.asked == [], "nor is the key sent elsewhere"


async def test_a_service_that_keeps_failing_ends_in_an_error_with_every_cause(
    score_services: Start, make: Make
) -> None:
    sick, gone = score_services(), score_services()
    sick.replies = [problem(500, "out of memory")] * 9
    gone.stop()
    with pytest.raises(ScorerError) as caught:
        await make(sick.url, gone.url, tries=4, api_key="s3cret").score(rollout())
    message = str(caught.value)
    assert message.startswith("no score after 4 tries (")
    assert f"{sick.url}: HTTP 500: out of memory" in message
    assert f"{gone.url}: ConnectError" in message
    assert "raise the scorer's tries" in message
    assert caught.value.__cause__ is not None


async def test_an_endpoint_that_never_gets_ready_is_told_as_that(score_services: Start, make: Make) -> None:
    service = score_services()
    service.replies, service.ready = [problem(500)], False
    with pytest.raises(ScorerError, match=r"no score after 3 tries \(.*: not ready, HTTP 503"):
        await make(service.url, tries=3).score(rollout())
    assert len(service.asked) == 1


BAD_REPLIES = {
    "not a number": '{"scores": [NaN], "raw_scores": [1.0], "model": "m"}',
    "infinite": '{"scores": [1.0], "raw_scores": [Infinity], "model": "m"}',
    "null": '{"scores": [null], "raw_scores": [1.0], "model": "m"}',
    "text": '{"scores": ["1.0"], "raw_scores": [1.0], "model": "m"}',
    "true": '{"scores": [true], "raw_scores": [1.0], "model": "m"}',
    "none": '{"scores": [], "raw_scores": [], "model": "m"}',
    "two": '{"scores": [1.0, 2.0], "raw_scores": [1.0, 2.0], "model": "m"}',
    "missing": '{"scores": [1.0], "model": "m"}',
    "huge": f'{{"scores": [1{"0" * 400}], "raw_scores": [1.0], "model": "m"}}',
    "no version": '{"scores": [1.0], "raw_scores": [1.0], "model": null}',
    "a list": "[1.0]",
    "a page": "<html>welcome</html>",
}


@pytest.mark.parametrize("body", BAD_REPLIES.values(), ids=BAD_REPLIES.keys())
async def test_an_answer_without_a_score_is_an_error_and_never_a_number(
    score_services: Start, make: Make, body: str
) -> None:
    service = score_services()
    service.replies = [Response(body)]
    with pytest.raises(ScorerError, match="answered without one finite score: ") as caught:
        await make(service.url).score(rollout())
    of_this_response = body in [BAD_REPLIES[form] for form in ("not a number", "infinite", "null")]
    assert type(caught.value) is (NoScoreError if of_this_response else ScorerError)
    assert len(service.asked) == 1


async def test_the_key_appears_in_no_message(
    score_services: Start, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    service = score_services()
    service.replies = [problem(500), problem(401)]
    scorer = make(service.url, api_key="s3cret")
    with caplog.at_level(logging.DEBUG), pytest.raises(ScorerError) as caught:
        await scorer.score(rollout())
    assert "s3cret" not in caplog.text + str(caught.value) + repr(scorer) + repr(caught.value.__cause__)
    assert len(service.asked) == 2
