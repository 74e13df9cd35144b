"""The scorer gives each response the number that the model alone would give it, or says why it has none."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_ray.data.prompts import encode_prompt
from rlhf_ray.errors import DataError, ModelError, NoScoreError, ScorerError
from rlhf_ray.models.loading import load_tokenizer
from rlhf_ray.models.reward import ScoreNormalisation, load_reward_model
from rlhf_ray.roles.reward_trainer import new_reward_model
from rlhf_ray.roles.scorer import RewardScorer, RewardSettings
from rlhf_ray.types import Prompt, Rollout


def a_reward_model(folder: Path, base: Path, *, prompt_format: Any = "chat") -> Path:
    """Untrained, with a random head, so that every sequence has a score of its own."""
    tokenizer = load_tokenizer(base, need_chat_template=False)
    model = new_reward_model(base, tokenizer)
    torch.manual_seed(0)
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    RewardSettings(prompt_format=prompt_format).save(folder)
    ScoreNormalisation(mean=0.5, std=2.0).save(folder)
    return folder


@pytest.fixture(scope="module")
def reward_dir(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    return a_reward_model(tmp_path_factory.mktemp("models") / "reward", tiny_model_dir)


@pytest.fixture(scope="module")
def scorer(reward_dir: Path) -> RewardScorer:
    return RewardScorer(reward_dir, precision="float32", max_batch_size=4)


def alone(folder: Path, ids: Sequence[int]) -> float:
    """The raw score of one sequence by itself, without padding, from the model's own forward."""
    model, _, _ = load_reward_model(folder)
    with torch.inference_mode():
        raw: float = model(input_ids=torch.tensor([list(ids)])).logits.item()
    return raw


def a_rollout(prompt_ids: Sequence[int], response_ids: Sequence[int]) -> Rollout:
    return Rollout(
        prompt=Prompt(prompt_id=0, text="never looked at", token_ids=tuple(prompt_ids), seed=0),
        response_ids=tuple(response_ids),
        rollout_logprobs=(0.0,) * len(response_ids),
        policy_versions=(0,) * len(response_ids),
        finish_reason="length",
        text="never looked at",
    )


def test_batching_padding_and_order_leave_each_score_as_it_is_alone(scorer: RewardScorer, reward_dir: Path) -> None:
    eos = scorer.tokenizer.eos_token_id
    sequences = [[*range(5, 5 + length), eos] for length in (60, 1, 17, 3, 120, 2, 33, 8, 9)]
    scores = scorer.score_ids(sequences)
    expected = [alone(reward_dir, ids) for ids in sequences]
    assert max(expected) - min(expected) > 0.1
    assert [score.raw for score in scores] == pytest.approx(expected, abs=1e-5)


def test_the_value_is_normalised_and_the_version_named(scorer: RewardScorer) -> None:
    (score,) = scorer.score_ids([[7, 8, 2]])
    assert score.value == pytest.approx((score.raw - 0.5) / 2.0)
    assert score.reward_version == scorer.version
    assert score.reward_version.startswith("reward@")


def test_a_text_is_put_to_the_model_as_in_training_prompt_and_response_encoded_apart(
    scorer: RewardScorer, reward_dir: Path
) -> None:
    tokenizer = scorer.tokenizer
    prompt_ids = encode_prompt("The train", tokenizer, format="chat")
    response_ids = tokenizer(" was late.", add_special_tokens=False)["input_ids"]
    (score,) = scorer.score_texts(["The train"], [" was late."])
    assert score.raw == pytest.approx(alone(reward_dir, [*prompt_ids, *response_ids, tokenizer.eos_token_id]), abs=1e-5)


def test_the_stored_prompt_format_decides_how_a_prompt_is_encoded(tmp_path: Path, tiny_model_dir: Path) -> None:
    text = RewardScorer(a_reward_model(tmp_path / "text", tiny_model_dir, prompt_format="text"))
    chat = RewardScorer(a_reward_model(tmp_path / "chat", tiny_model_dir, prompt_format="chat"))
    assert len(chat.text_ids("hello", "")) > len(text.text_ids("hello", ""))
    assert text.text_ids("hello", "!") == [*text.tokenizer.encode("hello!"), text.tokenizer.eos_token_id]


def test_a_rollout_is_scored_by_its_own_token_ids_with_one_eos(scorer: RewardScorer, reward_dir: Path) -> None:
    eos = scorer.tokenizer.eos_token_id
    expected = alone(reward_dir, [5, 6, 7, 8, eos])
    cut, ended = scorer.score_rollouts([a_rollout([5, 6], [7, 8]), a_rollout([5, 6], [7, 8, eos])])
    assert cut.raw == pytest.approx(expected, abs=1e-5)
    assert ended.raw == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("ids", "complaint"),
    [
        ([], "an empty sequence has no score"),
        ([3, 10**6], "token id 1000000 is outside the .* tokens.*shares the policy's tokenizer"),
        ([-1], "outside the"),
        ([5] * 4096, "4096 tokens and the reward model reward@.* reads 512"),
    ],
)
def test_a_sequence_that_cannot_be_scored_says_why_and_leaves_the_others_theirs(
    scorer: RewardScorer, reward_dir: Path, ids: list[int], complaint: str
) -> None:
    with pytest.raises(ScorerError, match=complaint):
        scorer.score_ids([[5, 2], ids])
    good, bad, also_good = scorer.verdicts([[5, 2], ids, [6, 2]])
    assert isinstance(bad, ScorerError)
    assert not isinstance(good, ScorerError)
    assert not isinstance(also_good, ScorerError)
    assert [good.score.raw, also_good.score.raw] == pytest.approx(
        [alone(reward_dir, i) for i in ([5, 2], [6, 2])], abs=1e-5
    )


def test_nan_is_an_error_and_never_a_score(tmp_path: Path, tiny_model_dir: Path) -> None:
    folder = a_reward_model(tmp_path / "broken", tiny_model_dir)
    scorer = RewardScorer(folder, precision="float32")
    with torch.no_grad():
        scorer._model.model.embed_tokens.weight[9] = float("nan")
    with pytest.raises(NoScoreError, match=r"broken@\w+ gave nan for 3 tokens; its weights may be broken"):
        scorer.score_ids([[5, 9, 2]])
    good, bad = scorer.verdicts([[5, 2], [5, 9, 2]])
    assert isinstance(bad, ScorerError)
    assert not isinstance(good, ScorerError)


def test_a_text_longer_than_the_model_reads_is_refused(scorer: RewardScorer) -> None:
    with pytest.raises(DataError, match="tokens with EOS and the reward model reads at most 512"):
        scorer.score_texts(["a"], ["b" * 600])


def test_a_folder_that_does_not_say_its_prompt_format_scores_ids_and_refuses_texts(
    tmp_path: Path, reward_dir: Path
) -> None:
    folder = tmp_path / "foreign"
    shutil.copytree(reward_dir, folder)
    (folder / "rlhf_ray.json").unlink()
    scorer = RewardScorer(folder)
    assert len(scorer.score_ids([[5, 2]])) == 1
    with pytest.raises(ModelError, match=r'foreign has no rlhf_ray.json.*write \{"prompt_format": "chat"\}'):
        scorer.score_texts(["a"], ["b"])


@pytest.mark.parametrize("content", ["{", "[]", '{"prompt_format": "poem"}'])
def test_settings_that_make_no_sense_are_refused(tmp_path: Path, reward_dir: Path, content: str) -> None:
    folder = tmp_path / "reward"
    shutil.copytree(reward_dir, folder)
    (folder / "rlhf_ray.json").write_text(content)
    with pytest.raises(ModelError, match=r'rlhf_ray.json .*write \{"prompt_format": "chat"\}'):
        RewardScorer(folder)
