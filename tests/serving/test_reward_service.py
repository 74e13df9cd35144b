"""The service as a plain class and its HTTP face, without Ray: right scores, and a sentence for whatever is wrong."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from rlhf_ray.config import RunConfig
from rlhf_ray.errors import ScorerError
from rlhf_ray.roles.scorer import RewardScorer
from rlhf_ray.serving.args import RewardServiceArgs
from rlhf_ray.serving.http import http_app
from rlhf_ray.serving.reward_service import RewardService
from rlhf_ray.types import Prompt, Rollout

TEXTS = [("The train", " was late."), ("The train", " was lovely!"), ("A much longer prompt than that", ""), ("é", "ß")]


@pytest.fixture
def service(scorer: RewardScorer) -> RewardService:
    return RewardService(RewardServiceArgs(model="given", name="mine", max_items=4, batch_wait_ms=1), scorer)


@pytest.fixture
async def client(service: RewardService) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=http_app(service), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
        yield client


async def test_both_forms_of_a_request_give_the_scorers_own_numbers(
    client: httpx.AsyncClient, scorer: RewardScorer
) -> None:
    items = {"items": [{"prompt": p, "response": r} for p, r in TEXTS]}
    reply = (await client.post("/v1/score", json=items)).json()
    expected = scorer.score_texts([p for p, _ in TEXTS], [r for _, r in TEXTS])
    assert reply["raw_scores"] == pytest.approx([score.raw for score in expected], abs=1e-5)
    assert reply["scores"] == pytest.approx([score.value for score in expected], abs=1e-5)
    assert reply["model"] == scorer.version
    short = {"prompt": "The train", "responses": [" was late.", " was lovely!"]}
    assert (await client.post("/v1/score", json=short)).json()["scores"] == pytest.approx(reply["scores"][:2], abs=1e-5)


async def test_a_rollout_scores_as_its_texts_do(service: RewardService, scorer: RewardScorer) -> None:
    tokenizer = scorer.tokenizer
    response_ids = tokenizer(" was late.", add_special_tokens=False)["input_ids"]
    whole = scorer.text_ids("The train", " was late.")
    rollout = Rollout(
        prompt=Prompt(prompt_id=0, text="", token_ids=tuple(whole[: -1 - len(response_ids)]), seed=0),
        response_ids=tuple(response_ids),
        rollout_logprobs=(0.0,) * len(response_ids),
        policy_versions=(0,) * len(response_ids),
        finish_reason="length",
        text="",
    )
    (expected,) = scorer.score_texts(["The train"], [" was late."])
    assert (await service.score_rollout(rollout)).raw == pytest.approx(expected.raw, abs=1e-5)


async def test_requests_under_way_share_forwards(scorer: RewardScorer, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[int] = []
    verdicts = scorer.verdicts
    monkeypatch.setattr(scorer, "verdicts", lambda ids: (batches.append(len(ids)), verdicts(ids))[1])
    service = RewardService(RewardServiceArgs(model="given", batch_wait_ms=60_000, max_batch_size=16), scorer)
    batches.clear()
    request = {"prompt": "p", "responses": ["a"]}
    transport = httpx.ASGITransport(app=http_app(service))
    async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
        replies = await asyncio.gather(*(client.post("/v1/score", json=request) for _ in range(16)))
    assert {reply.status_code for reply in replies} == {200}
    assert batches == [16]


async def test_the_model_is_described(client: httpx.AsyncClient, scorer: RewardScorer) -> None:
    (card,) = (await client.get("/v1/models")).json()["data"]
    assert card == {
        "id": "mine",
        "version": scorer.version,
        "normalisation": {"mean": 0.5, "std": 2.0},
        "labels": ["LABEL_0"],
        "prompt_format": "chat",
        "max_tokens": 512,
        "max_items": 4,
        "update_error": None,
    }
    assert (await client.get("/healthz")).json() == {"status": "ok"}
    assert (await client.get("/readyz")).json() == {"status": "ready"}


async def test_the_openapi_page_describes_requests_replies_and_problems(client: httpx.AsyncClient) -> None:
    assert (await client.get("/docs")).status_code == 200
    description = (await client.get("/openapi.json")).json()
    score = description["paths"]["/v1/score"]["post"]
    assert set(score["responses"]) == {"200", "400", "401", "404", "413", "422", "429", "500", "504"}
    assert score["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("ScoreRequest")


@pytest.mark.parametrize(
    ("body", "status", "sentence"),
    [
        ({"prompt": "p", "responses": []}, 422, "responses: List should have at least 1 item"),
        ({"prompt": "p"}, 422, 'send "prompt" and "responses", or "messages", or "items"'),
        ({"prompt": "p", "responses": ["a"], "items": []}, 422, "items: List should have at least 1 item"),
        (
            {"prompt": "p", "responses": ["a"], "items": [{"prompt": "p", "response": "a"}]},
            422,
            'send "prompt" and "responses", or "messages", or "items"',
        ),
        ({"prompt": "", "responses": ["a"]}, 422, "prompt: String should have at least 1 character"),
        ({"prompt": "p", "responses": ["a", 3]}, 422, "responses.1: Input should be a valid string"),
        ({"prompt": "p", "responses": "abc"}, 422, "responses: Input should be a valid list"),
        ({"prompt": "p", "response": ["a"]}, 422, "response: Extra inputs are not permitted"),
        ({"items": [{"prompt": "p"}]}, 422, 'items.0: send "prompt" and "response", or "messages", or "prompt_ids"'),
        ({"items": [{"prompt": "p", "response": "r", "response_ids": [1]}]}, 422, "items.0: send"),
        (
            {"items": [{"prompt_ids": [1], "response_ids": [10**8]}]},
            422,
            "response 1: token id 100000000 is outside the",
        ),
        ({"messages": [{"role": "user", "content": "p"}] * 2}, 422, "as the last, the assistant's response to score"),
        ({"prompt": "p", "responses": ["a"], "model": "other"}, 404, "no model is named 'other' here; there are: mine"),
        ({"prompt": "p", "responses": ["a", "b" * 600]}, 422, "response 2: prompt and response are 6"),
        ({"prompt": "p", "responses": ["a"] * 5}, 413, "the request has 5 responses and 4 are allowed at once"),
        ([], 422, "Input should be a valid"),
    ],
)
async def test_bad_input_is_refused_in_a_sentence(
    client: httpx.AsyncClient, body: Any, status: int, sentence: str
) -> None:
    reply = await client.post("/v1/score", json=body)
    assert reply.status_code == status
    assert sentence in reply.json()["detail"]


async def test_a_body_that_is_no_json_is_refused_in_a_sentence(client: httpx.AsyncClient) -> None:
    reply = await client.post("/v1/score", content=b"{", headers={"Content-Type": "application/json"})
    assert reply.status_code == 422
    assert "JSON decode error" in reply.json()["detail"]


async def test_half_a_surrogate_pair_is_refused(client: httpx.AsyncClient) -> None:
    body = rb'{"prompt": "p", "responses": ["\ud83d"]}'
    reply = await client.post("/v1/score", content=body, headers={"Content-Type": "application/json"})
    assert reply.status_code == 422
    assert reply.json()["detail"] == "responses.0: half of a surrogate pair, which no tokenizer can read"


async def test_a_model_that_gives_nan_answers_500_with_the_cause_and_its_neighbours_get_their_scores(
    client: httpx.AsyncClient, service: RewardService, scorer: RewardScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = scorer._forward

    def broken(sequences: Any) -> list[list[float]]:
        marker = scorer.tokenizer("Z", add_special_tokens=False)["input_ids"][0]
        return [
            [float("nan")] if marker in ids else raw for ids, raw in zip(sequences, forward(sequences), strict=True)
        ]

    monkeypatch.setattr(scorer, "_forward", broken)
    bad, good = await asyncio.gather(
        client.post("/v1/score", json={"prompt": "p", "responses": ["a", "Z"]}),
        client.post("/v1/score", json={"prompt": "p", "responses": ["a", "b"]}),
    )
    assert bad.status_code == 500
    assert re.search(r"reward@\w+ gave nan for \d+ tokens; its weights may be broken", bad.json()["detail"])
    assert good.status_code == 200
    assert len(good.json()["scores"]) == 2


def test_a_service_whose_first_forward_fails_does_not_come_up(
    scorer: RewardScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scorer, "_forward", lambda sequences: [[float("nan")]] * len(sequences))
    with pytest.raises(ScorerError, match="nan"):
        RewardService(RewardServiceArgs(model="given"), scorer)


def test_arguments_follow_the_runs_configuration(tmp_path: Path) -> None:
    config = RunConfig.model_validate(
        {
            "model": {"path": "m"},
            "prompts": {"path": "p", "eval_path": "e"},
            "serve": {"name": "helpful", "replicas": 3, "num_gpus": 0.5, "max_items": 7, "port": 9, "threads": 2},
            "device": "cpu",
        }
    )
    args = RewardServiceArgs.of_section(config.serve, tmp_path, config.device)
    assert args.model == str(tmp_path)
    assert (args.name, args.replicas, args.num_gpus, args.max_items, args.threads) == ("helpful", 3, 0.5, 7, 2)
    assert args.device == "cpu"


def test_arguments_have_the_defaults_of_the_configuration() -> None:
    config = RunConfig.model_validate({"model": {"path": "m"}, "prompts": {"path": "p", "eval_path": "e"}})
    args = RewardServiceArgs.of_section(config.serve, Path("m"), config.device)
    assert args == RewardServiceArgs(model=str(Path("m").resolve()))


def test_an_unknown_argument_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"replica\n.*Extra inputs are not permitted"):
        RewardServiceArgs.model_validate({"model": "m", "replica": 2})
