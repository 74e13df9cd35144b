"""What goes over the wire to and from the reward service in its own words; ``foreign.py`` has those of others."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from rlhf_ray.types import Turn


def _readable(text: str) -> str:
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError("half of a surrogate pair, which no tokenizer can read")
    return text


Text = Annotated[str, AfterValidator(_readable)]
PromptText = Annotated[str, Field(min_length=1), AfterValidator(_readable)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
ModelName = Annotated[str | None, Field(description="Name of the model to score with; default: the service's first.")]


class Wire(BaseModel):
    """Base of requests and replies: an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Message(Wire):
    """One message of a dialogue."""

    role: Literal["system", "user", "assistant"]
    content: Text

    def turn(self) -> Turn:
        """The noun for it."""
        return Turn(self.role, self.content)


def _forms(*forms: tuple[str, ...]) -> dict[str, Any]:
    """For the OpenAPI page: which fields go together."""
    return {"anyOf": [{"required": list(form)} for form in forms]}


_ITEM_FORMS = (("prompt", "response"), ("messages",), ("prompt_ids", "response_ids"))
_REQUEST_FORMS = (("prompt", "responses"), ("messages",), ("items",))


class Item(Wire):
    """One response to score, in one of three forms: prompt and response, messages, or token ids."""

    model_config = ConfigDict(json_schema_extra=_forms(*_ITEM_FORMS))

    prompt: PromptText | None = Field(None, description="As a person wrote it, before a chat template.")
    response: Text | None = Field(None, description="The response alone; the prompt is not repeated.")
    messages: list[Message] | None = Field(
        None, min_length=2, description="Instead: a dialogue whose last message is the assistant's, which is scored."
    )
    prompt_ids: list[TokenId] | None = Field(
        None, min_length=1, description="Instead: token ids of the prompt, chat template included."
    )
    response_ids: list[TokenId] | None = Field(
        None, description="Token ids of the response; what the model reads ends in one EOS, sent or not."
    )

    @model_validator(mode="after")
    def _one_form(self) -> Item:
        given = {name for form in _ITEM_FORMS for name in form if getattr(self, name) is not None}
        if not any(given == set(form) for form in _ITEM_FORMS):
            raise ValueError('send "prompt" and "response", or "messages", or "prompt_ids" and "response_ids"')
        return self


class ScoreRequest(Wire):
    """One prompt with its responses, one dialogue, or items that each bring a prompt."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {"prompt": "The train", "responses": [" was late again.", " was a joy!"]},
            **_forms(*_REQUEST_FORMS),
        }
    )

    model: ModelName = None
    prompt: PromptText | None = Field(None, description="As a person wrote it, before a chat template.")
    responses: list[Text] | None = Field(None, min_length=1, description="Responses to that prompt, one score each.")
    messages: list[Message] | None = Field(
        None, min_length=2, description="Instead: a dialogue whose last message is the assistant's, which is scored."
    )
    items: list[Item] | None = Field(None, min_length=1, description="Instead: responses with a prompt each.")

    @model_validator(mode="after")
    def _one_form(self) -> ScoreRequest:
        given = {name for form in _REQUEST_FORMS for name in form if getattr(self, name) is not None}
        if not any(given == set(form) for form in _REQUEST_FORMS):
            raise ValueError('send "prompt" and "responses", or "messages", or "items"')
        return self

    def all_items(self) -> list[Item]:
        """An item for each response, in the order of the request."""
        if self.items is not None:
            return self.items
        if self.messages is not None:
            return [Item.model_construct(messages=self.messages)]
        return [Item.model_construct(prompt=self.prompt, response=response) for response in self.responses or []]


class ScoreResponse(Wire):
    """One score for each response, in the order of the request."""

    scores: list[float] = Field(description="Normalised: (raw score - mean) / std over reference completions.")
    raw_scores: list[float] = Field(description="What the model's head gave; of one label among several, its log-odds.")
    model: str = Field(description="Version (name and content hash) of the model that gave them.")


class CompareRequest(Wire):
    """Two responses to one prompt."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"prompt": "The train", "first": " was a joy!", "second": " was late again."}}
    )

    model: ModelName = None
    prompt: PromptText = Field(description="As a person wrote it, before a chat template.")
    first: Text
    second: Text


class CompareResponse(Wire):
    """Which of two responses the model prefers."""

    probability: float = Field(description="P(the first is preferred) = sigmoid(first - second) of the raw scores.")
    scores: list[float] = Field(description="Normalised scores of the first and the second.")
    raw_scores: list[float] = Field(description="What the model's head gave for each.")
    model: str = Field(description="Version (name and content hash) of the model that gave them.")


class Normalisation(Wire):
    """Mean and standard deviation of raw scores over reference completions."""

    mean: float
    std: float


class ModelCard(Wire):
    """A model that this service scores with, and its limits."""

    id: str = Field(description="Name that a request gives.")
    version: str = Field(description="Name and content hash.")
    normalisation: Normalisation
    labels: list[str] = Field(description="Of the model's head.")
    prompt_format: str | None = Field(description="How texts are put to it; null: it takes token ids only.")
    max_tokens: int = Field(description="Longest prompt and response together.")
    max_items: int = Field(description="Most responses in one request.")
    update_error: str | None = Field(None, description="Why the newest change to this model was not taken over.")


class ModelList(Wire):
    """The models of this service."""

    data: list[ModelCard]


class Status(Wire):
    """Reply of the health checks."""

    status: str


class Problem(Wire):
    """Reply to a request that was refused or failed."""

    detail: str = Field(description="What is wrong and what to do about it, in a sentence.")
