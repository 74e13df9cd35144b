"""DPO makes the implicit reward prefer the chosen responses, and starts from where it knows nothing."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_ray.config import DPOConfig
from rlhf_ray.data.preferences import TokenPair
from rlhf_ray.errors import NumericalError
from rlhf_ray.models.loading import load_policy_model, load_tokenizer
from rlhf_ray.roles.dpo_trainer import PairLogprobs, fit_dpo, implicit_rewards, pair_logprobs
from rlhf_ray.roles.reference import ReferenceModel
from rlhf_ray.roles.trl_training import Fitted, save_policy

EOS = 0


class Stop(Exception):
    """What ends a training half way."""


def a_section(**dpo: Any) -> DPOConfig:
    return DPOConfig.model_validate({"lr": 2e-3, "batch_size": 4, "beta": 0.1, "precision": "float32"} | dpo)


def pairs_with_a_rule(n: int, *, seed: int = 1) -> list[TokenPair]:
    """Of all lengths; what is preferred has one token where the other has another."""
    rng = random.Random(seed)
    pairs = []
    for _ in range(n):
        prompt = rng.choices(range(40, 300), k=rng.randint(1, 12))
        chosen, rejected = ([*rng.choices(range(40, 300), k=rng.randint(0, 4)), end, EOS] for end in (33, 34))
        pairs.append(TokenPair(chosen_ids=prompt + chosen, rejected_ids=prompt + rejected, prompt_tokens=len(prompt)))
    return pairs


def response_logprob(model: Any, ids: list[int], prompt_tokens: int) -> float:
    """By the plainest forward there is."""
    tokens = torch.tensor([ids])
    with torch.inference_mode():
        logprobs = torch.log_softmax(model.eval()(input_ids=tokens).logits[0], dim=-1)
    return logprobs[:-1].gather(1, tokens[0, 1:, None]).squeeze(1)[prompt_tokens - 1 :].sum().item()


def by_hand(model: Any, pairs: Sequence[TokenPair]) -> list[PairLogprobs]:
    return [
        (
            response_logprob(model, pair.chosen_ids, pair.prompt_tokens),
            response_logprob(model, pair.rejected_ids, pair.prompt_tokens),
        )
        for pair in pairs
    ]


def rewards(model: Any, base: Path, pairs: Sequence[TokenPair], beta: float = 0.1) -> list[tuple[float, float]]:
    return implicit_rewards(by_hand(model, pairs), by_hand(load_policy_model(base), pairs), beta=beta)


def fitted(
    folder: Path,
    base: Path,
    section: DPOConfig,
    pairs: Sequence[TokenPair],
    *,
    reference: Sequence[PairLogprobs] | None = None,
    stop_after: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Any, Fitted, list[Mapping[str, float]]]:
    """(model, what came of it, progress); resumes from what is in ``folder``, and may be stopped there."""
    model, progress = load_policy_model(base), list[Mapping[str, float]]()

    def on_progress(seen: Mapping[str, float]) -> None:
        progress.append(seen)
        if seen["step"] == stop_after:
            raise Stop

    came = fit_dpo(
        model,
        load_tokenizer(base, need_chat_template=False),
        pairs,
        reference or pair_logprobs(ReferenceModel(base, precision="float32", threads=1), pairs),
        section,
        seed=0,
        device=torch.device("cpu"),
        dtype=dtype,
        scratch=folder / f"scratch-{stop_after}",
        checkpoints=folder / "checkpoints",
        identity={"seed": 0},
        on_progress=on_progress,
    )
    return model, came, progress


def test_the_reference_s_log_probabilities_are_sums_over_the_response_and_its_eos(tiny_model_dir: Path) -> None:
    pairs = pairs_with_a_rule(70)
    found = pair_logprobs(ReferenceModel(tiny_model_dir, precision="float32", threads=1), pairs)
    for ours, expected in zip(found, by_hand(load_policy_model(tiny_model_dir), pairs), strict=True):
        assert ours == pytest.approx(expected, abs=1e-3)


def test_the_first_loss_is_log_2(tmp_path: Path, tiny_model_dir: Path) -> None:
    _, came, progress = fitted(tmp_path, tiny_model_dir, a_section(), pairs_with_a_rule(4))
    assert progress[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert came.steps == 1


def test_the_loss_follows_from_the_log_ratios_the_answers_and_their_weights(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    """Against another reference, so that nothing cancels: an uncertain answer, weights, a margin, and smoothing."""
    sure, unsure = pairs_with_a_rule(2)
    pairs = [replace(sure, weight=3.0, margin=0.25), replace(unsure, probability=0.75)]
    policy = by_hand(load_policy_model(tiny_model_dir), pairs)
    reference = [(policy[0][0] - 2.0, policy[0][1] - 5.0), (policy[1][0] + 4.0, policy[1][1] - 1.0)]
    section = a_section(batch_size=2, beta=0.5, label_smoothing=0.1)
    _, _, progress = fitted(tmp_path, tiny_model_dir, section, pairs, reference=reference)
    first, second = 0.5 * (2.0 - 5.0) - 0.25, 0.5 * (-4.0 - 1.0)

    def cost(z: float, p: float) -> float:
        return p * math.log(1 + math.exp(-z)) + (1 - p) * math.log(1 + math.exp(z))

    expected = (1.5 * cost(first, 0.9) + 0.5 * cost(second, 0.75 * 0.9 + 0.25 * 0.1)) / 2
    assert progress[0]["loss"] == pytest.approx(expected, abs=1e-4)
    assert progress[0]["accuracy"] == 0.0, "either log-ratio of the chosen response is the lower one"


def test_the_implicit_reward_comes_to_prefer_the_chosen_responses(tmp_path: Path, tiny_model_dir: Path) -> None:
    model, _, progress = fitted(tmp_path, tiny_model_dir, a_section(epochs=4), pairs_with_a_rule(32))
    assert all(chosen > rejected for chosen, rejected in rewards(model, tiny_model_dir, pairs_with_a_rule(32)))
    unseen = rewards(model, tiny_model_dir, pairs_with_a_rule(20, seed=2))
    assert sum(chosen > rejected for chosen, rejected in unseen) >= 18
    assert progress[-1]["accuracy"] == 1.0
    assert progress[-1]["loss"] < 0.5 * math.log(2)


def test_a_higher_beta_keeps_the_policy_nearer_to_the_reference(tmp_path: Path, tiny_model_dir: Path) -> None:
    pairs = pairs_with_a_rule(16)

    def moved(beta: float) -> float:
        model, _, _ = fitted(tmp_path / str(beta), tiny_model_dir, a_section(epochs=12, beta=beta), pairs)
        return sum(abs(value) for pair in rewards(model, tiny_model_dir, pairs, beta=1.0) for value in pair)

    assert moved(2.0) < 0.8 * moved(0.05)


def test_the_trainer_sees_exactly_the_token_ids_it_is_given(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No second EOS, nothing cut, nothing tokenised again."""
    prompts = ([9], [11] * 300)
    answers = (([EOS], [9, EOS, 10, EOS]), ([12] * 100 + [EOS], [13, EOS]))
    pairs = [
        TokenPair(chosen_ids=prompt + chosen, rejected_ids=prompt + rejected, prompt_tokens=len(prompt))
        for prompt, (chosen, rejected) in zip(prompts, answers, strict=True)
    ]
    reference = by_hand(load_policy_model(tiny_model_dir), pairs)
    seen: list[list[int]] = []
    trunk = type(load_policy_model(tiny_model_dir).base_model)
    forward = trunk.forward

    def spy(self: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, **kwargs: Any) -> Any:
        seen.extend(row[mask.bool()].tolist() for row, mask in zip(input_ids, attention_mask, strict=True))
        return forward(self, input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    monkeypatch.setattr(trunk, "forward", spy)
    fitted(tmp_path, tiny_model_dir, a_section(batch_size=2), pairs, reference=reference)
    assert sorted(seen) == sorted(ids for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids))


def test_autocast_leaves_the_weights_in_float32(tmp_path: Path, tiny_model_dir: Path) -> None:
    model, _, progress = fitted(
        tmp_path, tiny_model_dir, a_section(epochs=8), pairs_with_a_rule(16), dtype=torch.bfloat16
    )
    assert progress[0]["loss"] == pytest.approx(math.log(2), abs=0.05)
    assert progress[-1]["accuracy"] == 1.0
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_a_training_that_was_killed_and_resumed_ends_where_an_undisturbed_one_does(
    tmp_path: Path, tiny_model_dir: Path, lora_rank: int
) -> None:
    section = a_section(epochs=3, save_steps=5, lora_rank=lora_rank)
    pairs = pairs_with_a_rule(24)
    undisturbed, expected, _ = fitted(tmp_path / "a", tiny_model_dir, section, pairs)
    with pytest.raises(Stop):
        fitted(tmp_path / "b", tiny_model_dir, section, pairs, stop_after=12)
    resumed, came, progress = fitted(tmp_path / "b", tiny_model_dir, section, pairs)
    assert progress[0]["step"] == 11
    assert came.steps == expected.steps == 18
    assert came.loss == pytest.approx(expected.loss, abs=1e-6)
    for (name, value), (_, other) in zip(undisturbed.named_parameters(), resumed.named_parameters(), strict=True):
        torch.testing.assert_close(other, value, atol=1e-6, rtol=0, msg=name)


def test_lora_is_merged_and_measured_against_the_base(tmp_path: Path, tiny_model_dir: Path) -> None:
    section = a_section(epochs=8, lr=1e-2, lora_rank=3, lora_alpha=6, save_steps=0)
    before = load_policy_model(tiny_model_dir).state_dict()
    pairs = pairs_with_a_rule(32)
    model, _, progress = fitted(tmp_path, tiny_model_dir, section, pairs)
    assert progress[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert progress[-1]["loss"] < 0.5
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, value in after.items():
        change = value - before[name]
        assert (
            (torch.linalg.matrix_rank(change, atol=1e-4, rtol=0) == 3)
            if name.endswith("proj.weight")
            else (not change.any())
        ), name
    save_policy(model, load_tokenizer(tiny_model_dir, need_chat_template=False), tmp_path / "policy")
    saved = pair_logprobs(ReferenceModel(tmp_path / "policy", precision="float32", threads=1), pairs)
    for ours, expected in zip(saved, by_hand(model, pairs), strict=True):
        assert ours == pytest.approx(expected, abs=1e-3)


def test_a_loss_that_is_no_number_ends_the_training_with_the_knob(tmp_path: Path, tiny_model_dir: Path) -> None:
    pairs = [replace(pair, margin=math.nan) for pair in pairs_with_a_rule(4)]
    with pytest.raises(NumericalError, match=r"the policy's loss became nan at step 1; lower dpo\.lr"):
        fitted(tmp_path, tiny_model_dir, a_section(), pairs)
