"""SFT teaches the responses it is given, and nothing of their prompts."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf_ray.config import SFTConfig
from rlhf_ray.data.demonstrations import TokenDemonstration
from rlhf_ray.errors import NumericalError
from rlhf_ray.models.loading import load_policy_model, load_tokenizer
from rlhf_ray.roles.reference import ReferenceModel
from rlhf_ray.roles.sft_trainer import fit_sft, response_loss
from rlhf_ray.roles.trl_training import Fitted, save_policy

EOS = 0


class Stop(Exception):
    """What ends a training half way."""


def a_section(**sft: Any) -> SFTConfig:
    return SFTConfig.model_validate({"lr": 2e-3, "batch_size": 4, "precision": "float32"} | sft)


def demonstrations(n: int, *, seed: int = 1) -> list[TokenDemonstration]:
    """Of all lengths; every response is a run of the same few tokens."""
    rng = random.Random(seed)
    made = []
    for _ in range(n):
        prompt = rng.choices(range(40, 300), k=rng.randint(1, 12))
        response = [*rng.choices((33, 34, 35), k=rng.randint(1, 6)), EOS]
        made.append(TokenDemonstration(token_ids=prompt + response, prompt_tokens=len(prompt)))
    return made


def nll(model: Any, demonstration: TokenDemonstration) -> list[float]:
    """Of each response token, by the plainest forward there is."""
    ids, begin = torch.tensor([demonstration.token_ids]), demonstration.prompt_tokens
    with torch.inference_mode():
        logprobs = torch.log_softmax(model.eval()(input_ids=ids).logits[0], dim=-1)
    return (-logprobs[:-1].gather(1, ids[0, 1:, None]).squeeze(1)[begin - 1 :]).tolist()


def fitted(
    folder: Path,
    base: Path,
    section: SFTConfig,
    rows: Sequence[TokenDemonstration],
    *,
    stop_after: int | None = None,
) -> tuple[Any, Fitted, list[Mapping[str, float]]]:
    """(model, what came of it, progress); resumes from what is in ``folder``, and may be stopped there."""
    model, progress = load_policy_model(base), list[Mapping[str, float]]()

    def on_progress(seen: Mapping[str, float]) -> None:
        progress.append(seen)
        if seen["step"] == stop_after:
            raise Stop

    came = fit_sft(
        model,
        load_tokenizer(base, need_chat_template=False),
        rows,
        section,
        seed=0,
        device=torch.device("cpu"),
        dtype=torch.float32,
        scratch=folder / f"scratch-{stop_after}",
        checkpoints=folder / "checkpoints",
        identity={"seed": 0},
        on_progress=on_progress,
    )
    return model, came, progress


def test_the_first_loss_is_the_mean_over_all_response_tokens_of_the_batch(tmp_path: Path, tiny_model_dir: Path) -> None:
    rows = demonstrations(4)
    _, came, progress = fitted(tmp_path, tiny_model_dir, a_section(), rows)
    start = load_policy_model(tiny_model_dir)
    tokens = [loss for row in rows for loss in nll(start, row)]
    assert progress[0]["loss"] == pytest.approx(sum(tokens) / len(tokens), abs=1e-4)
    assert (came.steps, came.loss) == (1, progress[0]["loss"])


def test_the_responses_become_likelier_and_so_do_those_of_prompts_it_never_saw(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    rows, others = demonstrations(32), demonstrations(8, seed=2)
    model, _, progress = fitted(tmp_path, tiny_model_dir, a_section(epochs=8), rows)
    start = load_policy_model(tiny_model_dir)
    for row in rows:
        assert sum(nll(model, row)) < sum(nll(start, row))
    save_policy(model, load_tokenizer(tiny_model_dir, need_chat_template=False), tmp_path / "policy")
    before, after = (
        response_loss(ReferenceModel(folder, precision="float32", threads=1), others)
        for folder in (tiny_model_dir, tmp_path / "policy")
    )
    tokens = [loss for row in others for loss in nll(start, row)]
    assert before == pytest.approx(sum(tokens) / len(tokens), abs=1e-4)
    assert after < 0.7 * before
    assert progress[-1]["accuracy"] > progress[0]["accuracy"]


def test_a_prompt_s_tokens_carry_no_loss(tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits that predict them get no gradient; those that predict the response and EOS do."""
    rows = [TokenDemonstration(token_ids=[50, 51, 52, 33, 34, EOS], prompt_tokens=3)] * 2
    hidden: list[torch.Tensor] = []
    forward = type(load_policy_model(tiny_model_dir).base_model).forward

    def spy(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        output.last_hidden_state.retain_grad()
        hidden.append(output.last_hidden_state)
        return output

    monkeypatch.setattr(type(load_policy_model(tiny_model_dir).base_model), "forward", spy)
    fitted(tmp_path, tiny_model_dir, a_section(batch_size=2), rows)
    assert hidden[-1].grad is not None
    reached = hidden[-1].grad.abs().sum(dim=-1)[0] > 0
    assert reached.tolist() == [False, False, True, True, True, False]


def test_the_trainer_sees_exactly_the_token_ids_it_is_given(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No second EOS, nothing cut, nothing tokenised again."""
    rows = [
        TokenDemonstration(token_ids=ids, prompt_tokens=1)
        for ids in ([9, EOS], [9, 9, EOS, 10, EOS], [11] * 400 + [EOS], [12, 13, EOS])
    ]
    seen: list[list[int]] = []
    trunk = type(load_policy_model(tiny_model_dir).base_model)
    forward = trunk.forward

    def spy(self: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, **kwargs: Any) -> Any:
        seen.extend(row[mask.bool()].tolist() for row, mask in zip(input_ids, attention_mask, strict=True))
        return forward(self, input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    monkeypatch.setattr(trunk, "forward", spy)
    fitted(tmp_path, tiny_model_dir, a_section(batch_size=2), rows)
    assert sorted(seen) == sorted(row.token_ids for row in rows)


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_a_training_that_was_killed_and_resumed_ends_where_an_undisturbed_one_does(
    tmp_path: Path, tiny_model_dir: Path, lora_rank: int
) -> None:
    section = a_section(epochs=3, save_steps=5, lora_rank=lora_rank)
    rows = demonstrations(24)
    undisturbed, expected, _ = fitted(tmp_path / "a", tiny_model_dir, section, rows)
    with pytest.raises(Stop):
        fitted(tmp_path / "b", tiny_model_dir, section, rows, stop_after=12)
    assert [folder.name for folder in (tmp_path / "b" / "checkpoints").iterdir()] == ["step-000010"]
    resumed, came, progress = fitted(tmp_path / "b", tiny_model_dir, section, rows)
    assert progress[0]["step"] == 11
    assert came.steps == expected.steps == 18
    assert came.loss == pytest.approx(expected.loss, abs=1e-6)
    for (name, value), (_, other) in zip(undisturbed.named_parameters(), resumed.named_parameters(), strict=True):
        torch.testing.assert_close(other, value, atol=1e-6, rtol=0, msg=name)


def test_lora_changes_each_linear_layer_by_a_matrix_of_its_rank_and_what_is_saved_is_a_plain_model(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    section = a_section(epochs=4, lr=1e-2, lora_rank=3, lora_alpha=6, save_steps=0)
    before = load_policy_model(tiny_model_dir).state_dict()
    model, _, progress = fitted(tmp_path, tiny_model_dir, section, demonstrations(32))
    after = model.state_dict()
    assert progress[-1]["loss"] < 0.7 * progress[0]["loss"]
    assert after.keys() == before.keys()
    for name, value in after.items():
        change = value - before[name]
        if name.endswith("proj.weight"):
            assert torch.linalg.matrix_rank(change, atol=1e-4, rtol=0) == 3, name
        else:
            assert not change.any(), name
    save_policy(model, load_tokenizer(tiny_model_dir, need_chat_template=False), tmp_path / "policy")
    loaded, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "policy", output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    row = demonstrations(1, seed=5)[0]
    assert nll(loaded, row) == pytest.approx(nll(model, row), abs=1e-5)


def test_a_loss_that_is_no_number_ends_the_training_with_the_knob(tmp_path: Path, tiny_model_dir: Path) -> None:
    section = a_section(lr=1e30, epochs=10, warmup_ratio=0)
    with pytest.raises(NumericalError, match=r"the policy's loss became \S+ at step \d+; lower sft\.lr"):
        fitted(tmp_path, tiny_model_dir, section, demonstrations(8))
