"""What goes over the wire to and from the reward service, and what its builder is given."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from rlhf_ray.config import Device, Precision, RunConfig, ServeConfig


def _readable(text: str) -> str:
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError("half of a surrogate pair, which no tokenizer can read")
    return text


Text = Annotated[str, AfterValidator(_readable)]
PromptText = Annotated[str, Field(min_length=1), AfterValidator(_readable)]


class Wire(BaseModel):
    """Base of requests and replies: an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Item(Wire):
    """One prompt and one response to it."""

    prompt: PromptText = Field(description="As a person wrote it, before a chat template.")
    response: Text = Field(description="The response alone; the prompt is not repeated.")


class ScoreRequest(Wire):
    """Either one prompt with its responses, or items that each bring a prompt."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"prompt": "The train", "responses": [" was late again.", " was a joy!"]}}
    )

    prompt: PromptText | None = Field(None, description="As a person wrote it, before a chat template.")
    responses: list[Text] | None = Field(None, min_length=1, description="Responses to that prompt, one score each.")
    items: list[Item] | None = Field(None, min_length=1, description="Instead: pairs of prompt and response.")

    @model_validator(mode="after")
    def _one_form(self) -> ScoreRequest:
        pair_form = self.prompt is not None and self.responses is not None and self.items is None
        item_form = self.prompt is None and self.responses is None and self.items is not None
        if not (pair_form or item_form):
            raise ValueError('send either "prompt" and "responses", or "items"')
        return self

    def texts(self) -> list[tuple[str, str]]:
        """(prompt, response) of each response, in the order of the request."""
        if self.items is not None:
            return [(item.prompt, item.response) for item in self.items]
        return [(self.prompt or "", response) for response in self.responses or []]


class ScoreResponse(Wire):
    """One score for each response, in the order of the request."""

    scores: list[float] = Field(description="Normalised: (raw score - mean) / std over reference completions.")
    raw_scores: list[float] = Field(description="What the model's head gave.")
    model: str = Field(description="Version (name and content hash) of the model that gave them.")


class Normalisation(Wire):
    """Mean and standard deviation of raw scores over reference completions."""

    mean: float
    std: float


class ModelCard(Wire):
    """A model that this service scores with, and its limits."""

    id: str = Field(description="Name in the configuration.")
    version: str = Field(description="Name and content hash.")
    normalisation: Normalisation
    max_tokens: int = Field(description="Longest prompt and response together.")
    max_items: int = Field(description="Most responses in one request.")


class ModelList(Wire):
    """The models of this service."""

    data: list[ModelCard]


class Status(Wire):
    """Reply of the health checks."""

    status: str


class Problem(Wire):
    """Reply to a request that was refused or failed."""

    detail: str = Field(description="What is wrong and what to do about it, in a sentence.")


class RewardServiceArgs(BaseModel):
    """What ``build_app`` is given: by a run, by ``serve run`` (``model=DIR replicas=2``) or in a Serve config file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(min_length=1, description="Reward-model folder.")
    name: str = Field(ServeConfig.model_fields["name"].default, description="Name of the model.")
    device: Device = Field("auto", description="Where it runs; auto: cuda where a replica is given a GPU, else cpu.")
    replicas: int = Field(1, ge=1, description="Replicas of the model.")
    num_cpus: float = Field(0.25, ge=0, description="CPU cores that Ray reserves for each.")
    num_gpus: float = Field(0, ge=0, description="GPUs that Ray reserves for each.")
    precision: Precision = Field("auto", description="Arithmetic; auto: bfloat16 where the hardware has it.")
    max_batch_size: int = Field(16, ge=1, description="Most responses scored in one forward.")
    batch_wait_ms: float = Field(
        10.0, ge=0, description="How long a request waits for others to share its forward, ms."
    )
    max_items: int = Field(64, ge=1, description="Most responses in one HTTP request.")
    threads: int = Field(0, ge=0, description="CPU threads of a replica; 0: all cores of its node.")

    @classmethod
    def of_run(cls, config: RunConfig, model_folder: Path) -> RewardServiceArgs:
        """The service that a run's configuration asks for."""
        section = config.serve.model_dump(exclude={"model", "host", "port"})
        return cls(model=str(model_folder.resolve()), device=config.device, **section)
