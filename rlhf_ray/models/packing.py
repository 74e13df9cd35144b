"""Several sequences in one row, end to end, so that a forward computes no padding.

    [a a a b b c c c c]      each token sees those before it in its own sequence; positions begin anew with each

On a CPU one forward fills the cores, so padding costs what it weighs: batches of mixed lengths score 1.15 times faster
packed. A GPU has room to spare for padding, and would wait for the many small attentions instead.
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
"""How far packed and padded logits in float32 may lie apart, relative to the largest."""


def pack(model: Any) -> bool:
    """Set a sequence classifier up for ``packed_logits``, if it can do that; else leave it as it is.

    A decoder of transformers' common form can, where every layer attends to the whole sequence. Whether this one does
    as its form promises is tried out: packed and padded must agree.

    Args:
        model: in float32, with ``pad_token_id`` set.
    """
    config = model.config.get_text_config()
    if not isinstance(model, GenericForSequenceClassification) or _window(config):
        return False
    others = cycle(token for token in range(min(config.vocab_size, 100)) if token != config.pad_token_id)
    probe = [list(islice(others, length)) for length in _PROBE_LENGTHS]
    padded = padded_logits(model, probe)
    before = model.config._attn_implementation
    AttentionInterface.register(_ATTENTION, _attention)
    model.set_attn_implementation(_ATTENTION)
    try:
        apart = (packed_logits(model, probe) - padded).abs().max()
    except (TypeError, KeyError, RuntimeError):  # an attention that does not pass the boundaries on
        apart = torch.tensor(torch.inf)
    if apart <= _TOLERANCE * max(1.0, padded.abs().max().item()):
        return True
    model.set_attn_implementation(before)
    return False


@torch.inference_mode()
def packed_logits(model: Any, sequences: Sequence[Sequence[int]]) -> Tensor:
    """Logits at the last token of each sequence, by a model that ``pack`` has set up: (rows, labels), float32."""
    ends = list(accumulate(map(len, sequences)))
    device = model.device
    ids = torch.tensor([[token for ids in sequences for token in ids]], device=device)
    positions = torch.cat([torch.arange(len(ids), device=device) for ids in sequences])[None]
    hidden = model.base_model(
        input_ids=ids, position_ids=positions, use_cache=False, cu_seq_lens_q=[0, *ends]
    ).last_hidden_state
    logits: Tensor = model.score(hidden[0, torch.tensor(ends, device=device) - 1])
    return logits.float()


@torch.inference_mode()
def padded_logits(model: Any, sequences: Sequence[Sequence[int]]) -> Tensor:
    """Logits of each sequence, one to a row: the model reads the last token that is not padding; (rows, labels),
    float32.
    """
    longest = max(map(len, sequences))
    config = model.config
    input_ids = torch.full((len(sequences), longest), config.get_text_config().pad_token_id, dtype=torch.int64)
    mask = torch.zeros((len(sequences), longest), dtype=torch.int64)
    for row, ids in enumerate(sequences):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        mask[row, : len(ids)] = 1
    cache = {} if config.is_encoder_decoder else {"use_cache": False}
    logits: Tensor = model(input_ids=input_ids.to(model.device), attention_mask=mask.to(model.device), **cache).logits
    return logits.float()


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    cu_seq_lens_q: Sequence[int],
    **options: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention of each sequence with itself alone; in the form of transformers' attentions.

    Args:
        query: (1, heads, tokens, head size), as ``key`` and ``value`` with their own number of heads.
        cu_seq_lens_q: where sequences begin and end: 0, n₁, n₁ + n₂, …, tokens.

    Returns:
        (1, tokens, heads, head size); no weights.
    """
    pieces = [
        sdpa_attention_forward(module, query[:, :, a:b], key[:, :, a:b], value[:, :, a:b], attention_mask, **options)[0]
        for a, b in pairwise(cu_seq_lens_q)
    ]
    return torch.cat(pieces, dim=1), None


def _window(config: Any) -> bool:
    """True where some layer sees a part of the sequence only: its mask would be missing."""
    layers = set(getattr(config, "layer_types", None) or ())
    if layers:
        return layers != {"full_attention"}
    return bool(getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None))
