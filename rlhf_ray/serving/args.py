"""What the reward service is built from: by a run, by ``serve run``, or in a Serve configuration file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rlhf_ray.config import Device, Precision, ReadFormat, ServeConfig, ServedModelConfig

_OF_SERVE = ServeConfig.model_fields


def _as_in_config(name: str, **constraints: Any) -> Any:
    """The field of ``serve`` again: one default and one description for both."""
    field = _OF_SERVE[name]
    return Field(field.default, description=field.description, **constraints)


class RewardServiceArgs(BaseModel):
    """What ``build_app`` is given: by a run, by ``serve run`` (``model=DIR replicas=2``) or in a Serve config file.

    The models are also the deployment's ``user_config``: a Serve file that gives another one there changes the model
    of running replicas.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(min_length=1, description="Reward-model folder.")
    name: str = _as_in_config("name")
    label: str | int | None = _as_in_config("label")
    prompt_format: ReadFormat | None = _as_in_config("prompt_format")
    models: dict[str, ServedModelConfig] = _as_in_config("models")
    device: Device = Field("auto", description="Where it runs; auto: cuda where a replica is given a GPU, else cpu.")
    api_keys_file: Path | None = _as_in_config("api_keys_file")
    replicas: int = _as_in_config("replicas", ge=1)
    max_replicas: int | None = _as_in_config("max_replicas", ge=1)
    num_cpus: float = _as_in_config("num_cpus", ge=0)
    num_gpus: float = _as_in_config("num_gpus", ge=0)
    precision: Precision = _as_in_config("precision")
    max_batch_size: int = _as_in_config("max_batch_size", ge=1)
    max_batch_tokens: int = _as_in_config("max_batch_tokens", ge=1)
    batch_wait_ms: float = _as_in_config("batch_wait_ms", ge=0)
    max_items: int = _as_in_config("max_items", ge=1)
    max_tokens: int | None = _as_in_config("max_tokens", ge=1)
    max_body_mb: float = _as_in_config("max_body_mb", gt=0)
    max_queue_s: float = _as_in_config("max_queue_s", gt=0)
    request_timeout_s: float = _as_in_config("request_timeout_s", gt=0)
    threads: int = _as_in_config("threads", ge=0)
    trust_remote_code: bool = _as_in_config("trust_remote_code")
    allow_pickle: bool = _as_in_config("allow_pickle")

    @model_validator(mode="after")
    def _one_of_each_name(self) -> RewardServiceArgs:
        if self.name in self.models:
            raise ValueError(f"models names {self.name!r}, which is the first model's name; choose another")
        return self

    @classmethod
    def of_section(cls, section: ServeConfig, model_folder: Path, device: Device) -> RewardServiceArgs:
        """The service that a configuration's section ``serve`` asks for."""
        values = section.model_dump(exclude={"model", "host", "port", "tls_cert", "tls_key"})
        for served in values["models"].values():
            served["folder"] = str(Path(served["folder"]).expanduser().resolve())
        if values["api_keys_file"] is not None:
            values["api_keys_file"] = section.api_keys_file.expanduser().resolve()  # type: ignore[union-attr]
        return cls(model=str(model_folder.resolve()), device=device, **values)

    def served_models(self) -> dict[str, ServedModelConfig]:
        """Every model by its name, the one that requests get by default first."""
        first = ServedModelConfig(folder=self.model, label=self.label, prompt_format=self.prompt_format)
        return {self.name: first, **self.models}
