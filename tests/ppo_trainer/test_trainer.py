"""A step is the learner's step; it learns; what it says of itself is true; what is no batch is refused unchanged."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import rlhf_ray.config
from rlhf_ray import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, RunConfig
from rlhf_ray.errors import ConfigError, InputError, ModelError, NumericalError, ResourceError
from rlhf_ray.roles.learner import PPOLearner
from rlhf_ray.roles.reference import ReferenceModel
from rlhf_ray.types import Experience, Prompt, Rollout

QUERIES = [torch.tensor(ids) for ids in ([5, 6, 7], [8], [9, 10, 11, 12], [13, 14])]
RESPONSES = [torch.tensor(ids) for ids in ([20, 21], [22, 23, 24, 25, 0], [26], [27, 28, 29])]
SCORES = [0.5, -1.0, 2.0, 0.25]


def weights(trainer: PPOTrainer) -> dict[str, Tensor]:
    """The value head's among them."""
    return {name: tensor.detach().clone() for name, tensor in trainer.model.policy.state_dict().items()}


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a)


# ---- the step


def test_it_learns_what_a_random_policy_does_not_do(make_trainer: Any) -> None:
    """The reward is the number of tokens, of four, out of a tenth of the vocabulary."""
    wanted = torch.arange(40, 72)
    trainer = make_trainer(batch_size=64, mini_batch_size=32, learning_rate=5e-3, init_kl_coef=0.02)
    queries = [torch.tensor([100, 200])] * 64
    options = {"return_prompt": False, "batch_size": 64, "do_sample": True, "top_k": 0, "max_new_tokens": 4}
    means = []
    for _ in range(8):
        responses = trainer.generate(queries, **options)
        scores = [torch.isin(response, wanted).sum() for response in responses]
        means.append(trainer.step(queries, responses, scores)["ppo/mean_scores"])
    assert means[0] < 1
    assert np.mean(means[-2:]) > 3


@pytest.mark.parametrize("mini_batch_size", [1, 2, 4])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_is_the_step_of_the_pipelines_learner(
    make_trainer: Any, tiny_model_dir: Path, tmp_path: Path, mini_batch_size: int, checkpointing: bool
) -> None:
    """Two of them, the same batch and settings: the same weights, value head included, and the same numbers."""
    ppo = {"epochs": 2, "batch_size": 4, "minibatches": 4 // mini_batch_size, "gamma": 0.9, "missing_eos_penalty": 0.0}
    learner = PPOLearner(
        RunConfig.model_validate(
            {
                "output_dir": tmp_path,
                "seed": 5,
                "model": {"path": str(tiny_model_dir)},
                "prompts": {"path": "unused", "eval_path": "unused"},
                "learner": {"lr": 1e-3, "threads": 1, "max_grad_norm": 0.5},
                "ppo": ppo,
            }
        ),
        str(tiny_model_dir),
        "cpu",
        "float32",
    )
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_model_dir)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0)
    trainer = make_trainer(
        {"model": model, "optimizer": optimizer},
        seed=5,
        ppo_epochs=2,
        mini_batch_size=mini_batch_size,
        gamma=0.9,
        max_grad_norm=0.5,
        adap_kl_ctrl=False,
        gradient_checkpointing=checkpointing,
    )
    start = weights(trainer)
    reference = ReferenceModel(tiny_model_dir, precision="float32", threads=1)
    for version in range(2):
        report = learner.train_step(experiences(reference, version), kl_coef=0.2)
        stats = trainer.step(QUERIES, RESPONSES, SCORES)
        assert stats["objective/kl"] == pytest.approx(report.metrics["kl"], abs=1e-4)
        assert stats["ppo/loss/policy"] == pytest.approx(report.metrics["loss_policy"], abs=1e-4)
        assert stats["ppo/loss/value"] == pytest.approx(report.metrics["loss_value"], rel=1e-4)
    assert largest_difference(weights(trainer), start) > 1e-3
    assert largest_difference(weights(trainer), learner._model.state_dict()) < 1e-5


def experiences(reference: ReferenceModel, version: int) -> list[Experience]:
    """The module's batch as the pipeline hands it on."""
    rollouts = [
        Rollout(
            prompt=Prompt(prompt_id=row, text="", token_ids=tuple(query.tolist()), seed=0),
            response_ids=tuple(response.tolist()),
            rollout_logprobs=(-3.0,) * len(response),
            policy_versions=(version,) * len(response),
            finish_reason="length",
            text="",
        )
        for row, (query, response) in enumerate(zip(QUERIES, RESPONSES, strict=True))
    ]
    return [
        Experience(rollout=rollout, score=score, ref_logprobs=logprobs)
        for rollout, score, logprobs in zip(rollouts, SCORES, reference.logprobs(rollouts), strict=True)
    ]


def test_gradient_accumulation_changes_memory_and_nothing_else(make_trainer: Any) -> None:
    whole = make_trainer(mini_batch_size=4)
    pieces = make_trainer(mini_batch_size=1, gradient_accumulation_steps=4)
    for trainer in (whole, pieces):
        trainer.optimizer.param_groups[0]["eps"] = 1e-5
        trainer.step(QUERIES, RESPONSES, SCORES)
    assert largest_difference(weights(whole), weights(pieces)) < 1e-5


def test_no_forward_holds_more_rows_than_a_mini_batch(make_trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(mini_batch_size=2, gradient_accumulation_steps=2)
    seen = []
    for policy in (trainer.model.policy, trainer.ref_model.policy):
        policy.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    trainer.step(QUERIES, RESPONSES, SCORES)
    assert max(seen) == 2


def test_freed_memory_is_given_back_on_request(make_trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given_back = []
    monkeypatch.setattr("rlhf_ray.ppo_trainer.trainer.return_freed_memory", lambda: given_back.append(True))
    for settings in ({}, {"optimize_cuda_cache": True}, {"optimize_device_cache": True}):
        make_trainer(**settings).step(QUERIES, RESPONSES, SCORES)
    assert given_back == [True, True]


def test_scores_may_be_numbers_or_tensors_even_with_a_gradient(make_trainer: Any) -> None:
    plain, tensors = make_trainer(), make_trainer()
    plain.step(QUERIES, RESPONSES, SCORES)
    tensors.step(QUERIES, RESPONSES, [torch.tensor([score], requires_grad=True) for score in SCORES])
    assert largest_difference(weights(plain), weights(tensors)) == 0.0


def test_the_default_optimiser_is_adam(make_trainer: Any) -> None:
    (group,) = make_trainer().optimizer.param_groups
    assert {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")} == {
        "lr": 1e-3,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.0,
    }


def test_the_schedulers_rate_is_used_and_shown(make_trainer: Any, tiny_model_dir: Path) -> None:
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_model_dir)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    halving = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    trainer = make_trainer({"model": model, "optimizer": optimizer, "lr_scheduler": halving})
    rates = [trainer.step(QUERIES, RESPONSES, SCORES)["ppo/learning_rate"] for _ in range(3)]
    assert rates == [1.0, 0.5, 0.25]


def test_the_kl_coefficient_follows_its_target(make_trainer: Any) -> None:
    """Below the target by more than a fifth: less by a fifth of the batch's share in the horizon."""
    trainer = make_trainer(target=1e6, horizon=40)
    coefs = [trainer.step(QUERIES, RESPONSES, SCORES)["objective/kl_coef"] for _ in range(3)]
    assert coefs == pytest.approx([0.2, 0.2 * 0.98, 0.2 * 0.98**2])
    fixed = make_trainer(adap_kl_ctrl=False)
    assert [fixed.step(QUERIES, RESPONSES, SCORES)["objective/kl_coef"] for _ in range(2)] == [0.2, 0.2]


def test_bfloat16_computes_over_float32_weights(make_trainer: Any) -> None:
    from accelerate.state import AcceleratorState

    exact = make_trainer(mini_batch_size=4, ppo_epochs=1).step(QUERIES, RESPONSES, SCORES)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        trainer = make_trainer(mini_batch_size=4, ppo_epochs=1, accelerator_kwargs={"mixed_precision": "bf16"})
        rough = trainer.step(QUERIES, RESPONSES, SCORES)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert rough["objective/entropy"] == pytest.approx(exact["objective/entropy"], rel=0.02)
    assert rough["objective/entropy"] != exact["objective/entropy"]
    assert {tensor.dtype for tensor in weights(trainer).values()} == {torch.float32}


# ---- what it says of itself


def test_the_statistics_are_those_of_the_batch(make_trainer: Any) -> None:
    trainer = make_trainer(mini_batch_size=4, ppo_epochs=1, vf_coef=0.5)
    trainer.step(QUERIES, RESPONSES, SCORES)  # policy and reference differ from here on
    with torch.no_grad():
        gaps, surprise = [], []
        for query, response in zip(QUERIES, RESPONSES, strict=True):
            ids = torch.cat([query, response]).unsqueeze(0)
            ours, theirs = (
                torch.log_softmax(model(input_ids=ids)[0][0, len(query) - 1 : -1], dim=-1)
                .gather(1, response.unsqueeze(1))
                .squeeze(1)
                for model in (trainer.model, trainer.ref_model)
            )
            gaps.append(ours - theirs)
            surprise.append(-ours)
    stats = trainer.step(QUERIES, RESPONSES, SCORES)
    kl = [float(gap.sum()) for gap in gaps]
    assert stats["objective/kl"] == pytest.approx(np.mean(kl), abs=1e-4)
    assert stats["objective/kl_dist"].tolist() == pytest.approx(kl, abs=1e-4)
    assert stats["objective/entropy"] == pytest.approx(np.mean([float(s.sum()) for s in surprise]), rel=1e-4)
    mean_gap = float(torch.cat(gaps).mean())
    assert stats["ppo/mean_non_score_reward"] == pytest.approx(-stats["objective/kl_coef"] * mean_gap, abs=1e-4)
    assert stats["ppo/mean_scores"] == pytest.approx(np.mean(SCORES))
    assert stats["ppo/std_scores"] == pytest.approx(np.std(SCORES, ddof=1))
    assert stats["ppo/loss/total"] == pytest.approx(stats["ppo/loss/policy"] + 0.5 * stats["ppo/loss/value"])
    assert stats["tokens/queries_len_mean"] == 2.5
    assert stats["tokens/responses_len_mean"] == 2.75
    assert stats["tokens/responses_len_std"] == pytest.approx(np.std([2, 5, 1, 3], ddof=1))
    assert stats["tokens/responses_dist"].tolist() == [2, 5, 1, 3]
    assert (stats["ppo/policy/approxkl"], stats["ppo/policy/clipfrac"]) == (0.0, 0.0)  # one pass: nothing has moved
    assert stats["time/ppo/total"] >= stats["time/ppo/optimize_step"] > 0


def test_returns_and_values_are_those_before_the_update(make_trainer: Any) -> None:
    """With lambda 1, gamma 1 and a reference that agrees, every return is the response's score."""
    stats = make_trainer(lam=1.0).step(QUERIES, RESPONSES, SCORES)
    lengths = [len(response) for response in RESPONSES]
    assert stats["ppo/returns/mean"] == pytest.approx(np.average(SCORES, weights=lengths), abs=1e-4)
    assert stats["ppo/val/mean"] == 0.0


def test_the_names_that_old_scripts_read_are_there(make_trainer: Any) -> None:
    stats = make_trainer().step(QUERIES, RESPONSES, SCORES)
    names = """
        objective/kl objective/kl_dist objective/kl_coef objective/entropy ppo/mean_non_score_reward ppo/mean_scores
        ppo/std_scores ppo/loss/policy ppo/loss/value ppo/loss/total ppo/policy/entropy ppo/policy/approxkl
        ppo/policy/clipfrac ppo/returns/mean ppo/val/mean ppo/val/var_explained ppo/learning_rate
        tokens/queries_len_mean tokens/queries_len_std tokens/queries_dist tokens/responses_len_mean
        tokens/responses_len_std tokens/responses_dist time/ppo/forward_pass time/ppo/optimize_step time/ppo/total
    """
    assert set(names.split()) <= set(stats)
    assert all(np.isfinite(value).all() for value in stats.values())


def test_numbers_and_samples_go_to_tensorboard(make_trainer: Any, tmp_path: Path) -> None:
    trainer = make_trainer(log_with="tensorboard", project_kwargs={"logging_dir": tmp_path})
    batch = {"query": ["a", "b", "c", "d"], "response": ["e", "f", "g", "h"]}
    shown = []
    for scores in (SCORES, [score + 1 for score in SCORES]):
        stats = trainer.step(QUERIES, RESPONSES, scores)
        trainer.log_stats(stats, batch, [torch.tensor(score) for score in scores])
        shown.append(stats["objective/kl"])
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.value for event in events.Scalars("objective/kl")] == pytest.approx(shown)
    assert [event.step for event in events.Scalars("ppo/mean_scores")] == [1, 2]
    means = [event.value for event in events.Scalars("env/reward_mean")]
    assert means == pytest.approx([np.mean(SCORES), np.mean(SCORES) + 1])
    (_, text) = events.Tensors("sample/2/text_summary")
    assert b"query: c" in text.tensor_proto.string_val[0]
    assert b"reward: 3.0000" in text.tensor_proto.string_val[0]
    del trainer
    gc.collect()


def test_without_a_tracker_a_step_is_a_line_in_the_log(make_trainer: Any, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make_trainer()
    stats = trainer.step(QUERIES, RESPONSES, SCORES)
    with caplog.at_level("INFO", logger="rlhf_ray.ppo_trainer"):
        trainer.log_stats(stats, {}, SCORES)
    assert "step 1: reward 0.4375" in caplog.text


# ---- data, device, folders


def rows(count: int) -> list[dict[str, Any]]:
    return [{"input_ids": torch.tensor([row, row]), "query": f"prompt {row}"} for row in range(count)]


def test_batches_are_shuffled_whole_and_made_by_the_collator(make_trainer: Any) -> None:
    def collator(batch: list[dict[str, Any]]) -> dict[str, list[Any]]:
        return {name: [row[name] for row in batch] for name in batch[0]}

    batches = list(make_trainer({"dataset": rows(11), "data_collator": collator}).dataloader)
    dealt = [query for batch in batches for query in batch["query"]]
    assert [len(batch["query"]) for batch in batches] == [4, 4]
    assert len(set(dealt)) == 8
    assert dealt != [f"prompt {row}" for row in range(8)]


def test_columns_that_nobody_reads_are_dropped_from_a_data_set(make_trainer: Any) -> None:
    table = datasets.Dataset.from_dict({"input_ids": [[1, 2]] * 4, "query": ["q"] * 4, "review": ["r"] * 4})
    arguments = {"dataset": table, "data_collator": list}
    assert set(next(iter(make_trainer(arguments).dataloader))[0]) == {"input_ids", "query"}
    kept = make_trainer(arguments, remove_unused_columns=False)
    assert set(next(iter(kept.dataloader))[0]) == {"input_ids", "query", "review"}
    with pytest.raises(ConfigError, match=r"columns review, none of which .*remove_unused_columns=False"):
        make_trainer({"dataset": table.select_columns("review")})


def test_the_device_is_told_as_scripts_ask_for_it(make_trainer: Any) -> None:
    trainer = make_trainer()
    assert trainer.accelerator.device == trainer.current_device
    assert trainer.accelerator.num_processes == 1
    assert trainer.accelerator.is_main_process
    assert trainer.model.pretrained_model.device.type == torch.device(trainer.current_device).type


def test_what_is_saved_goes_on_where_it_was(make_trainer: Any, tmp_path: Path) -> None:
    trainer = make_trainer()
    trainer.step(QUERIES, RESPONSES, SCORES)
    trainer.save_pretrained(tmp_path / "policy")
    again = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "policy")
    restored = make_trainer({"model": again, "tokenizer": AutoTokenizer.from_pretrained(tmp_path / "policy")})
    assert largest_difference(weights(restored), weights(trainer)) == 0.0
    assert float(restored.model.v_head.linear.weight.detach().abs().max()) > 0
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "policy").state_dict()
    ours = trainer.model.pretrained_model.state_dict()
    assert all(torch.equal(plain[name], tensor) for name, tensor in ours.items())


def test_importing_the_package_is_quick_and_the_trainer_needs_no_ray() -> None:
    program = (
        "import sys, rlhf_ray; assert not {'torch', 'transformers', 'ray'} & set(sys.modules)\n"
        "from rlhf_ray import PPOConfig, PPOTrainer, AutoModelForCausalLMWithValueHead, create_reference_model\n"
        "from rlhf_ray import LengthSampler\n"
        "assert not {'ray', 'vllm', 'trl'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2], check=True)


# ---- refusals


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"queries": QUERIES[:3]}, r"given 3 queries, and PPOConfig\.batch_size = 4; .*drop_last=True"),
        ({"responses": [*RESPONSES, RESPONSES[0]]}, r"given 5 responses, and PPOConfig\.batch_size = 4"),
        ({"scores": SCORES[:1]}, r"given 1 scores, and PPOConfig\.batch_size = 4"),
        ({"responses": [*RESPONSES[:3], torch.tensor([], dtype=torch.int64)]}, r"response 3 has no token.*min_new_tok"),
        ({"queries": [torch.tensor([], dtype=torch.int64), *QUERIES[1:]]}, r"query 0 has no token"),
        ({"responses": [*RESPONSES[:3], torch.tensor(7)]}, r"response 3 is a tensor of shape \(\).*squeeze\(\)"),
        ({"queries": [QUERIES[0].unsqueeze(0), *QUERIES[1:]]}, r"query 0 is a tensor of shape \(1, 3\).*squeeze\(\)"),
        ({"queries": [[5, 6], *QUERIES[1:]]}, r"query 0 is a builtins.list, and a 1-D tensor"),
        ({"queries": [QUERIES[0].float(), *QUERIES[1:]]}, r"query 0 is a tensor of shape \(3,\), and a 1-D tensor of"),
        ({"queries": [torch.tensor([5, -100]), *QUERIES[1:]]}, r"query 0 has a token id that is not between 0 and 31"),
        ({"queries": [torch.tensor([9999]), *QUERIES[1:]]}, r"use the model's own tokenizer"),
        ({"scores": [*SCORES[:3], float("nan")]}, r"score 3 is nan, which is no number to train on"),
        ({"scores": [torch.tensor(float("inf")), *SCORES[1:]]}, r"score 0 is inf"),
        ({"scores": [torch.tensor([0.1, 0.2]), *SCORES[1:]]}, r"score 0 is a tensor of shape \(2,\).*sum it up"),
        ({"scores": [None, *SCORES[1:]]}, r"score 0 is missing, and a number is needed"),
        ({"response_masks": RESPONSES}, r"response_masks are not supported"),
    ],
)
def test_what_is_no_batch_is_refused_and_nothing_changes(
    make_trainer: Any, change: dict[str, Any], sentence: str
) -> None:
    trainer = make_trainer()
    before = weights(trainer)
    with pytest.raises(InputError, match=sentence):
        trainer.step(**{"queries": QUERIES, "responses": RESPONSES, "scores": SCORES, **change})
    assert largest_difference(weights(trainer), before) == 0.0


def test_a_step_that_is_not_finite_ends_in_a_sentence(make_trainer: Any) -> None:
    trainer = make_trainer()
    with torch.no_grad():
        trainer.model.pretrained_model.model.embed_tokens.weight[26] = float("nan")
    with pytest.raises(
        NumericalError, match=r"logprobs holds NaN or infinity; row \d .*lower learning_rate than 0\.001"
    ):
        trainer.step(QUERIES, RESPONSES, SCORES)
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_memory_that_runs_out_ends_in_a_sentence_for_scripts(make_trainer: Any) -> None:
    def full(module: Any, inputs: Any) -> None:
        raise torch.OutOfMemoryError

    trainer = make_trainer()
    trainer.model.policy.register_forward_pre_hook(full)
    with pytest.raises(ResourceError, match=r"mini_batch_size = 2; lower it and raise gradient_accumulation_steps"):
        trainer.step(QUERIES, RESPONSES, SCORES)


def test_an_argument_that_cannot_be_right_is_refused(make_trainer: Any, tiny_model_dir: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.pad_token = None
    refusals = [
        ({"config": None}, ConfigError, "config is missing; give the PPOConfig"),
        ({"config": rlhf_ray.config.PPOConfig()}, ConfigError, r"config is a rlhf_ray\.config\.PPOConfig; give the"),
        ({"model": None}, ConfigError, "model is missing; give AutoModelForCausalLMWithValueHead"),
        ({"model": plain}, ConfigError, "model is a transformers.*LlamaForCausalLM; give AutoModelForCausalLMWith"),
        ({"ref_model": plain}, ConfigError, "ref_model is a transformers.*LlamaForCausalLM"),
        ({"tokenizer": None}, ConfigError, "tokenizer is missing; give the model's own"),
        ({"tokenizer": tokenizer}, ModelError, r"no padding token; set tokenizer\.pad_token = tokenizer\.eos_token"),
        ({"num_shared_layers": 1}, ConfigError, "num_shared_layers and training_data_collator are not supported"),
        ({"dataset": rows(3)}, ConfigError, r"the dataset holds 3 rows, and PPOConfig\.batch_size = 4 are needed"),
        ({"dataset": iter(rows(9))}, ConfigError, "the dataset holds an unknown number of rows"),
    ]
    for arguments, error, sentence in refusals:
        with pytest.raises(error, match=sentence):
            make_trainer(arguments)
    model = AutoModelForCausalLMWithValueHead(plain)
    with pytest.raises(ConfigError, match="ref_model is model itself, so their KL would stay 0"):
        make_trainer({"model": model, "ref_model": model})


def test_a_setting_that_was_changed_afterwards_is_checked_too(make_trainer: Any) -> None:
    config = PPOConfig(batch_size=4, mini_batch_size=2)
    config.early_stopping = True
    with pytest.raises(ConfigError, match="early_stopping = True is not supported"):
        make_trainer({"config": config})
