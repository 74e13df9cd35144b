"""LoRA (Hu et al. 2021): small matrices trained beside frozen linear layers, put into the model in place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor

from rlhf_ray.errors import ConfigError
from rlhf_ray.models.sharding import whole

_ADAPTER = "default"


def add_lora(language_model: Any, *, rank: int, alpha: float, targets: Sequence[str] | None, seed: int) -> None:
    """Freeze a language model and put LoRA matrices beside its linear layers; at first they add nothing.

    Args:
        alpha: what the matrices add is scaled by alpha / rank.
        targets: names of the layers, such as q_proj; None: every linear layer but the language-model head.
        seed: of their random start.

    Raises:
        ConfigError: a name that no linear layer of the model has.
    """
    head = language_model.get_output_embeddings()
    linear = {
        name.rpartition(".")[2]
        for name, module in language_model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    if unknown := [name for name in targets or () if name not in linear]:
        raise ConfigError(
            f"learner.lora_targets names {', '.join(unknown)}, and {type(language_model).__name__} has no such linear "
            f"layers; choose from {', '.join(sorted(linear))}"
        )
    language_model.requires_grad_(False)
    settings = LoraConfig(r=rank, lora_alpha=alpha, target_modules=sorted(targets or linear))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(settings, language_model, adapter_name=_ADAPTER)


@contextmanager
def without_lora(language_model: Any) -> Iterator[None]:
    """The model as it was before it had LoRA, for the block.

    What the matrices add is scaled by 0. To disable them in peft would freeze them too, and FSDP remembers what was
    frozen when it first saw it.
    """
    layers = [module for module in language_model.modules() if isinstance(module, LoraLayer)]
    scales = [layer.scaling[_ADAPTER] for layer in layers]
    for layer in layers:
        layer.scaling[_ADAPTER] = 0.0
    try:
        yield
    finally:
        for layer, scale in zip(layers, scales, strict=True):
            layer.scaling[_ADAPTER] = scale


@torch.no_grad()
def merged_state(language_model: Any) -> dict[str, Tensor]:
    """The state of the model as if its LoRA matrices were part of its layers, under the names that it had before.

    Where the weights are sharded, all ranks must call it: a layer that has LoRA is put together to be merged.
    """
    state: dict[str, Tensor] = dict(language_model.state_dict())
    for name, module in language_model.named_modules():
        if isinstance(module, LoraLayer):
            for key in [key for key in state if key.startswith(f"{name}.")]:
                inner = key.removeprefix(f"{name}.")
                value = state.pop(key)
                if inner.startswith("base_layer."):
                    state[f"{name}.{inner.removeprefix('base_layer.')}"] = value
            a, b = (whole(matrices[_ADAPTER].weight) for matrices in (module.lora_A, module.lora_B))
            state[f"{name}.weight"] = whole(state[f"{name}.weight"]) + module.scaling[_ADAPTER] * (b @ a)
    return state
