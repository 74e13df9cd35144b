"""A policy goes through the object store bit for bit, each piece of memory once."""

from __future__ import annotations

import pytest
import torch

from rlhf_ray.actors.weights import pack_weights, unpack_weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_arrive_as_they_were_sent_and_tied_ones_travel_once(dtype: torch.dtype) -> None:
    embedding = torch.randn(5, 3).to(dtype)
    sent = {"embed.weight": embedding, "norm.weight": torch.randn(3).to(dtype), "lm_head.weight": embedding}
    packed = pack_weights(sent)
    for array in packed["arrays"].values():
        array.flags.writeable = False  # as the store hands them out
    arrived = unpack_weights(packed)

    assert set(packed["arrays"]) == {"embed.weight", "norm.weight"}
    assert packed["aliases"] == {"lm_head.weight": "embed.weight"}
    assert set(arrived) == set(sent)
    for name, tensor in sent.items():
        assert arrived[name].dtype == dtype
        assert torch.equal(arrived[name], tensor)


def test_equal_weights_in_different_memory_stay_apart() -> None:
    packed = pack_weights({"a": torch.ones(2), "b": torch.ones(2)})
    assert packed["aliases"] == {}
