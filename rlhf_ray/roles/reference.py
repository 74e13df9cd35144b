"""The frozen policy that the KL is measured against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from rlhf_ray.data.batching import micro_batches
from rlhf_ray.models.loading import load_policy_model, resolve_device, resolve_precision, set_threads
from rlhf_ray.models.policy import PolicyModel
from rlhf_ray.types import Rollout


class ReferenceModel:
    """Log-probabilities of responses under one fixed policy. Plain and synchronous."""

    def __init__(
        self,
        model_folder: str | Path,
        *,
        device: str = "cpu",
        precision: str = "auto",
        temperature: float = 1.0,
        max_batch_tokens: int = 2048,
        threads: int = 0,
        trust_remote_code: bool = False,
        on_forward: Callable[[], None] | None = None,
    ) -> None:
        """
        Args:
            model_folder: Hugging Face folder or hub id.
            precision: of the arithmetic (autocast); the weights are float32.
            temperature: the sampler's; the logits are divided by it.
            max_batch_tokens: most padded tokens in one forward.
            threads: CPU threads of a forward; 0: every core.
            on_forward: is called after each.

        Raises:
            ModelError: the model cannot be used.
        """
        self._device = resolve_device(device, 0)
        self._dtype = resolve_precision(precision, self._device)
        self._temperature = temperature
        self._max_batch_tokens = max_batch_tokens
        self._threads = threads
        language_model = load_policy_model(model_folder, trust_remote_code=trust_remote_code)
        self._model = (
            PolicyModel(language_model, packed=self._device.type == "cpu").to(self._device).eval().requires_grad_(False)
        )
        if on_forward is not None:
            self._model.register_forward_hook(lambda *_: on_forward())

    def logprobs(self, rollouts: Sequence[Rollout]) -> list[np.ndarray]:
        """For each rollout, the [T] float32 log-probabilities of its response, nats, at the sampling temperature."""
        return self.response_logprobs([(rollout.prompt.token_ids, rollout.response_ids) for rollout in rollouts])

    def response_logprobs(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[np.ndarray]:
        """As ``logprobs``, of pairs of prompt and response as token ids."""
        set_threads(self._threads)
        lengths = [len(prompt) + len(response) for prompt, response in sequences]
        results: dict[int, np.ndarray] = {}
        for rows in micro_batches(lengths, max_tokens=self._max_batch_tokens):
            for row, logprobs in zip(rows, self._forward([sequences[row] for row in rows]), strict=True):
                results[row] = logprobs
        return [results[row] for row in range(len(sequences))]

    @torch.inference_mode()
    def _forward(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[np.ndarray]:
        responses = [torch.tensor(response) for _, response in sequences]
        tokens = [torch.tensor([*prompt, *response]) for prompt, response in sequences]
        lengths = torch.tensor([len(response) for response in responses])
        response_ids = pad_sequence(responses, batch_first=True)
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._dtype == torch.bfloat16):
            output = self._model(
                pad_sequence(tokens, batch_first=True).to(self._device),
                torch.tensor([len(prompt) for prompt, _ in sequences], device=self._device),
                response_ids.to(self._device),
                (torch.arange(response_ids.shape[1]) < lengths.unsqueeze(1)).to(self._device),
                temperature=self._temperature,
            )
        logprobs = output.logprobs.cpu().numpy()
        return [row[:length].copy() for row, length in zip(logprobs, lengths.tolist(), strict=True)]
