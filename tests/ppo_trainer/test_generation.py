"""Responses are the model's own, whatever shares the batch with them, and end where they end."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_ray import LengthSampler, PPOTrainer
from rlhf_ray.errors import InputError

QUERIES = [torch.tensor([5, 6, 7, 8, 9]), torch.tensor([10]), torch.tensor([11, 12, 13])]
GREEDY = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None}


def alone(trainer: PPOTrainer, query: Tensor, length: int = 6) -> list[int]:
    """The likeliest token, one after the other, without transformers' generate."""
    ids = query.tolist()
    with torch.no_grad():
        for _ in range(length):
            ids.append(int(trainer.model(input_ids=torch.tensor([ids]))[0][0, -1].argmax()))
    return ids


def listed(tensors: list[Tensor]) -> list[list[int]]:
    return [tensor.tolist() for tensor in tensors]


def test_a_query_gets_the_same_response_alone_and_beside_longer_ones(make_trainer: Any) -> None:
    trainer = make_trainer()
    expected = [alone(trainer, query) for query in QUERIES]
    assert listed(trainer.generate(QUERIES, batch_size=3, **GREEDY)) == expected
    assert listed(trainer.generate(QUERIES, batch_size=2, **GREEDY)) == expected
    single = trainer.generate(QUERIES[0], **GREEDY)
    assert single.tolist() == expected[:1]


def test_the_prompt_is_left_out_on_request(make_trainer: Any) -> None:
    trainer = make_trainer()
    expected = [alone(trainer, query)[len(query) :] for query in QUERIES]
    assert listed(trainer.generate(QUERIES, return_prompt=False, **GREEDY)) == expected
    assert trainer.generate(QUERIES[0], return_prompt=False, **GREEDY).tolist() == expected[:1]


def test_a_response_ends_with_its_eos_and_the_prompt_may_hold_one(make_trainer: Any) -> None:
    trainer = make_trainer()
    responses = [alone(trainer, query)[len(query) :] for query in QUERIES]
    stop = responses[0][2]
    assert stop not in responses[0][:2]
    queries = [torch.tensor([stop, *query.tolist()]) for query in QUERIES]
    before = [alone(trainer, query)[len(query) :] for query in queries]
    cut = [response[: response.index(stop) + 1] if stop in response else response for response in before]
    options = GREEDY | {"eos_token_id": stop}
    assert listed(trainer.generate(queries, batch_size=3, return_prompt=False, **options)) == cut
    whole = [query.tolist() + response for query, response in zip(queries, cut, strict=True)]
    assert listed(trainer.generate(queries, batch_size=3, **options)) == whole


def test_a_single_query_keeps_every_token_that_scripts_count_from_its_end(make_trainer: Any) -> None:
    """The old recipe: no EOS in sight, a drawn length, and ``response.squeeze()[-length:]``."""
    trainer = make_trainer()
    options = {"min_length": -1, "top_k": 0.0, "top_p": 1.0, "do_sample": True, "pad_token_id": 0, "eos_token_id": -1}
    for length in (3, 9):
        response = trainer.generate(QUERIES[0], max_new_tokens=length, **options)
        assert response.shape == (1, 5 + length)
        assert response[0, :5].tolist() == QUERIES[0].tolist()


def test_the_length_sampler_sets_the_length_of_each_forward(make_trainer: Any) -> None:
    lengths = iter([2, 5, 3])
    options = {"do_sample": False, "eos_token_id": None, "length_sampler": lambda: next(lengths)}
    trainer = make_trainer()
    responses = trainer.generate(QUERIES, batch_size=2, return_prompt=False, **options)
    assert [len(response) for response in responses] == [2, 2, 5]
    assert trainer.generate(QUERIES[1], return_prompt=False, **options).shape == (1, 3)


def test_the_reference_answers_as_the_policy_did_before_training(make_trainer: Any) -> None:
    trainer = make_trainer()
    expected = [alone(trainer, query) for query in QUERIES]
    with torch.no_grad():
        trainer.model.pretrained_model.model.embed_tokens.weight.copy_(
            trainer.model.pretrained_model.model.embed_tokens.weight.flip(0)
        )
    ours, theirs = trainer.generate(QUERIES, generate_ref_response=True, **GREEDY)
    assert listed(theirs) == expected
    assert listed(ours) == [alone(trainer, query) for query in QUERIES] != expected


def test_generation_leaves_the_model_in_training_mode(make_trainer: Any) -> None:
    trainer = make_trainer(gradient_checkpointing=True)
    assert trainer.model.training
    trainer.generate(QUERIES, **GREEDY)
    assert trainer.model.training
    assert not trainer.ref_model.training


def test_the_same_seed_samples_the_same(make_trainer: Any) -> None:
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": 12}
    first, again, other = (listed(make_trainer(seed=seed).generate(QUERIES, **options)) for seed in (3, 3, 4))
    assert first == again != other


def test_samples_that_are_not_the_models_own_are_warned_of_once(
    make_trainer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer()
    plain = {"do_sample": True, "max_new_tokens": 2, "top_k": 0, "top_p": 1.0}
    with caplog.at_level(logging.WARNING, logger="rlhf_ray.ppo_trainer"):
        trainer.generate(QUERIES, **plain)
        trainer.generate(QUERIES, **GREEDY)
        assert caplog.messages == []
        trainer.generate(QUERIES, **(plain | {"top_p": 0.9, "temperature": 0.7}))
        trainer.generate(QUERIES, do_sample=True, max_new_tokens=2)
    (warning,) = caplog.messages
    assert "temperature=0.7, top_p=0.9" in warning
    assert "pass top_k=0, top_p=1.0, temperature=1.0" in warning


def test_the_libraries_own_filter_is_warned_of_where_nobody_set_one(
    make_trainer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    make_trainer().generate(QUERIES, do_sample=True, max_new_tokens=2)
    assert "top_k=50" in caplog.text


def test_several_sequences_for_a_query_are_refused(make_trainer: Any) -> None:
    with pytest.raises(InputError, match="leave num_return_sequences and return_dict_in_generate out"):
        make_trainer().generate(QUERIES, do_sample=True, top_k=0, max_new_tokens=2, num_return_sequences=2)


def test_lengths_are_drawn_from_the_range_without_its_end() -> None:
    assert {LengthSampler(2, 5)() for _ in range(200)} == {2, 3, 4}
    for empty in ((3, 3), (0, 4)):
        with pytest.raises(InputError, match=r"has no length to draw: it takes 1 <= min_value < max_value"):
            LengthSampler(*empty)
