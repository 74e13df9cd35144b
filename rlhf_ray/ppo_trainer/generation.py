"""Responses of the policy in this process, sampled by transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rlhf_ray.errors import InputError

_PLAIN: dict[str, tuple[Any, ...]] = {
    "temperature": (1.0, None),
    "top_k": (0, None),
    "top_p": (1.0, None),
    "min_p": (0.0, None),
    "typical_p": (1.0, None),
    "repetition_penalty": (1.0, None),
    "no_repeat_ngram_size": (0, None),
    "num_beams": (1, None),
}
_FILTERED_BY_DEFAULT = {"top_k": 50}
"""What transformers does where nobody says otherwise."""


class LengthSampler:
    """Draws a number of tokens from ``min_value`` up to, and without, ``max_value``.

    Example: ``LengthSampler(4, 16)()``

    Raises:
        InputError: the range holds no number of tokens.
    """

    def __init__(self, min_value: int, max_value: int) -> None:
        if not 1 <= min_value < max_value:
            raise InputError(
                f"LengthSampler({min_value}, {max_value}) has no length to draw: it takes 1 <= min_value < max_value"
            )
        self._range = (min_value, max_value)

    def __call__(self) -> int:
        return int(np.random.randint(*self._range))


def generate_batches(
    model: Any,
    queries: Sequence[Tensor],
    *,
    pad_id: int,
    eos_id: int | None,
    batch_size: int,
    length_sampler: Callable[[], int] | None,
    options: Mapping[str, Any],
) -> Iterator[tuple[Tensor, Tensor]]:
    """For each query, it and its response, which ends with the first token that stops it.

    Queries of differing lengths share a forward: they are padded on the left.

    Args:
        model: has transformers' ``generate``.
        queries: 1-D token ids.
        eos_id: the tokenizer's; a response is cut behind it, as behind any EOS that the options name.
        options: of ``generate``.

    Raises:
        InputError: the options ask for something else than one sequence for each query.
    """
    for start in range(0, len(queries), batch_size):
        chunk = queries[start : start + batch_size]
        longest = max(len(query) for query in chunk)
        input_ids = torch.full((len(chunk), longest), pad_id, device=chunk[0].device)
        mask = torch.zeros_like(input_ids)
        for row, query in enumerate(chunk):
            input_ids[row, longest - len(query) :] = query
            mask[row, longest - len(query) :] = 1
        length = {} if length_sampler is None else {"max_new_tokens": length_sampler()}
        generated = model.generate(input_ids=input_ids, attention_mask=mask, **{**options, **length})
        if not isinstance(generated, Tensor) or len(generated) != len(chunk):
            raise InputError(
                "generate must give one tensor with one sequence for each query: leave num_return_sequences and "
                "return_dict_in_generate out"
            )
        stops = _stop_ids(model, eos_id, options)
        for query, tokens in zip(chunk, generated, strict=True):
            yield query, _cut(tokens[longest:], stops)


def filters(model: Any, options: Mapping[str, Any]) -> list[str]:
    """Options, given or the model's own, under which samples do not come from the model's plain distribution."""
    config = options.get("generation_config") or model.generation_config
    effective = dict(_FILTERED_BY_DEFAULT)
    effective |= {name: value for name, value in config.to_dict().items() if value is not None}
    effective |= options
    if not effective.get("do_sample"):
        return []
    return [f"{name}={effective[name]}" for name, plain in _PLAIN.items() if effective.get(name) not in plain]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and afterwards as it was: in training mode it may generate without a cache."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _stop_ids(model: Any, eos_id: int | None, options: Mapping[str, Any]) -> set[int]:
    config = options.get("generation_config") or model.generation_config
    named = options.get("eos_token_id", config.eos_token_id)
    stops: Iterable[int] = named if isinstance(named, Iterable) else [] if named is None else [named]
    return {*map(int, stops), *([] if eos_id is None else [eos_id])}


def _cut(response: Tensor, stops: set[int]) -> Tensor:
    ends = torch.isin(response, torch.tensor(sorted(stops), dtype=response.dtype, device=response.device))
    return response[: int(ends.int().argmax()) + 1] if ends.any() else response
