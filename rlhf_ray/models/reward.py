"""The reward model's folder, its score normalisation, and what it reads."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForSequenceClassification

from rlhf_ray.errors import DataError, ModelError
from rlhf_ray.models.loading import check_nothing_missing, check_weight_files, load_tokenizer, quiet, switch_off_dropout

NORMALISATION_FILE = "score_normalisation.json"
QUALITY_FILE = "reward_report.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreNormalisation:
    """score = (raw − mean) / std, fitted on reference completions (Ziegler et al. 2019, sec. 2.1)."""

    mean: float = 0.0
    std: float = 1.0

    def save(self, folder: Path) -> None:
        """Write ``score_normalisation.json`` into the reward model's folder."""
        (folder / NORMALISATION_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> ScoreNormalisation:
        """The folder's; mean 0 and standard deviation 1 where it has none.

        Raises:
            ModelError: the file does not hold two finite numbers with std above 0.
        """
        path = folder / NORMALISATION_FILE
        if not path.is_file():
            return cls()
        try:
            row = json.loads(path.read_text(encoding="utf-8"))
            normalisation = cls(mean=float(row["mean"]), std=float(row["std"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(f'{path} must hold {{"mean": number, "std": number}}: {error!r}') from error
        if not math.isfinite(normalisation.mean) or not 0 < normalisation.std < math.inf:
            raise ModelError(f"{path} must hold a finite mean and a std above 0; it holds {row}")
        return normalisation


def check_reward_folder(
    folder: Path, *, label: str | int | None = None, trust_remote_code: bool = False, allow_pickle: bool = False
) -> None:
    """Refuse what ``load_reward_model`` would, as far as that shows without reading the weights.

    Raises:
        ModelError: no configuration with that label, no safetensors file, or a broken score normalisation.
    """
    if not folder.is_dir():
        raise ModelError(f"no reward model can be read from {folder}: there is no such folder")
    try:
        with quiet():
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(f"no reward model can be read from {folder}: {' '.join(str(error).split())[:300]}") from error
    find_label(folder, config, label)
    if not (allow_pickle and any(folder.glob("*.bin"))):
        check_weight_files(folder)
    ScoreNormalisation.load(folder)


def find_label(folder: str | Path, config: Any, label: str | int | None) -> int:
    """Index of the label whose logit is the score; a reward model has only one.

    Raises:
        ModelError: there are several and none is named, or there is none of that name.
    """
    names = {int(index): str(name) for index, name in config.id2label.items()}
    listed = ", ".join(names.values())
    if label is None:
        if len(names) == 1:
            return 0
        raise ModelError(
            f"the model in {folder} has {len(names)} labels ({listed}) and a reward model has one; set serve.model to "
            "a folder that `rlhf-ray reward` has written, or name the label to score by with label in serve.models"
        )
    for index, name in names.items():
        if label in (index, name):
            return index
    raise ModelError(f"the model in {folder} has no label {label!r}; choose one of: {listed}")


def load_reward_model(
    folder: str | Path, *, label: str | int | None = None, trust_remote_code: bool = False, allow_pickle: bool = False
) -> tuple[Any, Any, ScoreNormalisation]:
    """A sequence classifier in float32, without dropout or gradients; its tokenizer; its normalisation.

    Args:
        label: which one will be read, of a model with several.
        trust_remote_code: run Python code that comes with the model.
        allow_pickle: read weights in pickle files too, which can run code while they are read.

    Raises:
        ModelError: the folder holds no such model, or not all of it: a head is never initialised anew.
    """
    if not Path(folder).is_dir():
        raise ModelError(f"no reward model can be loaded from {folder}: there is no such folder")
    try:
        with quiet():
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
            find_label(folder, config, label)
            model, loading = AutoModelForSequenceClassification.from_pretrained(
                folder,
                dtype=torch.float32,
                attn_implementation="sdpa",
                use_safetensors=None if allow_pickle else True,
                output_loading_info=True,
                trust_remote_code=trust_remote_code,
            )
    except (OSError, ValueError, RuntimeError, SafetensorError, UnpicklingError) as error:
        if isinstance(error, ModelError):
            raise
        cause = " ".join(str(error).split())[:300]
        raise ModelError(f"no reward model can be loaded from {folder}: {cause}") from error
    check_nothing_missing(folder, loading)
    tokenizer = load_tokenizer(folder, need_chat_template=False, need_eos=False, trust_remote_code=trust_remote_code)
    config = model.config.get_text_config()
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.convert_tokens_to_ids(padding_token(tokenizer))
    switch_off_dropout(model).eval().requires_grad_(False)
    return model, tokenizer, ScoreNormalisation.load(Path(folder))


def padding_token(tokenizer: Any) -> str:
    """A token that is not EOS: what stands in the padding is masked, only where it begins must be seen.

    Raises:
        ModelError: the tokenizer has no other token.
    """
    named = [tokenizer.pad_token, *tokenizer.all_special_tokens, *tokenizer.convert_ids_to_tokens([0, 1])]
    for token in (tokenizer.unk_token, *named):
        if token is not None and token != tokenizer.eos_token:
            return str(token)
    raise ModelError('the tokenizer has no token to pad with; name one as "pad_token" in its tokenizer_config.json')


def longest_input(model: Any, tokenizer: Any, context: int) -> int:
    """Tokens that the model can read: fewer than its context where its tokenizer says so, or where its table of
    positions begins behind the padding index, as RoBERTa's does.
    """
    tables = [m for name, m in model.named_modules() if name.endswith("position_embeddings")]
    used = max(
        (table.padding_idx + 1 for table in tables if getattr(table, "padding_idx", None) is not None), default=0
    )
    return min(context - used, tokenizer.model_max_length)


def version_files(folder: str | Path) -> list[Path]:
    """What a model's scores follow from: weights, configuration, tokenizer, normalisation, settings; in name order."""
    settings = ("config.json", "rlhf_ray.json", NORMALISATION_FILE, "chat_template.jinja")
    found = [path for path in Path(folder).glob("*") if path.name in settings or path.name.startswith("tokenizer")]
    return sorted([*found, *Path(folder).glob("*.safetensors"), *Path(folder).glob("*.bin")])


def model_version(folder: str | Path, overrides: Mapping[str, Any] | None = None) -> str:
    """``name@digest``: the folder's name and 12 hex digits of the SHA-256 over what its scores follow from.

    Args:
        overrides: what is read otherwise than the folder says.

    Raises:
        ModelError: it has no weights.
    """
    files = version_files(folder)
    if not any(path.suffix in (".safetensors", ".bin") for path in files):
        raise ModelError(f"{folder} has no safetensors file; give a folder that save_pretrained has written")
    digest = hashlib.sha256(json.dumps(overrides, sort_keys=True).encode() if overrides else b"")
    for path in files:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return f"{Path(folder).resolve().name}@{digest.hexdigest()[:12]}"


def reward_input(
    prompt_ids: Sequence[int], response_ids: Sequence[int], *, eos_id: int, max_length: int | None = None
) -> list[int]:
    """What a reward model reads, in training, in PPO and over HTTP: prompt, response, and exactly one EOS at the end.

    A response cut at its length limit gets the EOS that it never wrote: the model reads its score there. What the cut
    costs is ``ppo.missing_eos_penalty``.

    Raises:
        DataError: more than ``max_length`` tokens.
    """
    end = len(response_ids)
    while end and response_ids[end - 1] == eos_id:
        end -= 1
    ids = [*prompt_ids, *response_ids[:end], eos_id]
    if max_length is not None and len(ids) > max_length:
        raise DataError(
            f"prompt and response are {len(ids)} tokens with EOS and the reward model reads at most {max_length}; "
            "shorten them, or lower prompts.max_tokens or sampling.max_new_tokens"
        )
    return ids
