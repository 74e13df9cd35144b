"""Wire forms that the clients of other systems speak already. Fields that say nothing to us are ignored, as there.

POST /get_reward   OpenRLHF's remote reward model
POST /classify     vLLM's pooling server
POST /rerank       Jina, Cohere, vLLM
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from rlhf_ray.serving.schemas import ModelName, PromptText, Text, TokenId


class Foreign(BaseModel):
    """Base of others' requests and replies."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class GetRewardRequest(Foreign):
    """OpenRLHF: whole texts, prompt and response together with the chat template."""

    query: Annotated[list[Text], Field(min_length=1)] | Text
    model: ModelName = None

    def texts(self) -> list[str]:
        """The texts, one or many."""
        return [self.query] if isinstance(self.query, str) else self.query


class GetRewardResponse(Foreign):
    """OpenRLHF: a reward for training and a score for filtering; here they are the same, and normalised."""

    rewards: list[float]
    scores: list[float]
    extra_logs: dict[str, list[float]]
    model: str


class ClassifyRequest(Foreign):
    """vLLM: whole texts, or token ids as the model reads them."""

    input: (
        Text
        | Annotated[list[Text], Field(min_length=1)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1)]
    )
    model: ModelName = None
    use_activation: bool | None = Field(None, description="False: the head's raw output instead of probabilities.")
    add_special_tokens: None = Field(None, description="Not taken: the model decides how a text is put to it.")
    truncate_prompt_tokens: None = Field(None, description="Not taken: a text that is too long is refused.")

    def inputs(self) -> list[str] | list[list[int]]:
        """Texts or sequences of token ids, one or many."""
        if isinstance(self.input, str):
            return [self.input]
        if isinstance(self.input[0], int):
            return [self.input]
        return self.input


class Usage(Foreign):
    """Tokens read."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int = 0


class Classified(Foreign):
    """One text's classes."""

    index: int
    label: str
    probs: list[float]
    num_classes: int


class ClassifyResponse(Foreign):
    """vLLM's reply; ``model`` is the version."""

    id: str
    object: str = "list"
    created: int
    model: str
    data: list[Classified]
    usage: Usage


class RerankDocument(Foreign):
    """A document as an object."""

    text: Text


class RerankRequest(Foreign):
    """A query (our prompt) and documents (our responses) to put in order."""

    query: PromptText
    documents: list[Text | RerankDocument] = Field(min_length=1)
    model: ModelName = None
    top_n: int | None = Field(None, ge=0, description="Only the best N; 0 or null: all.")

    def texts(self) -> list[str]:
        """The documents' texts."""
        return [document if isinstance(document, str) else document.text for document in self.documents]


class RerankResult(Foreign):
    """One document's place."""

    index: int
    document: RerankDocument
    relevance_score: float = Field(description="Normalised score.")


class RerankResponse(Foreign):
    """Documents, the best first."""

    id: str
    model: str
    results: list[RerankResult]
    usage: Usage
