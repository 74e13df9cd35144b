"""One reward model trained in memory, served over HTTP and asked by the loop: the same ids, the same score."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import ray
import torch
from ray import serve

from rlhf_ray.actors.scorer import ServedScorer
from rlhf_ray.config import RewardConfig, RunConfig
from rlhf_ray.data.preferences import Preference, write_preferences
from rlhf_ray.data.prompts import encode_prompt
from rlhf_ray.models.loading import load_tokenizer
from rlhf_ray.models.reward import ScoreNormalisation
from rlhf_ray.roles.reward_trainer import fit_reward_model, new_reward_model
from rlhf_ray.roles.scorer import RewardScorer, RewardSettings
from rlhf_ray.stages.serve import served_reward
from rlhf_ray.stages.training_data import load_comparisons
from rlhf_ray.types import Prompt, Rollout

pytestmark = [pytest.mark.ray, pytest.mark.serve, pytest.mark.slow]


@pytest.fixture(scope="module")
def cluster(ray_temp_dir: Path) -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=str(ray_temp_dir))
    yield
    serve.shutdown()
    ray.shutdown()


@pytest.mark.parametrize("prompt_format", ["chat", "text"])
def test_training_serving_and_the_loop_read_the_same_ids_and_give_the_same_score(
    cluster: None, tiny_model_dir: Path, tmp_path: Path, prompt_format: str
) -> None:
    preferences = [
        Preference(
            input_text=f"The train number {i}",
            candidate1=" was late" * (1 + i % 3) + ".",
            candidate2=f" was lovely {i}!",
            human_preference=0.0,
        )
        for i in range(12)
    ]
    run = tmp_path / "runs" / "parity"
    config = RunConfig.model_validate(
        {
            "name": "parity",
            "output_dir": str(run.parent),
            "model": {"path": str(tiny_model_dir)},
            "prompts": {"path": "unused", "eval_path": "unused", "format": prompt_format},
            "serve": {"port": 0, "num_cpus": 0.5, "precision": "float32", "threads": 1, "batch_wait_ms": 2},
        }
    )
    tokenizer = load_tokenizer(tiny_model_dir, need_chat_template=False)
    model = new_reward_model(tiny_model_dir, tokenizer)
    write_preferences(run / "preferences.jsonl", preferences)
    write_preferences(run / "preferences.holdout.jsonl", preferences[:1])
    comparisons, _ = load_comparisons(config, config.reward, tokenizer)
    (tmp_path / "scratch").mkdir()
    fit_reward_model(
        model,
        tokenizer,
        [comparison.tokens for comparison in comparisons],
        RewardConfig(epochs=3, lr=1e-3, head_lr=1e-2, batch_size=4),
        seed=0,
        device=torch.device("cpu"),
        dtype=torch.float32,
        scratch=tmp_path / "scratch",
    )
    model.eval()
    trained_on = [comparison.tokens.rejected_ids for comparison in comparisons]
    with torch.no_grad():  # one by one, without padding: the plainest forward there is
        expected = [float(model(torch.tensor([ids])).logits) for ids in trained_on]
    assert max(expected) - min(expected) > 0.01

    folder = run / "reward"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    RewardSettings(prompt_format=prompt_format).save(folder)  # type: ignore[arg-type]
    ScoreNormalisation(mean=0.25, std=2.0).save(folder)
    scorer = RewardScorer(folder, precision="float32")
    rejected = [preference.rejected for preference in preferences]
    assert [scorer.text_ids(p.input_text, text) for p, text in zip(preferences, rejected, strict=True)] == trained_on

    rollouts = [
        Rollout(
            prompt=Prompt(
                prompt_id=i,
                text=preference.input_text,
                token_ids=tuple(encode_prompt(preference.input_text, tokenizer, format=prompt_format)),  # type: ignore[arg-type]
                seed=0,
            ),
            response_ids=tuple(tokenizer(text, add_special_tokens=False)["input_ids"]),
            rollout_logprobs=(),
            policy_versions=(),
            finish_reason="length",
            text=text,
        )
        for i, (preference, text) in enumerate(zip(preferences, rejected, strict=True))
    ]
    assert [scorer.rollout_ids(rollout) for rollout in rollouts] == trained_on
    items = [{"prompt": p.input_text, "response": text} for p, text in zip(preferences, rejected, strict=True)]

    async def by_handle(handle: object) -> list[float]:
        client = ServedScorer(handle)
        return [score.raw for score in await asyncio.gather(*(client.score(ray.put(r)) for r in rollouts))]

    with served_reward(config, folder) as served:
        reply = httpx.post(f"{served.url}/v1/score", json={"items": items}, timeout=60).json()
        of_loop = asyncio.run(by_handle(served.handle))
    assert reply["raw_scores"] == pytest.approx(expected, abs=1e-5)
    assert of_loop == pytest.approx(expected, abs=1e-5)
    assert reply["scores"] == pytest.approx([(raw - 0.25) / 2.0 for raw in expected], abs=1e-5)
