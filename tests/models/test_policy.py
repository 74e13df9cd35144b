"""Log-probabilities of responses: what the full logits give, without making them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from rlhf_ray.errors import ModelError
from rlhf_ray.models import policy
from rlhf_ray.models.loading import load_policy_model
from rlhf_ray.models.policy import PolicyModel, PolicyOutput

TEMPERATURE = 0.7
PROMPT_LENS, RESPONSE_LENS = (3, 7, 1), (6, 2, 9)


def gpt2() -> Any:
    sizes = {"vocab_size": 320, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.3))


def qwen2() -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Qwen2Config(
        vocab_size=320, **sizes, num_key_value_heads=1, tie_word_embeddings=False, initializer_range=0.3
    )
    return Qwen2ForCausalLM(config)


@pytest.fixture(params=["llama", "gpt2", "qwen2", "packed llama", "packed gpt2", "packed qwen2"])
def model(request: pytest.FixtureRequest, tiny_model_dir: Path) -> PolicyModel:
    torch.manual_seed(0)
    name = request.param.removeprefix("packed ")
    language_model = load_policy_model(tiny_model_dir) if name == "llama" else globals()[name]()
    return PolicyModel(language_model, packed=name != request.param).eval()


def rows(pad_id: int = 0, extra: int = 0) -> dict[str, Tensor]:
    """Three sequences of differing lengths, padded on the right to the longest and ``extra`` more."""
    generator = torch.Generator().manual_seed(1)
    longest = max(p + r for p, r in zip(PROMPT_LENS, RESPONSE_LENS, strict=True)) + extra
    width = max(RESPONSE_LENS) + extra
    input_ids = torch.full((3, longest), pad_id)
    response_ids, mask = torch.zeros(3, width, dtype=torch.int64), torch.zeros(3, width, dtype=torch.bool)
    for i, (p, r) in enumerate(zip(PROMPT_LENS, RESPONSE_LENS, strict=True)):
        input_ids[i, : p + r] = torch.randint(3, 320, (p + r,), generator=generator)
        response_ids[i, :r] = input_ids[i, p : p + r]
        mask[i, :r] = True
    prompt_len = torch.tensor(PROMPT_LENS)
    return {"input_ids": input_ids, "prompt_len": prompt_len, "response_ids": response_ids, "response_mask": mask}


def evaluate(model: PolicyModel, batch: dict[str, Tensor], **options: Any) -> PolicyOutput:
    output: PolicyOutput = model(**batch, temperature=TEMPERATURE, **options)
    return output


@torch.no_grad()
def test_logprobs_and_entropy_are_those_of_the_full_logits_of_each_row_alone(model: PolicyModel) -> None:
    batch = rows()
    output = evaluate(model, batch, with_entropy=True)
    assert output.entropy is not None
    for i, (p, r) in enumerate(zip(PROMPT_LENS, RESPONSE_LENS, strict=True)):
        ids = batch["input_ids"][i : i + 1, : p + r]
        full = torch.log_softmax(model.language_model(input_ids=ids).logits[0].double() / TEMPERATURE, dim=-1)
        expected = torch.stack([full[p + t - 1, ids[0, p + t]] for t in range(r)])
        assert torch.allclose(output.logprobs[i, :r].double(), expected, atol=1e-5)
        entropy = torch.distributions.Categorical(logits=full[p - 1 : p + r - 1]).entropy()
        assert torch.allclose(output.entropy[i, :r].double(), entropy, atol=1e-5)
        assert not output.logprobs[i, r:].any()
        assert not output.entropy[i, r:].any()


@torch.no_grad()
def test_more_padding_and_other_padding_change_nothing(model: PolicyModel) -> None:
    torch.nn.init.normal_(model.value_head.linear.weight)
    near = evaluate(model, rows(), with_values=True)
    far = evaluate(model, rows(pad_id=5, extra=11), with_values=True)
    assert near.values is not None
    assert far.values is not None
    width = max(RESPONSE_LENS)
    assert near.values.std() > 0.1
    assert torch.allclose(far.logprobs[:, :width], near.logprobs, atol=1e-5)
    assert torch.allclose(far.values[:, :width], near.values, atol=1e-5)


@torch.no_grad()
def test_a_value_is_that_of_the_state_before_its_token(model: PolicyModel) -> None:
    torch.nn.init.normal_(model.value_head.linear.weight)
    batch = rows()
    before = evaluate(model, batch, with_values=True).values
    last = RESPONSE_LENS[2] - 1
    batch["input_ids"][2, PROMPT_LENS[2] + last] = 3  # the row's last token: only a state that read it may change
    after = evaluate(model, batch, with_values=True).values
    assert before is not None
    assert after is not None
    assert torch.equal(before[2], after[2])


def test_values_start_at_zero_and_their_gradient_reaches_head_and_trunk(model: PolicyModel) -> None:
    values = evaluate(model, rows(), with_values=True).values
    assert values is not None
    assert not values.any()
    values.sum().backward()
    assert model.value_head.linear.weight.grad is not None
    assert model.value_head.linear.weight.grad.abs().sum() > 0


def test_only_response_positions_go_through_the_vocabulary(model: PolicyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    head = model.language_model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, result: seen.append(args[0].shape[0]))
    evaluate(model, rows())
    assert seen == [sum(RESPONSE_LENS)]


def test_chunked_logits_give_the_same_numbers_and_gradients(
    model: PolicyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gradient() -> tuple[Tensor, Tensor]:
        model.zero_grad()
        output = evaluate(model, rows())
        output.logprobs.sum().backward()
        return output.logprobs.detach(), model.language_model.get_input_embeddings().weight.grad.clone()

    whole = gradient()
    monkeypatch.setattr(policy, "_LOGITS_PER_CHUNK", 320 * 4)
    chunks: list[int] = []
    head = model.language_model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, result: chunks.append(args[0].shape[0]))
    chunked = gradient()
    assert chunks == [4, 4, 4, 4, 1]
    for a, b in zip(whole, chunked, strict=True):
        assert torch.allclose(a, b, atol=1e-4, rtol=1e-4)


def test_entropy_carries_a_gradient_only_when_asked_to(model: PolicyModel) -> None:
    measured = evaluate(model, rows(), with_entropy=True).entropy
    wanted = evaluate(model, rows(), with_entropy=True, entropy_gradient=True).entropy
    assert measured is not None
    assert wanted is not None
    assert not measured.requires_grad
    assert wanted.requires_grad


def test_a_model_that_caps_its_logits_after_the_head_is_refused() -> None:
    config = Gemma2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=32,
        final_logit_softcapping=0.1,
    )
    with pytest.raises(ModelError, match=r"Gemma2ForCausalLM changes its logits .* model\.path"):
        PolicyModel(Gemma2ForCausalLM(config))
