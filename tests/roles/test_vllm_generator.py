"""The sampler agrees with transformers, before, between and after changes of its weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.types import Prompt, Rollout

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

MAX_NEW_TOKENS = 24
MAX_NUM_SEQS = 4
SHORT = (40, 41, 42, 43, 44)
LONG = tuple(10 + i % 300 for i in range(150))  # longer than a KV block (128 tokens on a CPU)
PARITY = 5e-5  # nats, float32 on both sides
FAR = 0.05  # nats; two policies that a parity check must tell apart


@pytest.fixture(scope="module", params=[1.0, 0.7], ids=lambda temperature: f"T={temperature}")
def temperature(request: pytest.FixtureRequest) -> float:
    return request.param


@pytest.fixture(scope="module")
def generator(tiny_model_dir: Path, temperature: float) -> Iterator[Any]:
    """One engine for all tests of a temperature: each start takes seconds."""
    from rlhf_ray.roles.vllm_generator import VLLMGenerator

    engine = VLLMGenerator(
        model=str(tiny_model_dir),
        max_model_len=256,
        max_num_seqs=MAX_NUM_SEQS,
        max_new_tokens=MAX_NEW_TOKENS,
        kv_cache_memory_bytes=32 << 20,
        temperature=temperature,
    )
    yield engine
    engine.shutdown()


class Policy:
    """transformers' view of the same model: the truth that the engine is held against."""

    def __init__(self, folder: Path, temperature: float) -> None:
        from transformers import LlamaForCausalLM

        self.model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.temperature = temperature

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: value.detach().clone() for name, value in self.model.state_dict().items()}

    @torch.no_grad()
    def perturb(self, seed: int) -> Policy:
        noise = torch.Generator().manual_seed(seed)
        for parameter in self.model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=noise) * parameter.abs().mean())
        return self

    @torch.no_grad()
    def logprobs(self, token_ids: Sequence[int], cache: Any = None) -> list[float]:
        """Of every token but the first; with a cache, of the tokens that follow those in it."""
        logits = self.model(torch.tensor([token_ids]), past_key_values=cache).logits[0, :-1] / self.temperature
        return logits.log_softmax(-1).gather(1, torch.tensor(token_ids[1:])[:, None])[:, 0].tolist()

    @torch.no_grad()
    def cache(self, token_ids: Sequence[int]) -> Any:
        return self.model(torch.tensor([token_ids]), use_cache=True).past_key_values

    def response_logprobs(self, rollout: Rollout) -> list[float]:
        every = self.logprobs(rollout.prompt.token_ids + rollout.response_ids)
        return every[len(rollout.prompt.token_ids) - 1 :]


@pytest.fixture
def policy(generator: Any, tiny_model_dir: Path, temperature: float) -> Policy:
    """The unchanged model, loaded into the engine as version 0."""
    original = Policy(tiny_model_dir, temperature)
    generator.load_weights(original.weights(), 0)
    return original


def prompt(prompt_id: int, token_ids: tuple[int, ...] = SHORT, seed: int | None = None) -> Prompt:
    return Prompt(prompt_id=prompt_id, text="", token_ids=token_ids, seed=prompt_id if seed is None else seed)


def sample(generator: Any, *prompts: Prompt) -> dict[int, Rollout]:
    for each in prompts:
        generator.submit(each)
    return drain(generator)


def drain(generator: Any) -> dict[int, Rollout]:
    rollouts: list[Rollout] = []
    while generator.has_work:
        rollouts += generator.step()
    return {rollout.prompt.prompt_id: rollout for rollout in rollouts}


def gap(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Largest difference, nats."""
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True))


def test_sampled_tokens_have_the_log_probabilities_that_transformers_gives_them(generator: Any, policy: Policy) -> None:
    rollouts = sample(generator, *(prompt(i) for i in range(3 * MAX_NUM_SEQS)))
    assert sorted(rollouts) == list(range(3 * MAX_NUM_SEQS))
    for rollout in rollouts.values():
        assert gap(rollout.rollout_logprobs, policy.response_logprobs(rollout)) < PARITY


def test_a_given_sequence_is_scored_at_the_sampling_temperature(generator: Any, policy: Policy) -> None:
    assert gap(generator.logprobs(LONG), policy.logprobs(LONG)) < PARITY


def test_nothing_of_the_old_policy_is_left_after_an_update(generator: Any, policy: Policy) -> None:
    before = sample(generator, prompt(1, LONG))[1]
    old = policy.response_logprobs(before)
    assert gap(before.rollout_logprobs, old) < PARITY

    weights = policy.perturb(seed=1).weights()
    generator.load_weights(weights, 1)
    for tensor in weights.values():
        tensor.zero_()  # the engine must have its own copy
    after = sample(generator, prompt(2, LONG))[2]

    assert gap(old, policy.response_logprobs(before)) > FAR  # otherwise the next line could not fail
    assert gap(after.rollout_logprobs, policy.response_logprobs(after)) < PARITY
    assert gap(generator.logprobs(LONG), policy.logprobs(LONG)) < PARITY
    assert set(before.policy_versions) == {0}
    assert set(after.policy_versions) == {1}


def test_weights_may_travel_in_bfloat16(generator: Any, policy: Policy) -> None:
    rounded = {name: value.bfloat16() for name, value in policy.perturb(seed=2).weights().items()}
    policy.model.load_state_dict(rounded)
    generator.load_weights(rounded, 1)
    assert gap(generator.logprobs(SHORT), policy.logprobs(SHORT)) < PARITY


def test_a_rollout_under_way_goes_on_under_the_new_weights(
    generator: Any, policy: Policy, tiny_model_dir: Path, temperature: float
) -> None:
    generator.submit(prompt(1))
    for _ in range(5):
        assert generator.step() == []
    new = Policy(tiny_model_dir, temperature).perturb(seed=3)
    generator.load_weights(new.weights(), 7)
    rollout = drain(generator)[1]

    rest = len(rollout.response_ids) - 5
    assert rest > 0
    assert rollout.policy_versions == (0,) * 5 + (7,) * rest
    # Five steps leave the old policy's keys for the prompt and four tokens; the fifth is the new policy's first input.
    seen = rollout.prompt.token_ids + rollout.response_ids[:4]
    new_logprobs = new.logprobs(rollout.response_ids[4:], cache=policy.cache(seen))
    assert gap(rollout.rollout_logprobs[:5], policy.response_logprobs(rollout)[:5]) < PARITY
    assert gap(rollout.rollout_logprobs[5:], new_logprobs) < PARITY
    assert gap(new_logprobs, policy.response_logprobs(rollout)[5:]) > FAR


def test_a_response_ends_with_the_stop_token_or_at_its_longest(generator: Any, policy: Policy) -> None:
    from transformers import AutoTokenizer

    eos = policy.model.config.eos_token_id
    first = sample(generator, *(prompt(i) for i in range(8))).values()
    tokens = [token for rollout in first for token in rollout.response_ids]
    often = max(set(tokens), key=tokens.count)
    with torch.no_grad():
        embeddings = policy.model.model.embed_tokens.weight
        embeddings[eos] = embeddings[often]  # EOS is as likely as the token seen most
    generator.load_weights(policy.weights(), 1)
    rollouts = sample(generator, *(prompt(i) for i in range(16))).values()

    tokenizer = AutoTokenizer.from_pretrained(policy.model.config.name_or_path)
    special = set(tokenizer.get_added_vocab().values())
    assert {rollout.finish_reason for rollout in rollouts} == {"stop", "length"}
    for rollout in rollouts:
        ids = rollout.response_ids
        assert len(ids) == len(rollout.rollout_logprobs) == len(rollout.policy_versions)
        if rollout.finish_reason == "stop":
            assert ids.index(eos) == len(ids) - 1
        else:
            assert eos not in ids
            assert len(ids) == MAX_NEW_TOKENS
        assert rollout.text == tokenizer.decode([i for i in ids if i not in special])


def test_the_seed_decides_the_tokens_whatever_else_is_sampled(generator: Any, policy: Policy) -> None:
    alone = sample(generator, prompt(1, seed=11))[1]
    crowd = sample(generator, prompt(2, LONG, seed=3), prompt(3, seed=11), prompt(4, seed=12))
    assert crowd[3].response_ids == alone.response_ids
    assert crowd[4].response_ids != alone.response_ids


def test_an_aborted_prompt_gives_no_rollout_and_may_be_submitted_again(generator: Any, policy: Policy) -> None:
    for each in (prompt(1), prompt(2)):
        generator.submit(each)
    generator.step()
    generator.abort([1, 99])
    assert sorted(drain(generator)) == [2]
    assert sorted(sample(generator, prompt(1))) == [1]


def test_a_probe_leaves_the_rollouts_under_way_as_they_are(generator: Any, policy: Policy) -> None:
    undisturbed = sample(generator, prompt(1))[1]
    generator.submit(prompt(1))
    generator.step()
    assert gap(generator.logprobs(SHORT), policy.logprobs(SHORT)) < PARITY
    assert drain(generator)[1].response_ids == undisturbed.response_ids


def test_what_finishes_during_a_probe_comes_with_the_next_step(generator: Any, policy: Policy) -> None:
    every = range(MAX_NUM_SEQS + 2)  # one more than the engine has seats: the probe waits for the first to finish
    for i in every:
        generator.submit(prompt(i))
    generator.logprobs(SHORT)
    generator.abort([0])  # finished or not, it is dropped
    assert sorted(drain(generator)) == [i for i in every if i != 0]


def test_nan_weights_give_nan_log_probabilities_and_a_living_engine(generator: Any, policy: Policy) -> None:
    broken = policy.weights()
    broken["model.norm.weight"][3] = math.nan
    generator.load_weights(broken, 1)
    rollout = sample(generator, prompt(1))[1]
    assert all(math.isnan(logprob) for logprob in rollout.rollout_logprobs)
    assert all(math.isnan(logprob) for logprob in generator.logprobs(SHORT))
    generator.load_weights(policy.weights(), 2)
    assert gap(generator.logprobs(SHORT), policy.logprobs(SHORT)) < PARITY


def test_weights_without_the_head_are_refused(generator: Any, policy: Policy) -> None:
    weights = policy.weights()
    del weights["lm_head.weight"]
    with pytest.raises(ValueError, match=r"lm_head\.weight"):
        generator.load_weights(weights, 1)
    assert generator.version == 0


def test_a_prompt_that_cannot_fit_or_is_under_way_is_refused(generator: Any, policy: Policy) -> None:
    with pytest.raises(DataError, match=r"257.*max_new_tokens"):
        generator.submit(prompt(1, (40,) * (257 - MAX_NEW_TOKENS)))
    generator.submit(prompt(2))
    with pytest.raises(ValueError, match="already under way"):
        generator.submit(prompt(2))
    assert sorted(drain(generator)) == [2]


@pytest.mark.parametrize(("knob", "value"), [("temperature", 0.0), ("top_p", 0.9)])
def test_sampling_that_ruins_importance_ratios_is_refused(knob: str, value: float) -> None:
    from rlhf_ray.roles.vllm_generator import VLLMGenerator

    with pytest.raises(ConfigError, match=knob):
        VLLMGenerator(model="nowhere", max_model_len=8, max_num_seqs=1, max_new_tokens=1, **{knob: value})
