"""The reward model at work: token ids in, one scalar each out. Plain and synchronous; Ray is somebody else's edge.

What the model sees is decided in one place, ``models.reward.reward_input``, for training, PPO and HTTP alike.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from rlhf_ray.config import Precision
from rlhf_ray.data.prompts import encode_prompt
from rlhf_ray.errors import ModelError, ScorerError
from rlhf_ray.models.loading import context_length, resolve_device, resolve_precision, set_threads
from rlhf_ray.models.reward import load_reward_model, model_version, reward_input
from rlhf_ray.types import Rollout, Score, Turn

PromptFormat = Literal["text", "chat"]

SETTINGS_FILE = "rlhf_ray.json"
_SETTINGS_REMEDY = 'write {"prompt_format": "chat"} or {"prompt_format": "text"} into it'


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardSettings:
    """How texts were put to a reward model in training; stored beside its weights as ``rlhf_ray.json``."""

    prompt_format: PromptFormat

    def save(self, folder: Path) -> None:
        (folder / SETTINGS_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> RewardSettings | None:
        """None where the folder does not say.

        Raises:
            ModelError: the file is there and makes no sense.
        """
        path = folder / SETTINGS_FILE
        if not path.is_file():
            return None
        try:
            row = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ModelError(f"{path} is not JSON ({error}); {_SETTINGS_REMEDY}") from error
        if not isinstance(row, dict) or row.get("prompt_format") not in ("text", "chat"):
            raise ModelError(f"{path} does not say how prompts were put to this model; {_SETTINGS_REMEDY}")
        return cls(prompt_format=row["prompt_format"])


def text_input(
    prompt: str,
    response: str,
    tokenizer: Any,
    *,
    prompt_format: PromptFormat,
    max_length: int | None = None,
    turns: Sequence[Turn] = (),
) -> list[int]:
    """Token ids of a prompt and a response given as texts: each encoded alone, so no token spans the boundary.

    Args:
        turns: of a dialogue; under the chat format they are the prompt.

    Raises:
        DataError: more than ``max_length`` tokens.
    """
    response_ids = tokenizer(response, add_special_tokens=False)["input_ids"]
    prompt_ids = encode_prompt(prompt, tokenizer, format=prompt_format, turns=turns)
    return reward_input(prompt_ids, response_ids, eos_id=tokenizer.eos_token_id, max_length=max_length)


class RewardScorer:
    """Scores responses with one reward model.

    ``score_*`` raise ``ScorerError`` rather than return a number that is not one.
    """

    def __init__(
        self,
        folder: Path,
        *,
        device: str = "auto",
        num_gpus: float = 0,
        precision: Precision = "auto",
        threads: int = 0,
        max_batch_size: int = 16,
    ) -> None:
        """Load the model.

        Args:
            folder: reward-model folder (weights, tokenizer, score_normalisation.json, rlhf_ray.json).
            num_gpus: GPUs that this process was given; decides what device "auto" means.
            precision: of the weights; "auto" is bfloat16 where the hardware has it.
            threads: CPU threads of a forward; 0: every core that this process may use.
            max_batch_size: most sequences in one forward.

        Raises:
            ModelError: the folder holds no reward model.
        """
        self._device = resolve_device(device, num_gpus)
        self._threads = threads
        self._max_batch_size = max_batch_size
        model, self.tokenizer, self.normalisation = load_reward_model(folder)
        self._model: Any = model.to(self._device, resolve_precision(precision, self._device)).eval()
        self._settings = RewardSettings.load(folder)
        self._folder = folder
        self.version: str = model_version(folder)
        text_config = model.config.get_text_config()
        self._vocabulary: int = text_config.vocab_size
        self._pad_id: int = text_config.pad_token_id
        self.max_tokens = context_length(folder)
        """Longest sequence that the model can read, EOS included."""

    def text_ids(self, prompt: str, response: str) -> list[int]:
        """Token ids of a prompt and a response given as texts.

        Raises:
            DataError: too long for the model.
            ModelError: the folder does not say how prompts were put to the model.
        """
        if self._settings is None:
            raise ModelError(
                f"{self._folder} has no {SETTINGS_FILE} to say how prompts were put to this model; {_SETTINGS_REMEDY}"
            )
        return text_input(
            prompt, response, self.tokenizer, prompt_format=self._settings.prompt_format, max_length=self.max_tokens
        )

    def rollout_ids(self, rollout: Rollout) -> list[int]:
        """The rollout's own token ids as the model reads them; nothing is tokenised again."""
        return reward_input(rollout.prompt.token_ids, rollout.response_ids, eos_id=self.tokenizer.eos_token_id)

    def score_texts(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Score]:
        """One score for each prompt and its response."""
        return self.score_ids([self.text_ids(p, r) for p, r in zip(prompts, responses, strict=True)])

    def score_rollouts(self, rollouts: Sequence[Rollout]) -> list[Score]:
        """One score for each rollout."""
        return self.score_ids([self.rollout_ids(rollout) for rollout in rollouts])

    def score_ids(self, sequences: Sequence[Sequence[int]]) -> list[Score]:
        """One score for each sequence of token ids, EOS included."""
        scores = []
        for verdict in self.verdicts(sequences):
            if isinstance(verdict, ScorerError):
                raise verdict
            scores.append(verdict)
        return scores

    def verdicts(self, sequences: Sequence[Sequence[int]]) -> list[Score | ScorerError]:
        """As ``score_ids``, but a sequence that cannot be scored gives its error and leaves the others their scores."""
        verdicts: list[Score | ScorerError | None] = [self._refusal(ids) for ids in sequences]
        scorable = sorted((i for i, verdict in enumerate(verdicts) if verdict is None), key=lambda i: len(sequences[i]))
        for start in range(0, len(scorable), self._max_batch_size):
            rows = scorable[start : start + self._max_batch_size]
            for i, raw in zip(rows, self._forward([sequences[i] for i in rows]), strict=True):
                verdicts[i] = self._verdict(raw, len(sequences[i]))
        return [verdict for verdict in verdicts if verdict is not None]

    @torch.inference_mode()
    def _forward(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """Raw scores of one padded batch; the model reads each row's last token that is not padding."""
        set_threads(self._threads)
        longest = max(map(len, sequences))
        input_ids = torch.full((len(sequences), longest), self._pad_id, dtype=torch.int64)
        mask = torch.zeros((len(sequences), longest), dtype=torch.int64)
        for row, ids in enumerate(sequences):
            input_ids[row, : len(ids)] = torch.tensor(ids)
            mask[row, : len(ids)] = 1
        logits = self._model(
            input_ids=input_ids.to(self._device), attention_mask=mask.to(self._device), use_cache=False
        ).logits
        scores: list[float] = logits.float().squeeze(-1).tolist()
        return scores

    def _refusal(self, ids: Sequence[int]) -> ScorerError | None:
        """Why a sequence cannot be read, if so: an id outside the vocabulary would end a GPU's process."""
        if not ids:
            return ScorerError("an empty sequence has no score")
        if len(ids) > self.max_tokens:
            return ScorerError(
                f"prompt and response are {len(ids)} tokens and the reward model {self.version} reads "
                f"{self.max_tokens}; lower prompts.max_tokens or sampling.max_new_tokens"
            )
        if min(ids) < 0 or max(ids) >= self._vocabulary:
            return ScorerError(
                f"token id {max(ids)} is outside the {self._vocabulary} tokens of the reward model {self.version}; "
                "score with a model that shares the policy's tokenizer"
            )
        return None

    def _verdict(self, raw: float, tokens: int) -> Score | ScorerError:
        if not math.isfinite(raw):
            return ScorerError(
                f"the reward model {self.version} gave {raw} for {tokens} tokens; its weights may be broken"
            )
        value = (raw - self.normalisation.mean) / self.normalisation.std
        return Score(value=value, raw=raw, reward_version=self.version)
