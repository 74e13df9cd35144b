"""What others' clients send and expect, replayed; our own further forms; a classifier with several labels."""

from __future__ import annotations

import asyncio
import math
import shutil
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from rlhf_ray.config import ServedModelConfig
from rlhf_ray.errors import ModelError, ScorerError
from rlhf_ray.models.reward import ScoreNormalisation
from rlhf_ray.roles.scorer import RewardScorer
from rlhf_ray.serving.args import RewardServiceArgs
from rlhf_ray.serving.http import http_app
from rlhf_ray.serving.reward_service import RewardService

MESSAGES = [
    {"role": "user", "content": "Is the train late?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "By how much?"},
    {"role": "assistant", "content": "An hour."},
]


@pytest.fixture(scope="module")
def classifier_dir(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """Three labels on the tiny model, as somebody else would have trained and saved them."""
    folder = tmp_path_factory.mktemp("models") / "tone"
    model = AutoModelForSequenceClassification.from_pretrained(
        tiny_model_dir, id2label={0: "kind", 1: "neutral", 2: "toxic"}, label2id={"kind": 0, "neutral": 1, "toxic": 2}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(folder)
    for file in tiny_model_dir.glob("*token*"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture
async def service(tiny_reward_dir: Path, classifier_dir: Path) -> RewardService:
    toxicity = ServedModelConfig(folder=str(classifier_dir), label="toxic", prompt_format="response")
    args = RewardServiceArgs(
        model=str(tiny_reward_dir), models={"toxicity": toxicity}, precision="float32", batch_wait_ms=0, threads=1
    )
    return RewardService(args)


@pytest.fixture
async def client(service: RewardService) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=http_app(service), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
        yield client


async def test_texts_messages_and_token_ids_of_one_dialogue_score_alike(
    client: httpx.AsyncClient, scorer: RewardScorer
) -> None:
    template = scorer.tokenizer.apply_chat_template
    prompt_ids = template(MESSAGES[:-1], add_generation_prompt=True, tokenize=True, return_dict=False)
    response_ids = scorer.tokenizer("An hour.", add_special_tokens=False)["input_ids"]
    eos = scorer.tokenizer.eos_token_id
    (expected,) = scorer.score_ids([[*prompt_ids, *response_ids, eos]])
    items = [
        {"messages": MESSAGES},
        {"prompt_ids": prompt_ids, "response_ids": response_ids},
        {"prompt_ids": prompt_ids, "response_ids": [*response_ids, eos]},
    ]
    reply = (await client.post("/v1/score", json={"items": items})).json()
    assert reply["raw_scores"] == pytest.approx([expected.raw] * 3, abs=1e-5)
    alone = (await client.post("/v1/score", json={"messages": MESSAGES})).json()
    assert alone["raw_scores"] == pytest.approx([expected.raw], abs=1e-5)
    assert alone["model"] == scorer.version


async def test_compare_gives_the_probability_of_bradley_and_terry(
    client: httpx.AsyncClient, scorer: RewardScorer
) -> None:
    first, second = scorer.score_texts(["p", "p"], [" good", " bad"])
    reply = (await client.post("/v1/compare", json={"prompt": "p", "first": " good", "second": " bad"})).json()
    assert reply["probability"] == pytest.approx(1 / (1 + math.exp(second.raw - first.raw)), abs=1e-5)
    assert reply["raw_scores"] == pytest.approx([first.raw, second.raw], abs=1e-5)
    other = (await client.post("/v1/compare", json={"prompt": "p", "first": " bad", "second": " good"})).json()
    assert other["probability"] == pytest.approx(1 - reply["probability"], abs=1e-5)


async def test_openrlhf_s_request_is_answered_in_its_form(client: httpx.AsyncClient, scorer: RewardScorer) -> None:
    query = scorer.tokenizer.decode(scorer.text_ids("The train", " was late."))
    (expected,) = scorer.score_texts(["The train"], [" was late."])
    body = {"query": [query], "prompts": ["The train"], "labels": [None]}  # what its remote client posts, one a request
    reply = await client.post("/get_reward", json=body)
    assert reply.status_code == 200
    assert reply.json()["rewards"] == pytest.approx([expected.value], abs=1e-5)
    assert reply.json()["scores"] == reply.json()["rewards"]
    assert reply.json()["extra_logs"] == {}


async def test_vllm_s_classify_is_answered_in_its_form(client: httpx.AsyncClient, scorer: RewardScorer) -> None:
    text = scorer.tokenizer.decode(scorer.text_ids("The train", " was late."))
    (expected,) = scorer.score_texts(["The train"], [" was late."])
    raw = (await client.post("/classify", json={"model": "reward", "input": text, "use_activation": False})).json()
    assert raw["data"] == [
        {"index": 0, "label": "LABEL_0", "probs": [pytest.approx(expected.raw, abs=1e-5)], "num_classes": 1}
    ]
    assert set(raw) == {"id", "object", "created", "model", "data", "usage"}
    assert raw["usage"]["prompt_tokens"] == len(scorer.text_ids("The train", " was late."))
    both = (await client.post("/classify", json={"input": [text, text]})).json()
    assert [row["index"] for row in both["data"]] == [0, 1]
    assert both["data"][0]["probs"] == pytest.approx([1 / (1 + math.exp(-expected.raw))], abs=1e-5)


async def test_rerank_puts_the_best_first(client: httpx.AsyncClient, scorer: RewardScorer) -> None:
    documents = [" was late.", " was lovely!", " came."]
    values = [score.value for score in scorer.score_texts(["The train"] * 3, documents)]
    body = {"model": "reward", "query": "The train", "documents": [*documents[:2], {"text": documents[2]}], "top_n": 2}
    results = (await client.post("/rerank", json=body)).json()["results"]
    best = sorted(range(3), key=lambda i: -values[i])[:2]
    assert [result["index"] for result in results] == best
    assert [result["document"]["text"] for result in results] == [documents[i] for i in best]
    assert [r["relevance_score"] for r in results] == pytest.approx([values[i] for i in best], abs=1e-5)
    everything = (await client.post("/rerank", json=body | {"top_n": None})).json()["results"]
    assert len(everything) == 3


async def test_a_classifier_is_served_by_the_log_odds_of_one_label(
    client: httpx.AsyncClient, classifier_dir: Path, scorer: RewardScorer
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(classifier_dir).eval()
    ids = scorer.tokenizer("You fool.")["input_ids"]
    with torch.no_grad():
        probabilities = model(torch.tensor([ids])).logits[0].softmax(-1)
    body = {"model": "toxicity", "items": [{"prompt": "ignored", "response": "You fool."}]}
    reply = (await client.post("/v1/score", json=body)).json()
    assert reply["raw_scores"] == pytest.approx([float(torch.logit(probabilities[2]))], abs=1e-4)
    assert reply["model"].startswith("tone@")
    classes = (await client.post("/classify", json={"model": "toxicity", "input": "You fool."})).json()["data"][0]
    assert classes["probs"] == pytest.approx(probabilities.tolist(), abs=1e-5)
    assert classes["label"] == ["kind", "neutral", "toxic"][int(probabilities.argmax())]
    refused = await client.post(
        "/v1/score", json={"model": "toxicity", "items": [{"prompt_ids": [1], "response_ids": [2]}]}
    )
    assert refused.status_code == 422
    assert "reads texts by a tokenizer of its own" in refused.json()["detail"]


def test_a_label_must_be_named_and_exist(classifier_dir: Path) -> None:
    with pytest.raises(ModelError, match=r"has 3 labels \(kind, neutral, toxic\) and a reward model has one"):
        RewardScorer(classifier_dir)
    with pytest.raises(ModelError, match=r"no label 'rude'; choose one of: kind, neutral, toxic"):
        RewardScorer(classifier_dir, label="rude")
    assert RewardScorer(classifier_dir, label=2, prompt_format="response").score_texts(["p"], ["r"])


async def test_pickled_weights_need_a_persons_word(classifier_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(classifier_dir, folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="no reward model can be loaded"):
        RewardScorer(folder, label=0, prompt_format="response")
    allowed = RewardScorer(folder, label=0, prompt_format="response", allow_pickle=True)
    original = RewardScorer(classifier_dir, label=0, prompt_format="response")
    assert allowed.score_texts([""], ["r"])[0].raw == pytest.approx(original.score_texts([""], ["r"])[0].raw)


async def test_a_new_version_takes_over_under_load_and_no_reply_mixes_the_two(
    service: RewardService, tiny_reward_dir: Path, tmp_path: Path
) -> None:
    newer = tmp_path / "newer"
    shutil.copytree(tiny_reward_dir, newer)
    weights = load_file(newer / "model.safetensors")
    weights["score.weight"] = -weights["score.weight"]
    save_file(weights, newer / "model.safetensors", metadata={"format": "pt"})
    body = {"prompt": "The train", "responses": [f" was late {i}." for i in range(5)]}
    expected = {}
    for folder in (tiny_reward_dir, newer):
        scorer = RewardScorer(folder, precision="float32")
        scores = scorer.score_texts([body["prompt"]] * 5, body["responses"])  # type: ignore[list-item]
        expected[scorer.version] = [score.raw for score in scores]
    versions: list[str] = []
    done = asyncio.Event()
    transport = httpx.ASGITransport(app=http_app(service))

    async def keep_asking(client: httpx.AsyncClient) -> None:
        while not done.is_set():
            reply = await client.post("/v1/score", json=body)
            assert reply.status_code == 200
            version = reply.json()["model"]
            assert reply.json()["raw_scores"] == pytest.approx(expected[version], abs=1e-5)
            versions.append(version)

    async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
        asking = [asyncio.create_task(keep_asking(client)) for _ in range(8)]
        await asyncio.sleep(0.1)
        await service.reconfigure({"models": {"reward": {"folder": str(newer)}}})
        await client.post("/v1/score", json=body)
        await asyncio.sleep(0.1)
        done.set()
        await asyncio.gather(*asking)
        names = [card["id"] for card in (await client.get("/v1/models")).json()["data"]]
    assert set(versions) == set(expected)
    assert versions[-1].startswith("newer@")
    assert names == ["reward"]


def a_damaged_copy(folder: Path, tmp_path: Path) -> Path:
    """As one that is still being copied."""
    shutil.copytree(folder, tmp_path / "half")
    weights = tmp_path / "half" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    return tmp_path / "half"


@pytest.mark.parametrize(
    ("what", "cause"),
    [
        ("missing", "no reward model can be loaded from"),
        ("damaged", "no reward model can be loaded from"),
        ("misspelt", "user_config must be"),
        ("empty", "user_config must be"),
    ],
)
async def test_a_version_that_cannot_be_loaded_leaves_the_old_one_and_says_so(
    service: RewardService,
    client: httpx.AsyncClient,
    tmp_path: Path,
    scorer: RewardScorer,
    tiny_reward_dir: Path,
    what: str,
    cause: str,
) -> None:
    same = {"models": service._args.model_dump()["models"] | {"reward": {"folder": str(tiny_reward_dir)}}}
    await service.reconfigure(same)  # as Serve does at the start
    wrong: dict[str, object] = {
        "missing": {"models": {"reward": {"folder": str(tmp_path / "none")}}},
        "damaged": {"models": {"reward": {"folder": str(a_damaged_copy(tiny_reward_dir, tmp_path))}}},
        "misspelt": {"models": {"reward": {"folders": str(tiny_reward_dir)}}},
        "empty": {},
    }
    await service.reconfigure(wrong[what])  # type: ignore[arg-type]
    reply = await client.post("/v1/score", json={"prompt": "p", "responses": ["r"]})
    assert reply.status_code == 200
    assert reply.json()["model"] == scorer.version
    card = (await client.get("/v1/models")).json()["data"][0]
    assert cause in card["update_error"]
    await service.reconfigure(same)
    assert (await client.get("/v1/models")).json()["data"][0]["update_error"] is None


async def test_a_new_process_does_not_go_on_with_an_older_model(service: RewardService, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no reward model can be loaded"):
        await service.reconfigure({"models": {"reward": {"folder": str(tmp_path / "none")}}})


async def test_a_model_that_scores_no_more_is_neither_ready_nor_healthy(
    service: RewardService, client: httpx.AsyncClient
) -> None:
    assert (await client.get("/readyz")).status_code == 200
    service._models["toxicity"].batcher.failures = 3
    reply = await client.get("/readyz")
    assert reply.status_code == 500
    assert "model toxicity gave no score in 3 forwards in a row" in reply.json()["detail"]
    with pytest.raises(ScorerError):
        await service.check_health()


async def test_a_model_whose_forward_never_ends_is_not_healthy(service: RewardService) -> None:
    await service.check_health()
    service._models["toxicity"].batcher._running_since = time.monotonic() - 301
    with pytest.raises(ScorerError, match="a forward of model toxicity has been under way for 301 s"):
        await service.check_health()


async def test_a_version_names_whatever_the_scores_follow_from(tiny_reward_dir: Path, tmp_path: Path) -> None:
    refitted = tmp_path / tiny_reward_dir.name
    shutil.copytree(tiny_reward_dir, refitted)
    original = RewardScorer(tiny_reward_dir).version
    assert RewardScorer(refitted).version == original
    assert RewardScorer(refitted, prompt_format="text").version != original
    ScoreNormalisation(mean=0.0, std=1.0).save(refitted)
    assert RewardScorer(refitted).version != original


async def test_messages_that_the_chat_template_refuses_are_told_so(
    client: httpx.AsyncClient, service: RewardService, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    monkeypatch.setattr(service._models["reward"].scorer.tokenizer, "chat_template", template)
    reply = await client.post("/v1/score", json={"messages": [{"role": "system", "content": "s"}, *MESSAGES]})
    assert reply.status_code == 422
    assert "chat template refuses these messages: roles must alternate" in reply.json()["detail"]


def test_a_limit_of_tokens_below_the_models_own_holds(tiny_reward_dir: Path) -> None:
    assert RewardScorer(tiny_reward_dir).max_tokens == 512
    assert RewardScorer(tiny_reward_dir, max_tokens=20).max_tokens == 20
    assert RewardScorer(tiny_reward_dir, max_tokens=20).refusal([5] * 21) is not None


async def test_classify_takes_token_ids_and_refuses_what_would_change_the_number(
    client: httpx.AsyncClient, scorer: RewardScorer
) -> None:
    ids = scorer.text_ids("The train", " was late.")
    (expected,) = scorer.score_ids([ids])
    for given in (ids, [ids]):
        reply = await client.post("/classify", json={"input": given, "use_activation": False})
        assert reply.json()["data"][0]["probs"] == pytest.approx([expected.raw], abs=1e-5)
    reply = await client.post("/classify", json={"input": "a", "truncate_prompt_tokens": 3})
    assert reply.status_code == 422
    assert "truncate_prompt_tokens" in reply.json()["detail"]


async def test_too_much_waiting_is_told_429_with_a_time(
    client: httpx.AsyncClient, service: RewardService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service._models["reward"].batcher, "expected_wait", lambda: 31.2)
    reply = await client.post("/v1/score", json={"prompt": "p", "responses": ["r"]})
    assert reply.status_code == 429
    assert reply.headers["Retry-After"] == "32"
    assert "about 32 s" in reply.json()["detail"]


async def test_a_request_that_takes_too_long_is_told_504(tiny_reward_dir: Path) -> None:
    args = RewardServiceArgs(
        model=str(tiny_reward_dir), precision="float32", batch_wait_ms=60_000, request_timeout_s=0.05
    )
    transport = httpx.ASGITransport(app=http_app(RewardService(args)), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
        reply = await client.post("/v1/score", json={"prompt": "p", "responses": ["r"]})
    assert reply.status_code == 504
    assert "serve.request_timeout_s" in reply.json()["detail"]
