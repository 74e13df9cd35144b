"""The reward service: a plain asynchronous class with its HTTP face. ``serving/app.py`` puts it on Ray Serve."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from rlhf_ray.errors import DataError, InputError, ScorerError
from rlhf_ray.roles.scorer import RewardScorer
from rlhf_ray.serving.batcher import Batcher
from rlhf_ray.serving.schemas import (
    ModelCard,
    ModelList,
    Normalisation,
    Problem,
    RewardServiceArgs,
    ScoreRequest,
    ScoreResponse,
    Status,
)
from rlhf_ray.types import Rollout, Score


class RewardService:
    """One replica: one model, batched over all its callers.

    It is ready once it is constructed: the model is loaded and has run a forward.
    """

    def __init__(self, args: RewardServiceArgs, scorer: RewardScorer | None = None) -> None:
        """
        Args:
            scorer: a loaded one to use instead of loading ``args.model``.

        Raises:
            ModelError: ``args.model`` holds no reward model.
        """
        self._args = args
        self._scorer = scorer or RewardScorer(
            Path(args.model),
            device=args.device,
            num_gpus=args.num_gpus,
            precision=args.precision,
            threads=args.threads,
            max_batch_size=args.max_batch_size,
        )
        self._scorer.score_ids([[self._scorer.tokenizer.eos_token_id]])  # the first forward of a process takes seconds
        self._batcher = Batcher(
            self._scorer.verdicts, max_batch_size=args.max_batch_size, wait_seconds=args.batch_wait_ms / 1000
        )

    async def score_rollout(self, rollout: Rollout) -> Score:
        """Score a rollout by its own token ids; calls under way share forwards.

        Raises:
            ScorerError: it has no score.
        """
        (score,) = await self._batcher.score([self._scorer.rollout_ids(rollout)])
        return score

    async def score(self, request: ScoreRequest) -> ScoreResponse:
        """Score responses given as texts."""
        texts = request.texts()
        if len(texts) > self._args.max_items:
            raise HTTPException(
                413,
                f"the request has {len(texts)} responses and {self._args.max_items} are allowed at once; "
                "send several requests, or raise serve.max_items",
            )
        scores = await self._batcher.score(self._encode(texts))
        return ScoreResponse(
            scores=[score.value for score in scores],
            raw_scores=[score.raw for score in scores],
            model=self._scorer.version,
        )

    async def models(self) -> ModelList:
        """The model, its version, its normalisation and its limits."""
        normalisation = self._scorer.normalisation
        card = ModelCard(
            id=self._args.name,
            version=self._scorer.version,
            normalisation=Normalisation(mean=normalisation.mean, std=normalisation.std),
            max_tokens=self._scorer.max_tokens,
            max_items=self._args.max_items,
        )
        return ModelList(data=[card])

    async def healthz(self) -> Status:
        """The process answers."""
        return Status(status="ok")

    async def readyz(self) -> Status:
        """The model is loaded and scores."""
        return Status(status="ready")

    def http_app(self) -> FastAPI:
        """The HTTP face: /v1/score, /v1/models, /healthz, /readyz and the OpenAPI page at /docs."""
        app = FastAPI(
            title="rlhf_ray reward service", description="One scalar for each response, with the model's version."
        )
        problems: dict[int | str, dict[str, Any]] = {code: {"model": Problem} for code in (413, 422, 500)}
        app.post("/v1/score", responses=problems)(self.score)
        app.get("/v1/models")(self.models)
        app.get("/healthz")(self.healthz)
        app.get("/readyz")(self.readyz)
        app.add_exception_handler(RequestValidationError, _invalid_request)
        app.add_exception_handler(InputError, _bad_input)
        app.add_exception_handler(ScorerError, _no_score)
        return app

    def _encode(self, texts: Sequence[tuple[str, str]]) -> list[list[int]]:
        encoded = []
        for number, (prompt, response) in enumerate(texts, start=1):
            try:
                encoded.append(self._scorer.text_ids(prompt, response))
            except DataError as error:
                raise DataError(f"response {number}: {error}") from error
        return encoded


async def _invalid_request(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return JSONResponse({"detail": "; ".join(_sentence(problem) for problem in error.errors())}, 422)


async def _bad_input(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"detail": str(error)}, 422)


async def _no_score(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"detail": str(error)}, 500)


def _sentence(problem: dict[str, Any]) -> str:
    """A pydantic error as "where: what"."""
    where = ".".join(str(part) for part in problem["loc"] if part != "body")
    what = str(problem["msg"]).removeprefix("Value error, ")
    return f"{where}: {what}" if where else what
