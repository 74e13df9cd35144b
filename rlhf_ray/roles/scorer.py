"""The reward model at work: token ids in, one scalar each out. Plain and synchronous; Ray is somebody else's edge.

What the model sees is decided in one place, ``models.reward.reward_input``, for training, PPO and HTTP alike.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from jinja2 import TemplateError

from rlhf_ray.config import Precision, ReadFormat
from rlhf_ray.data.preferences import as_dialogue
from rlhf_ray.data.prompts import encode_prompt
from rlhf_ray.errors import DataError, ModelError, NoScoreError, ScorerError
from rlhf_ray.models.loading import context_length, resolve_device, resolve_precision, set_threads
from rlhf_ray.models.packing import pack_classifier, packed_logits, padded_logits
from rlhf_ray.models.reward import find_label, load_reward_model, longest_input, model_version, reward_input
from rlhf_ray.types import Rollout, Score, Turn

PromptFormat = Literal["text", "chat"]

SETTINGS_FILE = "rlhf_ray.json"
_SETTINGS_REMEDY = 'write {"prompt_format": "chat"}, "text" or "response" into it, or say so in serve.models'


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardSettings:
    """How texts were put to a reward model in training; stored beside its weights as ``rlhf_ray.json``."""

    prompt_format: ReadFormat

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
        if not isinstance(row, dict) or row.get("prompt_format") not in get_args(ReadFormat):
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What a model made of one sequence."""

    score: Score
    logits: tuple[float, ...]
    """Of every label."""


class RewardScorer:
    """Scores responses with one reward model, or with one label of any sequence classifier.

    The raw score is the logit of a model with one label, and of one with several the log-odds of the label that was
    chosen: σ(raw) is its probability.

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
        label: str | int | None = None,
        prompt_format: ReadFormat | None = None,
        max_tokens: int | None = None,
        trust_remote_code: bool = False,
        allow_pickle: bool = False,
    ) -> None:
        """Load the model.

        Args:
            folder: reward-model folder (weights, tokenizer, score_normalisation.json, rlhf_ray.json).
            num_gpus: GPUs that this process was given; decides what device "auto" means.
            precision: of the weights; "auto" is bfloat16 where the hardware has it.
            threads: CPU threads of a forward; 0: every core that this process may use.
            max_batch_size: most sequences in one forward.
            label: name or index of the label to score by, of a model with several.
            prompt_format: how texts are put to the model; default: what its rlhf_ray.json says.
            max_tokens: longest sequence to take, where the model could read more.
            trust_remote_code: run Python code that comes with the model.
            allow_pickle: read weights in pickle files too.

        Raises:
            ModelError: the folder holds no such model.
        """
        self._device = resolve_device(device, num_gpus)
        self._threads = threads
        self._max_batch_size = max_batch_size
        model, self.tokenizer, self.normalisation = load_reward_model(
            folder, label=label, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle
        )
        self.packs = self._device.type == "cpu" and pack_classifier(model)
        """Sequences of a forward are not padded to one length."""
        self._model: Any = model.to(self._device, resolve_precision(precision, self._device)).eval()
        self._label = find_label(folder, model.config, label)
        self._multi_label = model.config.problem_type == "multi_label_classification"
        self.labels: tuple[str, ...] = tuple(str(name) for _, name in sorted(model.config.id2label.items()))
        settings = RewardSettings.load(folder)
        self.prompt_format = prompt_format or (settings.prompt_format if settings else None)
        self._folder = folder
        if self.prompt_format in ("text", "chat") and self.tokenizer.eos_token_id is None:
            raise ModelError(
                f"the tokenizer of {folder} has no EOS token, which a model of prompts and responses reads"
            )
        overrides = {"label": label, "prompt_format": prompt_format}
        self.version: str = model_version(folder, {key: value for key, value in overrides.items() if value is not None})
        text_config = model.config.get_text_config()
        self._vocabulary: int = text_config.vocab_size
        self._pad_id: int = text_config.pad_token_id
        readable = longest_input(model, self.tokenizer, context_length(folder, trust_remote_code=trust_remote_code))
        self.max_tokens = readable if max_tokens is None else min(readable, max_tokens)
        """Longest sequence that is taken, EOS included."""

    def text_ids(self, prompt: str, response: str, *, turns: Sequence[Turn] = ()) -> list[int]:
        """Token ids of a prompt and a response given as texts.

        Args:
            turns: of a dialogue; under the chat format they are the prompt.

        Raises:
            DataError: too long for the model.
            ModelError: the folder does not say how prompts were put to the model.
        """
        prompt_format = self._prompt_format()
        if prompt_format == "response":
            return self._checked(self.tokenizer(response)["input_ids"])
        return text_input(
            prompt, response, self.tokenizer, prompt_format=prompt_format, max_length=self.max_tokens, turns=turns
        )

    def dialogue_ids(self, turns: Sequence[Turn]) -> list[int]:
        """Token ids of messages, the last of which is the response.

        Raises:
            DataError: too long for the model, or the last is not the assistant's.
            ModelError: the folder does not say how prompts were put to the model.
        """
        if len(turns) < 2 or turns[-1].role != "assistant":
            raise DataError("the messages must be a prompt and, as the last, the assistant's response to score")
        *before, response = turns
        if [turn.role for turn in before] == ["user"]:
            return self.text_ids(before[0].content, response.content)
        try:
            return self.text_ids(as_dialogue(before), response.content, turns=before)
        except TemplateError as error:
            raise DataError(f"the model's chat template refuses these messages: {error}") from error

    def whole_text_ids(self, text: str) -> list[int]:
        """Token ids of a prompt and its response as one text, special tokens spelt out; one EOS ends it.

        Raises:
            DataError: too long for the model.
            ModelError: the folder does not say how prompts were put to the model.
        """
        if self._prompt_format() == "response":
            return self._checked(self.tokenizer(text)["input_ids"])
        begins = self.tokenizer.bos_token is not None and text.startswith(self.tokenizer.bos_token)
        ids = self.tokenizer(text, add_special_tokens=not begins)["input_ids"]
        return reward_input((), ids, eos_id=self.tokenizer.eos_token_id, max_length=self.max_tokens)

    def token_ids(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> list[int]:
        """A prompt's and a response's own token ids as the model reads them; nothing is tokenised again.

        Raises:
            DataError: the model reads texts by a tokenizer of its own.
        """
        if self.prompt_format == "response":
            raise DataError(f"{self.version} reads texts by a tokenizer of its own; send the response as text")
        if self.tokenizer.eos_token_id is None:
            raise DataError(f"the tokenizer of {self.version} has no EOS, where a model of token ids reads its score")
        return reward_input(prompt_ids, response_ids, eos_id=self.tokenizer.eos_token_id)

    def rollout_ids(self, rollout: Rollout) -> list[int]:
        """The rollout's own token ids as the model reads them; nothing is tokenised again."""
        return self.token_ids(rollout.prompt.token_ids, rollout.response_ids)

    def warm_up_ids(self, length: int) -> list[int]:
        """A sequence that every tokenizer of this model could give."""
        eos = self.tokenizer.eos_token_id
        return [self._pad_id if eos is None else eos] * length

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
            scores.append(verdict.score)
        return scores

    def verdicts(self, sequences: Sequence[Sequence[int]]) -> list[Reading | ScorerError]:
        """As ``score_ids``, but a sequence that cannot be scored gives its error and leaves the others their scores."""
        verdicts: list[Reading | ScorerError | None] = [self.refusal(ids) for ids in sequences]
        scorable = sorted((i for i, verdict in enumerate(verdicts) if verdict is None), key=lambda i: len(sequences[i]))
        for start in range(0, len(scorable), self._max_batch_size):
            rows = scorable[start : start + self._max_batch_size]
            for i, logits in zip(rows, self._forward([sequences[i] for i in rows]), strict=True):
                verdicts[i] = self._verdict(logits, len(sequences[i]))
        return [verdict for verdict in verdicts if verdict is not None]

    def _forward(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        set_threads(self._threads)
        logits: list[list[float]] = (packed_logits if self.packs else padded_logits)(self._model, sequences).tolist()
        return logits

    def _prompt_format(self) -> ReadFormat:
        if self.prompt_format is None:
            raise ModelError(
                f"{self._folder} has no {SETTINGS_FILE} to say how prompts were put to this model; {_SETTINGS_REMEDY}"
            )
        return self.prompt_format

    def _checked(self, ids: list[int]) -> list[int]:
        if len(ids) > self.max_tokens:
            raise DataError(f"the text is {len(ids)} tokens and the model reads at most {self.max_tokens}; shorten it")
        return ids

    def refusal(self, ids: Sequence[int]) -> ScorerError | None:
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

    def _verdict(self, logits: Sequence[float], tokens: int) -> Reading | ScorerError:
        raw = self._raw(logits)
        if not math.isfinite(raw):
            return NoScoreError(
                f"the reward model {self.version} gave {raw} for {tokens} tokens; its weights may be broken"
            )
        value = (raw - self.normalisation.mean) / self.normalisation.std
        return Reading(score=Score(value=value, raw=raw, reward_version=self.version), logits=tuple(logits))

    def _raw(self, logits: Sequence[float]) -> float:
        """The label's logit where it stands alone; beside others of a softmax, its log-odds against them."""
        if not all(map(math.isfinite, logits)):
            return math.nan
        mine = logits[self._label]
        others = [logit for index, logit in enumerate(logits) if index != self._label]
        if self._multi_label or not others:
            return mine
        top = max(others)
        return mine - top - math.log(sum(math.exp(logit - top) for logit in others))

    def probabilities(self, logits: Sequence[float]) -> list[float]:
        """Of each label: a softmax over several, or σ where each stands for itself."""
        if self._multi_label or len(logits) == 1:
            return list(map(sigmoid, logits))
        top = max(logits)
        weights = [math.exp(logit - top) for logit in logits]
        return [weight / sum(weights) for weight in weights]


def sigmoid(x: float) -> float:
    """1 / (1 + e⁻ˣ), without overflow."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
