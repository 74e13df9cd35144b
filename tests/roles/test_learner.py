"""The learner's step is PPO's, however the batch is cut; it goes on from what it saved, and skips what is no number."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_ray.config import RunConfig
from rlhf_ray.errors import InputError, NumericalError, ResourceError, StalenessError
from rlhf_ray.models.loading import load_policy_model
from rlhf_ray.roles.learner import PPOLearner
from rlhf_ray.roles.ppo_update import PPOUpdate
from rlhf_ray.roles.reference import ReferenceModel
from rlhf_ray.types import Experience, Prompt, Rollout

TEMPERATURE = 0.8

MakeLearner = Callable[..., PPOLearner]


@pytest.fixture
def make_learner(tiny_model_dir: Path, tmp_path: Path) -> MakeLearner:
    def make(*, ppo: dict[str, Any] | None = None, **learner: Any) -> PPOLearner:
        config = RunConfig.model_validate(
            {
                "output_dir": tmp_path,
                "model": {"path": str(tiny_model_dir)},
                "prompts": {"path": "unused", "eval_path": "unused"},
                "sampling": {"temperature": TEMPERATURE},
                "learner": {"lr": 1e-3, "threads": 1, "precision": "float32", **learner},
                "ppo": ppo or {},
            }
        )
        critic = str(tiny_model_dir) if config.learner.critic == "model" else None
        return PPOLearner(config, str(tiny_model_dir), "cpu", "float32", critic_folder=critic)

    return make


def rollout(prompt_id: int, prompt_ids: Sequence[int], response_ids: Sequence[int], version: int = 0) -> Rollout:
    return Rollout(
        prompt=Prompt(prompt_id=prompt_id, text=f"prompt {prompt_id}", token_ids=tuple(prompt_ids), seed=0),
        response_ids=tuple(response_ids),
        rollout_logprobs=(-3.0,) * len(response_ids),
        policy_versions=(version,) * len(response_ids),
        finish_reason="stop",
        text=f"response {prompt_id}",
    )


def batch(size: int = 8, version: int = 0, ref_logprob: float = -3.0) -> list[Experience]:
    """Prompts and responses of many lengths, scores of both signs."""
    rng = np.random.default_rng(3)
    ids = [[rng.integers(3, 300, rng.integers(*span)).tolist() for span in ((2, 9), (1, 12))] for _ in range(size)]
    rollouts = [rollout(i, prompt_ids, response_ids, version) for i, (prompt_ids, response_ids) in enumerate(ids)]
    return [
        Experience(
            rollout=r, score=float(rng.normal()), ref_logprobs=np.full(len(r.response_ids), ref_logprob, np.float32)
        )
        for r in rollouts
    ]


def with_true_numbers(experiences: Sequence[Experience], folder: Path) -> list[Experience]:
    """As the loop would hand them on: the sampler and the reference agree with the starting policy."""
    reference = ReferenceModel(folder, precision="float32", temperature=TEMPERATURE, threads=1)
    numbers = reference.logprobs([e.rollout for e in experiences])
    return [
        replace(e, ref_logprobs=lps, rollout=replace(e.rollout, rollout_logprobs=tuple(lps.tolist())))
        for e, lps in zip(experiences, numbers, strict=True)
    ]


def parameters(learner: PPOLearner) -> dict[str, Tensor]:
    """All of it, the value head included."""
    return {name: value.detach().clone() for name, value in learner._model.state_dict().items()}


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def plain_step(folder: Path, experiences: Sequence[Experience], learner: PPOLearner, kl_coef: float) -> Any:
    """The model after one on-policy PPO step, row by row from full logits, with the sums written out."""
    ppo, section = learner._config.ppo, learner._config.learner
    model, head = load_policy_model(folder), torch.nn.Linear(64, 1)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    rows = []
    for e in experiences:
        ids = torch.tensor([e.rollout.prompt.token_ids + e.rollout.response_ids])
        first, length = len(e.rollout.prompt.token_ids) - 1, len(e.rollout.response_ids)
        output = model(input_ids=ids, output_hidden_states=True)
        scaled = torch.log_softmax(output.logits[0, first:-1] / TEMPERATURE, dim=-1)
        logprobs = scaled.gather(1, ids[0, first + 1 :, None]).squeeze(1)
        values = head(output.hidden_states[-1][0, first:-1]).squeeze(1)
        rewards = (-kl_coef * (logprobs.detach() - torch.from_numpy(e.ref_logprobs))).tolist()
        rewards[-1] += e.score - (ppo.missing_eos_penalty if e.rollout.finish_reason == "length" else 0.0)
        old, after, advantages = [*values.tolist(), 0.0], 0.0, [0.0] * length
        for t in reversed(range(length)):
            after = rewards[t] + ppo.gamma * old[t + 1] - old[t] + ppo.gamma * ppo.lam * after
            advantages[t] = after
        rows.append((logprobs, values, torch.tensor(advantages), torch.tensor(advantages) + torch.tensor(old[:-1])))
    logprobs, values, advantages, returns = (torch.cat(parts) for parts in zip(*rows, strict=True))
    whitened = (advantages - advantages.mean()) / advantages.std(correction=0)
    # At the proximal policy the clipped surrogate's gradient is that of the plain policy gradient.
    loss = -(whitened * logprobs).mean() + ppo.value_coef * 0.5 * ((values - returns) ** 2).mean()
    loss.backward()
    everything = [*model.parameters(), *head.parameters()]
    torch.nn.utils.clip_grad_norm_(everything, section.max_grad_norm)
    torch.optim.AdamW(everything, lr=section.lr, betas=section.betas, eps=section.eps, weight_decay=0.0).step()
    return model, head


def test_a_step_is_ppo_written_out(make_learner: MakeLearner, tiny_model_dir: Path) -> None:
    learner = make_learner(max_grad_norm=0.5, ppo={"gamma": 0.9, "lam": 0.8, "missing_eos_penalty": 0.7})
    experiences = batch(ref_logprob=-3.5)
    experiences[2] = replace(experiences[2], rollout=replace(experiences[2].rollout, finish_reason="length"))
    model, head = plain_step(tiny_model_dir, experiences, learner, kl_coef=0.3)
    learner.train_step(experiences, kl_coef=0.3)
    ours = learner._model.language_model.state_dict()
    assert max(float((ours[name] - value).abs().max()) for name, value in model.state_dict().items()) < 2e-6
    assert torch.allclose(learner._model.value_head.linear.weight, head.weight, atol=1e-6)
    assert head.weight.abs().max() > 1e-4


def test_the_single_pass_equals_the_two_pass_update(make_learner: MakeLearner, monkeypatch: pytest.MonkeyPatch) -> None:
    single, double = make_learner(), make_learner()
    start = parameters(single)
    report = single.train_step(batch(), kl_coef=0.1)
    monkeypatch.setattr(PPOUpdate, "_single_pass", lambda *args: False)
    other = double.train_step(batch(), kl_coef=0.1)
    assert largest_difference(parameters(single), start) > 1e-4
    assert largest_difference(parameters(single), parameters(double)) < 1e-6
    assert dict(report.metrics) == pytest.approx(dict(other.metrics), abs=1e-5)


@pytest.mark.parametrize("budget", [1, 40, 90])
def test_micro_batches_of_any_size_give_the_whole_batch_step(make_learner: MakeLearner, budget: int) -> None:
    whole, cut = make_learner(), make_learner(micro_batch_tokens=budget)
    for version in range(2):
        expected = whole.train_step(batch(version=version), kl_coef=0.1)
        report = cut.train_step(batch(version=version), kl_coef=0.1)
        assert dict(report.metrics) == pytest.approx(dict(expected.metrics), abs=1e-4, rel=1e-5)
    assert largest_difference(parameters(whole), parameters(cut)) < 1e-6


def test_gradient_checkpointing_gives_the_same_step(make_learner: MakeLearner) -> None:
    plain, checkpointed = make_learner(), make_learner(gradient_checkpointing=True)
    plain.train_step(batch(), kl_coef=0.1)
    checkpointed.train_step(batch(), kl_coef=0.1)
    assert largest_difference(parameters(plain), parameters(checkpointed)) < 1e-6


def test_several_epochs_take_several_optimiser_steps(make_learner: MakeLearner) -> None:
    learner = make_learner(ppo={"epochs": 3, "minibatches": 4, "batch_size": 8})
    report = learner.train_step(batch(), kl_coef=0.1)
    steps = {int(state["step"]) for state in learner._optimizer.state.values()}
    assert steps == {12}
    assert report.version == 1
    assert report.metrics["approx_kl"] > 0


def test_the_reference_is_the_policy_before_the_first_step(make_learner: MakeLearner, tiny_model_dir: Path) -> None:
    experiences = with_true_numbers(batch(), tiny_model_dir)
    metrics = make_learner().train_step(experiences, kl_coef=0.1).metrics
    assert metrics["kl"] == pytest.approx(0.0, abs=1e-4)
    assert metrics["kl_k3"] == pytest.approx(0.0, abs=1e-4)
    assert metrics["sampler_gap"] == pytest.approx(0.0, abs=1e-4)


def test_metrics_say_what_the_batch_was(make_learner: MakeLearner) -> None:
    first, second = rollout(4, [5, 6], [7, 8, 9]), rollout(5, [5], [7])
    second = replace(second, finish_reason="length")
    experiences = [
        Experience(rollout=first, score=1.0, ref_logprobs=np.zeros(3, np.float32)),
        Experience(rollout=second, score=-2.0, ref_logprobs=np.zeros(1, np.float32)),
    ]
    learner = make_learner(ppo={"samples_per_step": 1})
    report = learner.train_step(experiences, kl_coef=0.25)
    metrics = report.metrics
    assert metrics["score_mean"] == pytest.approx(-0.5)
    assert metrics["score_std"] == pytest.approx(1.5)
    assert metrics["response_length"] == 2.0
    assert metrics["truncated_share"] == 0.5
    assert metrics["staleness_mean"] == metrics["staleness_max"] == 0.0
    assert (metrics["importance_mean"], metrics["importance_clipped"]) == (1.0, 0.0)
    assert (metrics["approx_kl"], metrics["clipfrac"]) == (0.0, 0.0)
    assert (metrics["kl_coef"], metrics["lr"], metrics["skipped"]) == (0.25, 1e-3, 0.0)
    (sample,) = report.samples
    assert sample["kl"] < 0  # the reference was said to be certain of every token
    expected = {"prompt_id": 4, "prompt": "prompt 4", "response": "response 4", "score": 1.0, "staleness": 0}
    assert {key: sample[key] for key in expected} == expected


def test_stale_samples_are_weighted_and_fresh_ones_are_not(make_learner: MakeLearner, tiny_model_dir: Path) -> None:
    def second_step(version: int) -> dict[str, float]:
        learner = make_learner(ppo={"max_staleness": 1, "value_coef": 0.0}, max_grad_norm=1e9)
        learner.train_step(batch(), kl_coef=0.1)
        unlikely = [  # the sampler gave each token far less than the policy gives it, so every weight is capped at 2
            replace(e, rollout=replace(e.rollout, rollout_logprobs=tuple(x - 20 for x in e.rollout.rollout_logprobs)))
            for e in with_true_numbers(batch(version=version), tiny_model_dir)
        ]
        return dict(learner.train_step(unlikely, kl_coef=0.1).metrics)

    on_policy, off_policy = second_step(version=1), second_step(version=0)
    shown = ("importance_mean", "importance_clipped", "staleness_max")
    assert [on_policy[name] for name in shown] == [1.0, 0.0, 0.0]
    assert [off_policy[name] for name in shown] == [2.0, 1.0, 1.0]
    assert on_policy["sampler_gap"] == pytest.approx(20, abs=1)
    assert "sampler_gap" not in off_policy
    assert off_policy["grad_norm"] == pytest.approx(2 * on_policy["grad_norm"], rel=1e-4)


def test_a_sample_beyond_the_bound_is_refused(make_learner: MakeLearner) -> None:
    learner = make_learner(ppo={"max_staleness": 0})
    learner.train_step(batch(), kl_coef=0.1)
    with pytest.raises(StalenessError, match=r"lags 1 versions behind version 1, and ppo\.max_staleness = 0"):
        learner.train_step(batch(version=0), kl_coef=0.1)


def test_a_kl_term_in_the_loss_pulls_to_the_reference(make_learner: MakeLearner) -> None:
    """Without any reward the policy moves only by that term, and the k3 estimate of the distance falls."""
    learner = make_learner(ppo={"kl": {"loss": "k2", "loss_coef": 1.0}, "max_staleness": 9})
    still = [replace(e, score=0.0) for e in batch(ref_logprob=-4.0)]
    distances = []
    for _ in range(6):
        distances.append(learner.train_step(still, kl_coef=0.0).metrics["kl_k3"])
    assert distances[-1] < 0.8 * distances[0]


@pytest.mark.parametrize(
    "bound",
    [
        {"clip": 1e-4},
        {"clip_high": 1e-4},
        {"dual_clip": 1.0001},
        {"value_clip": 1e-4},
        {"score_clip": 0.1},
        {"importance_cap": 1.0},
    ],
)
def test_each_bound_of_the_loss_is_the_configurations(
    make_learner: MakeLearner, tiny_model_dir: Path, bound: dict[str, float]
) -> None:
    """A tight bound changes the step; a bound that nothing reaches leaves it as it is without one."""

    def after(**ppo: float) -> dict[str, Tensor]:
        learner = make_learner(ppo={"epochs": 2, "max_staleness": 1, **ppo})
        learner.train_step(batch(), kl_coef=0.1)
        stale = with_true_numbers(batch(version=0), tiny_model_dir)
        likelier = [  # each token was less likely to the sampler: the weights are above 1
            replace(e, rollout=replace(e.rollout, rollout_logprobs=tuple(x - 0.3 for x in e.rollout.rollout_logprobs)))
            for e in stale
        ]
        learner.train_step(likelier, kl_coef=0.1)
        return parameters(learner)

    (name,) = bound
    loose = after(**{name: 1e6})
    assert largest_difference(after(**bound), loose) > 1e-5
    assert largest_difference(after(**{name: 1e5}), loose) == 0.0


def test_an_entropy_bonus_raises_the_entropy(make_learner: MakeLearner) -> None:
    learner = make_learner(ppo={"entropy_coef": 1.0})
    entropies = []
    for version in range(4):
        still = [replace(e, score=0.0) for e in batch(version=version)]
        entropies.append(learner.train_step(still, kl_coef=0.0).metrics["entropy"])
    assert entropies[-1] > entropies[0] + 0.05


def test_without_reward_and_penalties_nothing_moves(make_learner: MakeLearner) -> None:
    learner = make_learner()
    start = parameters(learner)
    learner.train_step([replace(e, score=0.0) for e in batch()], kl_coef=0.0)
    assert largest_difference(parameters(learner), start) == 0.0


def test_the_learning_rate_warms_up_linearly_and_the_value_head_has_its_own(make_learner: MakeLearner) -> None:
    learner = make_learner(warmup_steps=4, value_lr=1e-2)
    rates, value_rates = [], []
    for version in range(5):
        rates.append(learner.train_step(batch(version=version), kl_coef=0.0).metrics["lr"])
        value_rates.append(learner._optimizer.param_groups[-1]["lr"])
    assert rates == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3])
    assert value_rates == pytest.approx([0.25e-2, 0.5e-2, 0.75e-2, 1e-2, 1e-2])


def test_weight_decay_shrinks_matrices_and_leaves_norms(make_learner: MakeLearner) -> None:
    learner = make_learner(weight_decay=0.5)
    start = parameters(learner)
    learner.train_step([replace(e, score=0.0) for e in batch()], kl_coef=0.0)
    end = parameters(learner)
    matrix, norm = "language_model.model.layers.0.mlp.up_proj.weight", "language_model.model.norm.weight"
    assert torch.allclose(end[matrix], start[matrix] * (1 - 1e-3 * 0.5))
    assert torch.equal(end[norm], start[norm])


def broken(field: str, value: float) -> list[Experience]:
    experiences = batch()
    bad = experiences[3]
    if field == "score":
        bad = replace(bad, score=value)
    elif field == "ref_logprobs":
        bad = replace(bad, ref_logprobs=np.append(bad.ref_logprobs[:-1], np.float32(value)))
    else:
        logprobs = (*bad.rollout.rollout_logprobs[:-1], value)
        bad = replace(bad, rollout=replace(bad.rollout, rollout_logprobs=logprobs))
    return [*experiences[:3], bad, *experiences[4:]]


@pytest.mark.parametrize("field", ["score", "ref_logprobs", "rollout_logprobs"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_number_that_is_none_skips_the_step_and_is_written_out(
    make_learner: MakeLearner, tmp_path: Path, field: str, value: float
) -> None:
    learner = make_learner()
    start = parameters(learner)
    report = learner.train_step(broken(field, value), kl_coef=0.1)
    assert report.metrics["skipped"] == 1.0
    assert report.version == learner.version == 1
    assert all(np.isfinite(x) for x in report.metrics.values())
    assert largest_difference(parameters(learner), start) == 0.0
    sample = json.loads((tmp_path / "run" / "bad_sample.json").read_text())
    assert sample["prompt_id"] == 3
    assert field in sample["cause"]
    assert str(value) in json.dumps(sample[field])


@pytest.mark.parametrize("single_pass", [True, False])
@pytest.mark.parametrize("place", ["weights", "gradient"])
def test_a_loss_or_gradient_that_is_none_changes_no_weight(
    make_learner: MakeLearner, monkeypatch: pytest.MonkeyPatch, place: str, single_pass: bool
) -> None:
    learner = make_learner(micro_batch_tokens=4096 if single_pass else 40)
    if place == "weights":
        with torch.no_grad():
            learner._model.language_model.get_output_embeddings().weight[7] = float("inf")
    else:
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: torch.tensor(float("inf")))
    start = parameters(learner)
    assert learner.train_step(batch(), kl_coef=0.1).metrics["skipped"] == 1.0
    assert all(torch.equal(value, start[name]) for name, value in parameters(learner).items())
    assert all(parameter.grad is None for parameter in learner._model.parameters())


def test_too_many_skipped_steps_in_a_row_end_the_run_and_name_the_sample(make_learner: MakeLearner) -> None:
    learner = make_learner(max_skipped_steps=2, ppo={"max_staleness": 9})
    bad = broken("score", float("nan"))
    for experiences in (bad, bad, batch(), bad, bad):  # after the good one the count begins anew
        learner.train_step(experiences, kl_coef=0.1)
    with pytest.raises(NumericalError, match=r"3 steps in a row .*\.max_skipped_steps = 2.*prompt 3.*response 3"):
        learner.train_step(bad, kl_coef=0.1)


def test_after_loading_the_next_step_is_bit_for_bit_what_it_would_have_been(
    make_learner: MakeLearner, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"ppo": {"epochs": 2, "minibatches": 4, "batch_size": 8}, "warmup_steps": 5}
    learner = make_learner(**options)
    learner.train_step(batch(), kl_coef=0.1)
    learner.save(tmp_path / "checkpoint")
    expected = learner.train_step(batch(version=1), kl_coef=0.1)
    resumed = make_learner(**options)
    assert resumed.load(tmp_path / "checkpoint") == 1
    report = resumed.train_step(batch(version=1), kl_coef=0.1)
    assert report.metrics == expected.metrics
    assert all(torch.equal(value, parameters(resumed)[name]) for name, value in parameters(learner).items())
    third = learner.train_step(batch(version=2), kl_coef=0.1)
    assert resumed.train_step(batch(version=2), kl_coef=0.1).metrics == third.metrics


def test_under_lora_the_learner_can_be_its_own_reference(make_learner: MakeLearner, tiny_model_dir: Path) -> None:
    told, alone = make_learner(lora_rank=4), make_learner(lora_rank=4, micro_batch_tokens=24)
    for version in range(3):
        experiences = with_true_numbers(batch(version=version), tiny_model_dir)
        expected = told.train_step(experiences, kl_coef=0.5).metrics
        metrics = alone.train_step([replace(e, ref_logprobs=None) for e in experiences], kl_coef=0.5).metrics
        assert metrics == pytest.approx(expected, rel=2e-3, abs=1e-5)
    assert expected["kl_k3"] > 1e-3, "the policy has left the reference"


def test_a_checkpoint_of_the_start_undoes_later_steps(make_learner: MakeLearner, tmp_path: Path) -> None:
    learner = make_learner()
    learner.save(tmp_path / "checkpoint")
    expected = learner.train_step(batch(), kl_coef=0.1)
    assert learner.load(tmp_path / "checkpoint") == 0
    assert learner.train_step(batch(), kl_coef=0.1).metrics == expected.metrics


def test_a_copy_is_of_its_moment_though_later_steps_are_taken_before_it_is_written(
    make_learner: MakeLearner, tmp_path: Path
) -> None:
    """The second one is made in the memory of the first, which is written."""
    learner, resumed = make_learner(), make_learner()
    places = set()
    for version in (0, 2):
        learner.train_step(batch(version=version), kl_coef=0.1)
        taken = learner.copy()
        places.add(frozenset(tensor.data_ptr() for tensor in taken._tensors.values()))
        then = {name: value.clone() for name, value in parameters(learner).items()}
        learner.train_step(batch(version=version + 1), kl_coef=0.1)
        taken.write(tmp_path / f"step-{version + 1}")
        assert resumed.load(tmp_path / f"step-{version + 1}") == version + 1
        assert all(torch.equal(value, then[name]) for name, value in parameters(resumed).items())
    (held,) = places
    assert held.isdisjoint(tensor.data_ptr() for tensor in learner._lasting().values())


def test_a_checkpoint_of_another_model_is_refused(make_learner: MakeLearner, tmp_path: Path) -> None:
    learner = make_learner()
    learner.save(tmp_path / "checkpoint")
    learner._model.value_head.linear = torch.nn.Linear(32, 1)
    with pytest.raises(InputError, match="of another model"):
        learner.load(tmp_path / "checkpoint")


def test_the_export_is_a_hugging_face_folder_with_the_same_logits(
    make_learner: MakeLearner, tmp_path: Path, tiny_model_dir: Path
) -> None:
    learner = make_learner()
    learner.train_step(batch(), kl_coef=0.1)
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "old").write_text("of an earlier export")
    learner.export(tmp_path / "policy")
    ids = torch.arange(3, 60).unsqueeze(0)
    with torch.inference_mode():
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")(input_ids=ids).logits
        ours = learner._model.language_model(input_ids=ids).logits
        base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)(input_ids=ids).logits
    assert torch.equal(exported, ours)
    assert not torch.allclose(exported, base)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "policy")
    original = AutoTokenizer.from_pretrained(tiny_model_dir)
    assert tokenizer.get_vocab() == original.get_vocab()
    assert tokenizer.chat_template == original.chat_template
    assert (tmp_path / "policy" / "generation_config.json").is_file()
    assert not list(tmp_path.glob("policy?*"))
    assert not (tmp_path / "policy" / "old").exists()


def test_published_weights_are_copies_that_load_into_the_plain_model(
    make_learner: MakeLearner, tiny_model_dir: Path
) -> None:
    learner = make_learner()
    published = learner.weights()
    before = {name: tensor.clone() for name, tensor in published.items()}
    learner.train_step(batch(), kl_coef=0.1)
    assert all(torch.equal(published[name], tensor) for name, tensor in before.items())
    assert torch.equal(published["lm_head.weight"], published["model.embed_tokens.weight"])
    model = load_policy_model(tiny_model_dir)
    model.load_state_dict(learner.weights())
    assert torch.equal(model.lm_head.weight, learner._model.language_model.lm_head.weight)
    halves = learner.weights(torch.bfloat16)
    assert {tensor.dtype for tensor in halves.values()} == {torch.bfloat16}
    assert halves.keys() == published.keys()


def test_the_probe_is_one_sequence_of_ordinary_tokens_and_follows_the_weights(
    make_learner: MakeLearner, tiny_model_dir: Path
) -> None:
    learner = make_learner()
    probe = learner.probe()
    assert len(probe.token_ids) == 160
    assert not set(probe.token_ids) & set(AutoTokenizer.from_pretrained(tiny_model_dir).all_special_ids)
    ids = torch.tensor([probe.token_ids])
    with torch.inference_mode():
        logits = AutoModelForCausalLM.from_pretrained(tiny_model_dir)(input_ids=ids).logits[0] / TEMPERATURE
    expected = torch.log_softmax(logits, dim=-1)[:-1].gather(1, ids[0, 1:, None]).squeeze(1)
    assert probe.logprobs == pytest.approx(expected.tolist(), abs=1e-4)
    learner.train_step(batch(), kl_coef=0.1)
    later = learner.probe()
    assert later.token_ids == probe.token_ids == make_learner().probe().token_ids
    assert max(abs(a - b) for a, b in zip(later.logprobs, probe.logprobs, strict=True)) > 1e-3


@torch.no_grad()
def sample(model: Any, prompts: Tensor, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """[B, length] tokens at ``TEMPERATURE`` and their log-probabilities."""
    ids, logprobs = prompts, []
    for _ in range(length):
        distribution = torch.log_softmax(model(input_ids=ids).logits[:, -1] / TEMPERATURE, dim=-1)
        token = torch.multinomial(distribution.exp(), 1, generator=generator)
        logprobs.append(distribution.gather(1, token))
        ids = torch.cat([ids, token], dim=1)
    return ids[:, prompts.shape[1] :], torch.cat(logprobs, dim=1)


@pytest.mark.parametrize(
    ("lag", "ppo"),
    [
        (0, {}),
        (1, {}),
        (0, {"estimator": "rloo", "completions": 4}),
        (1, {"estimator": "grpo", "completions": 4, "kl": {"loss": "k3", "loss_coef": 0.01}}),
        (0, {"estimator": "dr_grpo", "completions": 4, "clip_high": 0.28}),
        (0, {"estimator": "reinforce_pp", "dual_clip": 3.0}),
        (0, {"estimator": "reinforce_pp_baseline", "completions": 4}),
    ],
)
def test_training_raises_the_reward_that_it_is_given(
    make_learner: MakeLearner, tiny_model_dir: Path, lag: int, ppo: dict[str, Any]
) -> None:
    """Reward: the share of tokens below 160. Samples come from the weights of ``lag`` versions ago."""
    learner = make_learner(lr=3e-2, ppo={"max_staleness": lag, "missing_eos_penalty": 0.0, "batch_size": 32, **ppo})
    group = learner._config.ppo.completions
    reference = ReferenceModel(tiny_model_dir, precision="float32", temperature=TEMPERATURE, threads=1)
    sampler, generator = load_policy_model(tiny_model_dir), torch.Generator().manual_seed(0)
    prompts = torch.randint(3, 300, (32 // group, 4), generator=generator).repeat_interleave(group, dim=0)
    published = [learner.weights()]
    shares = []
    for version in range(20):
        behind = max(version - lag, 0)
        sampler.load_state_dict(published[behind])
        tokens, logprobs = sample(sampler, prompts, 8, generator)
        rollouts = [
            replace(
                rollout(i // group, prompts[i].tolist(), tokens[i].tolist(), version=behind),
                rollout_logprobs=tuple(logprobs[i].tolist()),
                finish_reason="length",
            )
            for i in range(32)
        ]
        low = (tokens < 160).float().mean(dim=1)
        shares.append(float(low.mean()))
        experiences = [
            Experience(rollout=r, score=float(score), ref_logprobs=ref)
            for r, score, ref in zip(rollouts, low, reference.logprobs(rollouts), strict=True)
        ]
        metrics = learner.train_step(experiences, kl_coef=0.01).metrics
        published.append(learner.weights())
        assert metrics["staleness_max"] == min(lag, version)
    assert np.mean(shares[:3]) < 0.6
    assert np.mean(shares[-3:]) > 0.8
    assert metrics["kl"] > 1.0


# Without a critic, and with one of its own


def test_without_a_critic_nothing_is_said_of_one_and_its_head_never_moves(make_learner: MakeLearner) -> None:
    learner = make_learner(ppo={"estimator": "reinforce_pp"})
    report = learner.train_step(batch(), kl_coef=0.1)
    assert not {"loss_value", "explained_variance"} & set(report.metrics)
    assert report.metrics["skipped"] == 0
    assert not learner._model.value_head.linear.weight.any()


def test_a_group_estimator_compares_the_responses_to_one_prompt(make_learner: MakeLearner) -> None:
    """Where all of a group have the same score, none of them teaches anything, whatever others scored."""
    learner = make_learner(ppo={"estimator": "rloo", "completions": 2})
    start = parameters(learner)
    paired = [
        replace(e, score=float(i // 2), rollout=replace(e.rollout, prompt=batch()[i // 2].rollout.prompt))
        for i, e in enumerate(batch())
    ]
    learner.train_step(paired, kl_coef=0.0)
    assert largest_difference(parameters(learner), start) < 1e-7
    uneven = [replace(e, score=float(i)) for i, e in enumerate(paired)]
    learner.train_step(uneven, kl_coef=0.0)
    assert largest_difference(parameters(learner), start) > 1e-4


def test_a_critic_of_its_own_learns_apart_from_the_policy(make_learner: MakeLearner, tmp_path: Path) -> None:
    learner = make_learner(critic="model", value_lr=1e-2, ppo={"max_staleness": 9})
    start = parameters(learner)
    learner.train_step(batch(), kl_coef=0.1)  # the head starts at zero: the trunk behind it learns from the next on
    losses = [learner.train_step(batch(), kl_coef=0.1).metrics["loss_value"] for _ in range(4)]
    moved = {name for name, value in parameters(learner).items() if not torch.equal(value, start[name])}
    assert {"critic.layers.0.mlp.up_proj.weight", "value_head.linear.weight"} <= moved
    assert "language_model.model.layers.0.mlp.up_proj.weight" in moved
    assert losses[-1] < 0.8 * losses[0]
    assert set(learner.weights()) == set(load_policy_model(learner._config.model.path).state_dict())
    learner.save(tmp_path / "checkpoint")
    again = make_learner(critic="model", value_lr=1e-2, ppo={"max_staleness": 9})
    again.load(tmp_path / "checkpoint")
    assert largest_difference(parameters(again), parameters(learner)) == 0.0


@pytest.mark.parametrize("critic", ["head", "model"])
def test_the_critic_warms_up_while_the_policy_stays(make_learner: MakeLearner, critic: str, tmp_path: Path) -> None:
    learner = make_learner(critic=critic, critic_warmup_steps=2, ppo={"max_staleness": 9, "epochs": 2})
    policy = {name: value.clone() for name, value in learner.weights().items()}
    head = learner._model.value_head.linear.weight.detach().clone()
    for _ in range(2):
        learner.train_step(batch(), kl_coef=0.1)
        assert largest_difference(dict(learner.weights()), policy) == 0.0
    assert not torch.equal(learner._model.value_head.linear.weight, head)
    learner.save(tmp_path / "warm")
    make_learner(critic=critic).load(tmp_path / "warm")
    learner.train_step(batch(), kl_coef=0.1)
    assert largest_difference(dict(learner.weights()), policy) > 1e-5


# LoRA


def test_with_lora_the_layers_stay_and_what_goes_out_is_merged(
    make_learner: MakeLearner, tiny_model_dir: Path, tmp_path: Path
) -> None:
    learner = make_learner(lora_rank=4, lr=1e-2, ppo={"max_staleness": 9})
    start = parameters(learner)
    for _ in range(3):
        learner.train_step(batch(), kl_coef=0.1)
    moved = {name for name, value in parameters(learner).items() if not torch.equal(value, start[name])}
    assert any("lora_B" in name for name in moved)
    assert all("lora_" in name or name.startswith("value_head.") for name in moved)

    plain = load_policy_model(tiny_model_dir)
    plain.load_state_dict(learner.weights())
    probe = learner.probe()
    logits = plain(input_ids=torch.tensor([probe.token_ids])).logits[0] / TEMPERATURE
    expected = torch.log_softmax(logits, dim=-1)[:-1].gather(1, torch.tensor(probe.token_ids[1:])[:, None]).squeeze(1)
    assert probe.logprobs == pytest.approx(expected.tolist(), abs=1e-4)

    learner.export(tmp_path / "policy")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "policy").state_dict()
    assert largest_difference(exported, dict(learner.weights())) == 0.0
    learner.save(tmp_path / "checkpoint")
    again = make_learner(lora_rank=4, lr=1e-2)
    again.load(tmp_path / "checkpoint")
    assert largest_difference(parameters(again), parameters(learner)) == 0.0


# Memory


def out_of_memory_above(learner: PPOLearner, tokens: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The model's forward fails as a full GPU does, for batches of more than so many tokens; returns those it saw."""
    seen: list[int] = []
    forward = learner._model.forward

    def limited(input_ids: Tensor, *args: Any, **options: Any) -> Any:
        seen.append(input_ids.numel())
        if input_ids.numel() > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory (fault injection)")
        return forward(input_ids, *args, **options)

    monkeypatch.setattr(learner._model, "forward", limited)
    return seen


@pytest.mark.parametrize("ppo", [{}, {"epochs": 2, "minibatches": 2, "batch_size": 8}])
def test_out_of_memory_halves_the_micro_batches_once_and_repeats_the_step(
    make_learner: MakeLearner, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, ppo: dict[str, Any]
) -> None:
    roomy, tight = make_learner(ppo=ppo), make_learner(micro_batch_tokens=120, ppo=ppo)
    seen = out_of_memory_above(tight, 60, monkeypatch)
    expected = roomy.train_step(batch(), kl_coef=0.1)
    report = tight.train_step(batch(), kl_coef=0.1)
    assert max(seen) > 60
    assert dict(report.metrics) == pytest.approx(dict(expected.metrics), abs=1e-4, rel=1e-5)
    assert largest_difference(parameters(roomy), parameters(tight)) < 1e-6
    assert caplog.text.count("repeats the step with micro-batches of 60 tokens") == 1
    seen.clear()
    tight.train_step(batch(version=1), kl_coef=0.1)
    assert max(seen) <= 60


def test_out_of_memory_that_half_the_micro_batches_do_not_mend_names_the_knobs(
    make_learner: MakeLearner, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = make_learner(micro_batch_tokens=120)
    out_of_memory_above(learner, 8, monkeypatch)
    with pytest.raises(ResourceError, match=r"micro-batches of 60 tokens; set learner\.micro_batch_tokens lower"):
        learner.train_step(batch(), kl_coef=0.1)
