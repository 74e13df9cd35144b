"""A causal language model with a value head, by TRL's names; its arithmetic is that of ``models.policy``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_ray.config import ModelConfig
from rlhf_ray.errors import ConfigError, ModelError
from rlhf_ray.models.loading import load_policy_model, quiet, resolve_model, switch_off_dropout
from rlhf_ray.models.policy import PolicyModel
from rlhf_ray.models.value import ValueHead

VALUE_HEAD_FILE = Path("value_head", "model.safetensors")
"""In the model's folder, but not beside its weights: what loads ``*.safetensors`` there takes no notice of it."""

_WEIGHT, _BIAS = "v_head.summary.weight", "v_head.summary.bias"
"""Names of the head's tensors, as TRL gave them."""

_REMEDIES = {
    "peft_config": "all weights are trained; leave it out",
    "load_in_8bit": "training needs the weights in float32; leave it out",
    "load_in_4bit": "training needs the weights in float32; leave it out",
    "device_map": "the trainer moves the model to one device; leave it out",
    "v_head_init_strategy": "the value head starts at zero; leave it out",
    "v_head_initializer_range": "the value head starts at zero; leave it out",
    "summary_dropout_prob": "dropout is off everywhere; leave it out",
}
_FLOAT32 = (None, torch.float32, "float32")


class AutoModelForCausalLMWithValueHead(nn.Module):
    """A Hugging Face causal language model and, on the same trunk, a critic.

    Example: ``AutoModelForCausalLMWithValueHead.from_pretrained("gpt2")``
    """

    is_peft_model = False

    def __init__(self, pretrained_model: Any) -> None:
        """
        Args:
            pretrained_model: float32 weights; its dropout is switched off, so that log-probabilities repeat.

        Raises:
            ModelError: the learner cannot train it.
        """
        super().__init__()
        _check_trainable(pretrained_model)
        self.policy = PolicyModel(switch_off_dropout(pretrained_model)).to(pretrained_model.device)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path | PreTrainedModel, **options: Any) -> Self:
        """
        Args:
            pretrained_model_name_or_path: a hub id, a Hugging Face folder, a .gguf file, ``package://NAME/FILE.gguf``,
                or a model in memory. A folder that ``save_pretrained`` wrote, here or in TRL as safetensors, brings its
                value head; else the head starts at zero.
            options: ``trust_remote_code``; ``torch_dtype`` or ``dtype`` if it is float32.

        Raises:
            ModelError: there is no model of that name, or the learner cannot train it.
            ConfigError: another option.
        """
        trust = bool(options.pop("trust_remote_code", False))
        _refuse_options(options)
        source = pretrained_model_name_or_path
        if isinstance(source, PreTrainedModel):
            return cls(source)
        if not isinstance(source, str | Path):
            raise ModelError(
                f"from_pretrained was given a {type(source).__name__}; give a hub id, a folder, a .gguf file or a "
                "transformers.PreTrainedModel"
            )
        folder = _located(str(source), trust)
        model = cls(load_policy_model(folder, trust_remote_code=trust))
        _load_value_head(model.v_head, Path(folder))
        return model

    @property
    def pretrained_model(self) -> Any:
        """The language model."""
        return self.policy.language_model

    @property
    def v_head(self) -> ValueHead:
        """Hidden state → value."""
        return self.policy.value_head

    @property
    def config(self) -> Any:
        """Of the language model."""
        return self.pretrained_model.config

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        return_past_key_values: bool = False,
        **options: Any,
    ) -> tuple[Any, ...]:
        """Logits [B, L, V] in float32, the language model's loss (None without ``labels``), values [B, L].

        With ``return_past_key_values`` the cache comes fourth.
        """
        output = self.pretrained_model(
            input_ids=input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            **options | {"output_hidden_states": True},
        )
        result = (output.logits.float(), output.loss, self.v_head(output.hidden_states[-1]))
        return (*result, output.past_key_values) if return_past_key_values else result

    def generate(self, *inputs: Any, **options: Any) -> Any:
        """As the language model's own."""
        return self.pretrained_model.generate(*inputs, **options)

    def save_pretrained(self, save_directory: str | Path) -> None:
        """A plain Hugging Face folder in float32, and in it ``value_head/``; other files there stay."""
        folder = Path(save_directory).expanduser()
        with quiet():
            self.pretrained_model.save_pretrained(folder)
        file = folder / VALUE_HEAD_FILE
        file.parent.mkdir(exist_ok=True)
        temporary = file.with_name(f".{file.name}")
        linear = self.v_head.linear
        save_file({_WEIGHT: linear.weight.detach().cpu(), _BIAS: linear.bias.detach().cpu()}, temporary)
        temporary.replace(file)


def create_reference_model(
    model: AutoModelForCausalLMWithValueHead, num_shared_layers: int | None = None, pattern: str | None = None
) -> AutoModelForCausalLMWithValueHead:
    """A frozen copy of the model, which the KL is measured against.

    Raises:
        ConfigError: layers are to be shared.
    """
    if num_shared_layers is not None or pattern is not None:
        raise ConfigError(
            f"create_reference_model: num_shared_layers = {num_shared_layers}, pattern = {pattern} are not supported: "
            "the reference is a copy of its own and every layer is trained; leave them out"
        )
    return deepcopy(model).requires_grad_(False).eval()


def _refuse_options(options: dict[str, Any]) -> None:
    """Whatever is neither off nor known, by name."""
    for name, value in options.items():
        if name in ("torch_dtype", "dtype"):
            if value not in _FLOAT32:
                raise ConfigError(
                    f"from_pretrained: {name} = {value} is not supported: weights are trained in float32; leave it "
                    'out, and compute in bfloat16 with PPOConfig(accelerator_kwargs={"mixed_precision": "bf16"})'
                )
        elif value is not None and value is not False:
            remedy = _REMEDIES.get(name, "load the model with transformers and give the model itself")
            raise ConfigError(f"from_pretrained: {name} = {value!r} is not supported: {remedy}")


def _located(name: str, trust: bool) -> str:
    """What ``load_policy_model`` takes: a hub's oldest models, such as gpt2, have names without an owner."""
    path = Path(name).expanduser()
    if "/" not in name and path.suffix != ".gguf" and not path.exists():
        return name
    section = ModelConfig(path=name, trust_remote_code=trust)
    return resolve_model(section.path, cache_dir=section.cache_dir, trust_remote_code=trust)


def _check_trainable(model: Any) -> None:
    name = type(model).__name__
    if hasattr(model, "peft_config"):
        raise ModelError(f"{name} has adapters, and all weights are trained here; give model.merge_and_unload()")
    if model.config.is_encoder_decoder:
        raise ModelError(f"{name} is an encoder-decoder, and only decoders are trained here; choose a causal model")
    other = {parameter.dtype for parameter in model.parameters()} - {torch.float32}
    if other:
        raise ModelError(
            f"{name} has weights in {', '.join(sorted(map(str, other)))}, and they are trained in float32; give "
            'model.float(), and compute in bfloat16 with PPOConfig(accelerator_kwargs={"mixed_precision": "bf16"})'
        )


def _load_value_head(head: ValueHead, folder: Path) -> None:
    """The head that stands in the folder, if one does."""
    for file in (folder / VALUE_HEAD_FILE, *sorted(folder.glob("*.safetensors"))):
        if not file.is_file():
            continue
        with _readable(file), safe_open(file, framework="pt") as tensors:
            if _WEIGHT not in tensors.keys():  # noqa: SIM118 (safetensors' own, no dictionary)
                continue
            head.linear.load_state_dict({"weight": tensors.get_tensor(_WEIGHT), "bias": tensors.get_tensor(_BIAS)})
        return


@contextlib.contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, RuntimeError) as error:
        cause = " ".join(str(error).split())
        raise ModelError(f"the value head in {file} cannot be read ({cause}); save the model again") from error
