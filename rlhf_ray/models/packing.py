"""Several sequences in one row, end to end, so that a forward computes no padding.

    [a a a b b c c c c]      each token sees those before it in its own sequence; positions begin anew with each

On a CPU one forward fills the cores, so padding costs what it weighs: batches of mixed lengths are scored a tenth to a
fifth faster when they are packed. A GPU has room to spare for padding, and would wait for the many small attentions.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, cycle, islice, pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_layers import GenericForSequenceClassification

_ATTENTION = "rlhf_ray_packed"
_PROBE_LENGTHS = (5, 1, 12)
_TOLERANCE = 1e-4
"""How far packed and padded hidden states in float32 may lie apart, relative to the largest."""


def pack(trunk: Any) -> bool:
    """Set a transformer up for ``packed_hidden``, if it can do that; else leave it as it is.

    A decoder can whose every layer attends to the whole sequence by transformers' common interface. Whether this one
    does so is tried out: packed and padded must agree.

    Args:
        trunk: in float32, with ``pad_token_id`` where sequences are padded at all; gives ``last_hidden_state``.
    """
    config = trunk.config.get_text_config()
    if config.is_encoder_decoder or _window(config):
        return False
    others = cycle(token for token in range(min(config.vocab_size, 100)) if token != config.pad_token_id)
    probe = [list(islice(others, length)) for length in _PROBE_LENGTHS]
    training, before = trunk.training, trunk.config._attn_implementation
    trunk.eval()
    with torch.no_grad():
        ids, mask = _padded(probe, config.pad_token_id or 0)
        padded = trunk(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()]
        AttentionInterface.register(_ATTENTION, _attention)
        trunk.set_attn_implementation(_ATTENTION)
        try:
            apart = (packed_hidden(trunk, ids[mask.bool()], _PROBE_LENGTHS) - padded).abs().max()
        except (TypeError, ValueError, RuntimeError):  # a transformer of another form
            apart = torch.tensor(torch.inf)
    trunk.train(training)
    packs = bool(apart <= _TOLERANCE * padded.abs().max())
    if not packs:
        trunk.set_attn_implementation(before)
    return packs


def is_packed(trunk: Any) -> bool:
    """Whether ``pack`` has set it up: it then reads one row at a time, and no padding."""
    return bool(trunk.config._attn_implementation == _ATTENTION)


def pack_classifier(model: Any) -> bool:
    """As ``pack``, for ``packed_logits`` of a sequence classifier, which must be a trunk and a linear head."""
    return isinstance(model, GenericForSequenceClassification) and pack(model.base_model)


def packed_hidden(trunk: Any, token_ids: Tensor, lengths: Sequence[int]) -> Tensor:
    """Last hidden states of sequences that stand end to end, by a trunk that ``pack`` has set up.

    Args:
        token_ids: [N] of all sequences, N the sum of ``lengths``.

    Returns:
        [N, d].
    """
    positions = torch.cat([torch.arange(length, device=token_ids.device) for length in lengths])
    hidden: Tensor = trunk(
        input_ids=token_ids[None],
        position_ids=positions[None],
        use_cache=False,
        cu_seq_lens_q=[0, *accumulate(lengths)],
    ).last_hidden_state
    return hidden[0]


@torch.inference_mode()
def packed_logits(model: Any, sequences: Sequence[Sequence[int]]) -> Tensor:
    """Logits at the last token of each sequence, by a model that ``pack_classifier`` has set up: [rows, labels],
    float32.
    """
    lengths = [len(ids) for ids in sequences]
    ids = torch.tensor([token for ids in sequences for token in ids], device=model.device)
    last = torch.tensor(list(accumulate(lengths)), device=model.device) - 1
    logits: Tensor = model.score(packed_hidden(model.base_model, ids, lengths)[last])
    return logits.float()


@torch.inference_mode()
def padded_logits(model: Any, sequences: Sequence[Sequence[int]]) -> Tensor:
    """Logits of each sequence, one to a row: the model reads the last token that is not padding; [rows, labels],
    float32.
    """
    ids, mask = _padded(sequences, model.config.get_text_config().pad_token_id)
    cache = {} if model.config.is_encoder_decoder else {"use_cache": False}
    logits: Tensor = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), **cache).logits
    return logits.float()


def _padded(sequences: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """[rows, longest] token ids, padded right, and the mask that is 1 on real ones."""
    longest = max(map(len, sequences))
    ids = torch.full((len(sequences), longest), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(sequences), longest), dtype=torch.int64)
    for row, tokens in enumerate(sequences):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
    return ids, mask


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    cu_seq_lens_q: Sequence[int] | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention of each sequence with itself alone; in the form of transformers' attentions.

    Args:
        query: [1, heads, N, head size], as ``key`` and ``value`` with their own number of heads.
        cu_seq_lens_q: where sequences begin and end: 0, n₁, n₁ + n₂, …, N; None: there is one alone.

    Returns:
        [1, N, heads, head size]; no weights.

    Raises:
        ValueError: several rows, whose padding nothing here would mask.
    """
    if len(query) > 1:
        raise ValueError("a model set up for packed sequences reads one row; put the sequences end to end")
    lengths = [b - a for a, b in pairwise(cu_seq_lens_q or (0, query.shape[2]))]
    # Split and not sliced: the gradient of a slice is a tensor of the whole size, filled with zeros, for each of them.
    pieces = zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True)
    return torch.cat(
        [sdpa_attention_forward(module, *piece, attention_mask, **options)[0] for piece in pieces], 1
    ), None


def _window(config: Any) -> bool:
    """True where some layer sees a part of the sequence only: its mask would be missing."""
    layers = set(getattr(config, "layer_types", None) or ())
    if layers:
        return layers != {"full_attention"}
    return bool(getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None))
