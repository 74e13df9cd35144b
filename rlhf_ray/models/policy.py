"""The policy, a Hugging Face causal language model; and its critic, a value head on that trunk or on one of its own.

Shapes: B sequences, L tokens (padded right), T response tokens, N unmasked response tokens, d hidden size, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_ray.errors import ModelError
from rlhf_ray.models.packing import is_packed, pack, packed_hidden
from rlhf_ray.models.value import ValueHead

_LOGITS_PER_CHUNK = 2**24
"""Entries of the [rows, V] logits made at once: 64 MiB in float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyOutput:
    """Per response token; 0 where masked."""

    logprobs: Tensor
    """[B, T] float32, nats, at the temperature."""
    values: Tensor | None
    """[B, T] float32: value of the state before the token."""
    entropy: Tensor | None
    """[B, T] float32, nats, of the distribution that the token was drawn from."""


class PolicyModel(nn.Module):
    """Log-probabilities, values and entropy of given responses, in one pass over each trunk.

    The trunk reads everything; only the positions that predict a response token go through the vocabulary, whose logits
    are most of the memory.

    There is no attention mask: padding stands on the right, and under causal attention a token never sees what follows
    it. That keeps the attention kernel on its fast causal path; so does packing.
    """

    def __init__(self, language_model: Any, *, critic: Any = None, packed: bool = False) -> None:
        """
        Args:
            language_model: any Hugging Face causal LM that is a trunk (``base_model``) and a linear head, on the CPU.
            critic: a trunk for the values alone, which reads the same token ids; None: they share the policy's.
            packed: let the trunk read all rows as one without padding, if it can.

        Raises:
            ModelError: its logits are not the head applied to the trunk's last hidden state.
        """
        super().__init__()
        self.language_model = language_model
        self.critic = critic
        self.value_head = ValueHead((critic or language_model).config.get_text_config().hidden_size)
        _check_head(language_model)
        for trunk in (language_model.base_model, critic):
            if packed and trunk is not None:
                pack(trunk)

    def forward(
        self,
        input_ids: Tensor,
        prompt_len: Tensor,
        response_ids: Tensor,
        response_mask: Tensor,
        *,
        temperature: float,
        with_values: bool = False,
        values_apart: bool = False,
        with_entropy: bool = False,
        entropy_gradient: bool = False,
    ) -> PolicyOutput:
        """
        Args:
            input_ids: [B, L] prompt, response, right padding.
            prompt_len: [B]; row i's response token t is predicted at position ``prompt_len[i] + t - 1``.
            response_ids: [B, T].
            response_mask: [B, T] bool, True on response tokens.
            temperature: divides the logits.
            values_apart: the values' gradient ends at the policy's trunk: only the critic learns from them.
            entropy_gradient: keep the entropy in the graph, for a bonus in the loss; without it, it is only measured.
        """
        rows, tokens = response_mask.nonzero(as_tuple=True)
        places = (rows, prompt_len[rows] + tokens - 1)
        lengths = prompt_len + response_mask.sum(dim=1)
        selected = self._hidden(self.language_model.base_model, input_ids, lengths, *places)
        values = None
        if with_values:
            read = selected if self.critic is None else self._hidden(self.critic, input_ids, lengths, *places)
            values = self.value_head(read.detach() if values_apart and self.critic is None else read)

        def padded(flat: Tensor) -> Tensor:
            return flat.new_zeros(response_mask.shape).masked_scatter(response_mask, flat)

        logprobs, entropy = _logprobs(
            selected,
            response_ids[response_mask],
            self.language_model.get_output_embeddings(),
            temperature=temperature,
            with_entropy=with_entropy,
            entropy_gradient=entropy_gradient,
        )
        return PolicyOutput(
            logprobs=padded(logprobs),
            values=None if values is None else padded(values),
            entropy=None if entropy is None else padded(entropy),
        )

    def _hidden(self, trunk: Any, input_ids: Tensor, lengths: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """[N, d]: a trunk's last hidden states at N places of the [B, L] ``input_ids``.

        The last token of a row predicts nothing that is asked for, so the trunk does not read it.
        """
        if not is_packed(trunk):
            hidden: Tensor = trunk(input_ids=input_ids[:, :-1], use_cache=False).last_hidden_state
            return hidden[rows, columns]
        lengths = lengths - 1
        read = torch.arange(input_ids.shape[1], device=input_ids.device) < lengths.unsqueeze(1)
        starts = lengths.cumsum(dim=0) - lengths
        return packed_hidden(trunk, input_ids[read], lengths.tolist())[starts[rows] + columns]


def _logprobs(
    hidden: Tensor,
    targets: Tensor,
    head: Callable[[Tensor], Tensor],
    *,
    temperature: float,
    with_entropy: bool,
    entropy_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """[N, d] hidden states and [N] target ids → [N] log-probabilities and entropies, a chunk of rows at a time."""
    vocabulary = head.weight.shape[0]  # type: ignore[attr-defined]
    size = max(_LOGITS_PER_CHUNK // vocabulary, 1)
    logprobs, entropies = [], []
    for part, wanted in zip(hidden.split(size), targets.split(size), strict=True):
        logits = head(part).float()
        log_softmax = torch.log_softmax(logits if temperature == 1.0 else logits / temperature, dim=-1)
        logprobs.append(log_softmax.gather(-1, wanted.unsqueeze(-1)).squeeze(-1))
        if with_entropy:
            with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
                entropies.append(-(log_softmax.exp() * log_softmax).sum(dim=-1))
    return torch.cat(logprobs), torch.cat(entropies) if with_entropy else None


@torch.no_grad()
def _check_head(language_model: Any) -> None:
    """Some families scale or cap their logits after the head; their log-probabilities would be silently wrong here.

    Raises:
        ModelError: the model is one of them, or has no linear head.
    """
    head = language_model.get_output_embeddings()
    name = type(language_model).__name__
    if not isinstance(head, nn.Linear):
        raise ModelError(f"{name} has no linear language-model head; set model.path to a causal language model")
    training = language_model.training
    language_model.eval()
    tokens = torch.arange(4, device=head.weight.device).unsqueeze(0)
    logits = language_model(input_ids=tokens, use_cache=False).logits
    ours = head(language_model.base_model(input_ids=tokens, use_cache=False).last_hidden_state)
    language_model.train(training)
    if (logits - ours).abs().max() > 1e-3 * logits.abs().max():
        raise ModelError(
            f"{name} changes its logits after the language-model head (scaling or soft-capping), which the learner "
            "does not reproduce; choose another model with model.path"
        )
