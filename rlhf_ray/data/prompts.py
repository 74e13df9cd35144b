"""Prompts: read from a file, put into token ids, and dealt out in an order that a resumed run repeats exactly."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol

from rlhf_ray.errors import DataError, ModelError
from rlhf_ray.types import Prompt, Turn

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
_RECIPE = "recipe:"


class Tokenizer(Protocol):
    """What is asked of a Hugging Face tokenizer."""

    chat_template: Any

    def encode(self, text: str) -> list[int]:
        """Token ids of the text, with the special tokens that the model expects around it."""
        ...

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, add_generation_prompt: bool, tokenize: bool, return_dict: bool
    ) -> Any:
        """Token ids of the conversation, up to where the assistant begins to speak."""
        ...


def read_prompts(path: str) -> list[str]:
    """The prompts of a JSONL file, line by line: prompt i stands on line i + 1. Keys besides "prompt" are ignored.

    Args:
        path: a file, or ``recipe:NAME.jsonl`` for one that ships inside the package.

    Raises:
        DataError: the file is missing or empty, or a line is no JSON object with a non-empty string "prompt".
    """
    try:
        lines = _locate(path).read_bytes().removeprefix(b"\xef\xbb\xbf").rstrip().split(b"\n")
    except OSError as error:
        reason = error.strerror or "it cannot be read"
        raise DataError(
            f"{path}: {reason}; name a JSONL file in prompts.path, prompts.eval_path or evaluate.prompts"
        ) from error
    if lines == [b""]:
        raise DataError(f'{path} holds no prompt; write one JSON object {{"prompt": "..."}} on each line')
    return [_parse(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]


def _locate(path: str) -> Path:
    if not path.startswith(_RECIPE):
        return Path(path).expanduser()
    file = RECIPES / path.removeprefix(_RECIPE)
    if not file.is_file():
        shipped = ", ".join(sorted(f.name for f in RECIPES.glob("*.jsonl")))
        raise DataError(f"{path} is not shipped with the package; choose one of: {shipped}")
    return file


def _parse(line: bytes, where: str) -> str:
    remedy = 'write it as {"prompt": "..."} or remove it'
    if not line.strip():
        raise DataError(f"{where} is empty; {remedy}")
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8 text; save the file in that encoding") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not valid JSON ({error}); {remedy}") from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise DataError(f'{where} is no object with a string under "prompt"; {remedy}')
    prompt: str = row["prompt"]
    if not prompt.strip():
        raise DataError(f"{where} has an empty prompt; {remedy}")
    if any("\ud800" <= letter <= "\udfff" for letter in prompt):
        raise DataError(f"{where} has half of a surrogate pair, which no tokenizer can read; {remedy}")
    return prompt


def encode_prompt(
    text: str, tokenizer: Tokenizer, *, format: Literal["text", "chat"], turns: Sequence[Turn] = ()
) -> list[int]:
    """What the generator is given: the text as it stands, or as a user's turn in the tokenizer's chat template.

    Args:
        turns: of a dialogue; the chat template is given these instead of ``text``.

    Raises:
        ModelError: format is "chat" and the tokenizer has no chat template.
    """
    if format == "text":
        return list(tokenizer.encode(text))
    if not tokenizer.chat_template:
        raise ModelError("the tokenizer has no chat template; set prompts.format to text, or use a chat model")
    messages = [asdict(turn) for turn in turns or (Turn("user", text),)]
    # transformers 5 returns a BatchEncoding unless told otherwise.
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False))


def check_prompts(
    path: str, encoded: Sequence[Sequence[int]], *, max_tokens: int, max_new_tokens: int, context_length: int
) -> None:
    """Refuse a file with a prompt that cannot be used; ``encoded[i]`` are the token ids of line i + 1.

    Raises:
        DataError: a prompt has no tokens, more than ``max_tokens``, or too many for a whole response, and the EOS that
            a reward model reads behind it, to fit.
    """
    for number, ids in enumerate(encoded, start=1):
        where = f"{path}, line {number}"
        if not ids:
            raise DataError(f"{where}: the tokenizer makes no token of this prompt; remove it")
        if len(ids) > max_tokens:
            raise DataError(
                f"{where}: the prompt has {len(ids)} tokens and prompts.max_tokens = {max_tokens}; "
                "shorten the prompt or raise prompts.max_tokens"
            )
        if len(ids) + max_new_tokens + 1 > context_length:
            raise DataError(
                f"{where}: the prompt's {len(ids)} tokens, sampling.max_new_tokens = {max_new_tokens} and EOS do not "
                f"fit the context of {context_length}; shorten the prompt or lower sampling.max_new_tokens"
            )


def sampling_seed(seed: int, prompt_id: int) -> int:
    """Sampling seed of one prompt, in [0, 2³¹): a hash of the run's seed and the prompt's id."""
    return int.from_bytes(_digest("sampling", seed, prompt_id)[:4], "big") >> 1


class PromptStream:
    """Endless prompts as a pure function of the ordinal, so a resumed run asks exactly what it would have asked.

    Every epoch goes once through all prompts, in an order of its own.

    Args:
        prompts: (text, token ids) of each prompt.
        seed: the run's seed; it decides the order and each prompt's sampling seed.
        completions: responses wanted of each.

    Example::

        stream = PromptStream([("The train", (504, 5681)), ("A letter", (49, 4573))], seed=0)
        assert stream.prompt(7) == stream.prompt(7)

    Raises:
        DataError: there are no prompts.
    """

    def __init__(self, prompts: Sequence[tuple[str, Sequence[int]]], *, seed: int, completions: int = 1) -> None:
        if not prompts:
            raise DataError("there are no prompts to train on; name a file that has some in prompts.path")
        self._prompts = [(text, tuple(ids)) for text, ids in prompts]
        self._seed = seed
        self._completions = completions

    def prompt(self, prompt_id: int) -> Prompt:
        """Prompt number ``prompt_id`` of the run, from 0."""
        epoch, place = divmod(prompt_id, len(self._prompts))
        text, token_ids = self._prompts[_order(self._seed, epoch, len(self._prompts))[place]]
        return Prompt(
            prompt_id=prompt_id,
            text=text,
            token_ids=token_ids,
            seed=sampling_seed(self._seed, prompt_id),
            completions=self._completions,
        )


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, n: int) -> tuple[int, ...]:
    """A permutation of range(n): sorted by a hash, so it is the same under every version of every library."""
    return tuple(sorted(range(n), key=lambda i: _digest("order", seed, epoch, i)))


def _digest(*parts: object) -> bytes:
    return hashlib.sha256(":".join(map(str, parts)).encode()).digest()
