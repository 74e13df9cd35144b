"""The HTTP face of the reward service: routes, and a sentence and a status for whatever goes wrong."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline

from rlhf_ray.errors import InputError, ScorerError
from rlhf_ray.serving.batcher import OverloadedError
from rlhf_ray.serving.guard import PAGE_FILES, Guard
from rlhf_ray.serving.reward_service import RewardService, TooManyItemsError, UnknownModelError
from rlhf_ray.serving.schemas import Problem

_STATUS: dict[type[Exception], int] = {
    InputError: 422,
    UnknownModelError: 404,
    TooManyItemsError: 413,
    ScorerError: 500,
}
_PROBLEMS: dict[int | str, dict[str, Any]] = {
    400: {"model": Problem, "description": "A body that is no text"},
    401: {"model": Problem, "description": "No API key, or a wrong one"},
    404: {"model": Problem, "description": "No model of that name"},
    413: {"model": Problem, "description": "Too many responses, or too large a body"},
    422: {"model": Problem, "description": "A request that cannot be read"},
    429: {"model": Problem, "description": "Too much is waiting; Retry-After says how long to wait"},
    500: {"model": Problem, "description": "The model gave no score"},
    504: {"model": Problem, "description": "It took too long"},
}


def http_app(service: RewardService, *, key_digests: Collection[str] = ()) -> FastAPI:
    """Our own routes, those that other systems' clients know, and the OpenAPI page at /docs.

    Args:
        key_digests: of the API keys that open the door; with none it stands open.
    """
    app: FastAPI = FastAPIOffline(
        title="rlhf_ray reward service",
        description="One scalar for each response, with the version of the model that gave it.",
        redoc_url=None,
        static_url=PAGE_FILES,
    )
    scoring = APIRouter(responses=_PROBLEMS, dependencies=[Depends(HTTPBearer(auto_error=False))])
    scoring.post("/v1/score")(service.score)
    scoring.post("/v1/compare")(service.compare)
    scoring.get("/v1/models")(service.models)
    scoring.post("/get_reward", tags=["as OpenRLHF"])(service.get_reward)
    scoring.post("/classify", tags=["as vLLM"])(service.classify)
    scoring.post("/rerank", tags=["as Jina and Cohere"])(service.rerank)
    app.include_router(scoring)
    app.get("/healthz")(service.healthz)
    app.get("/readyz", responses={500: _PROBLEMS[500]})(service.readyz)
    app.add_middleware(
        Guard, key_digests=key_digests, max_body_bytes=service.max_body_bytes, on_refusal=service.count_refusal
    )

    def problem(status: int, detail: str, **headers: str) -> JSONResponse:
        service.count_refusal(status)
        return JSONResponse({"detail": detail}, status, headers={n.replace("_", "-"): v for n, v in headers.items()})

    async def of_error(request: Request, error: Exception) -> JSONResponse:
        return problem(next(status for kind, status in _STATUS.items() if isinstance(error, kind)), str(error))

    async def unreadable(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return problem(422, "; ".join(_sentence(e) for e in error.errors()))

    async def overloaded(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, OverloadedError)
        wait = math.ceil(error.wait_seconds)
        return problem(429, f"too much is waiting, for about {wait} s; try again later", Retry_After=str(wait))

    async def late(request: Request, error: Exception) -> JSONResponse:
        return problem(504, "the scores took longer than serve.request_timeout_s; send fewer responses at once")

    for kind in _STATUS:
        app.add_exception_handler(kind, of_error)
    app.add_exception_handler(RequestValidationError, unreadable)
    app.add_exception_handler(OverloadedError, overloaded)
    app.add_exception_handler(TimeoutError, late)
    return app


def _sentence(problem: dict[str, Any]) -> str:
    """A pydantic error as "where: what"."""
    where = ".".join(str(part) for part in problem["loc"] if part != "body")
    what = str(problem["msg"]).removeprefix("Value error, ")
    return f"{where}: {what}" if where else what
