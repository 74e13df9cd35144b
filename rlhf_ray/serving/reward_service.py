"""The reward service: a plain asynchronous class. ``serving/http.py`` is its HTTP face, ``serving/app.py`` puts it on
Ray Serve.

    request ─► model by name ─► token ids ─► that model's batcher ─► readings ─► reply with the model's version
                    ▲
    reconfigure ────┘  a new version is loaded beside the old one; requests that began with the old one end with it
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rlhf_ray.config import ServedModelConfig
from rlhf_ray.errors import DataError, RlhfRayError
from rlhf_ray.models.loading import return_freed_memory
from rlhf_ray.roles.scorer import Reading, RewardScorer, sigmoid
from rlhf_ray.serving.args import RewardServiceArgs
from rlhf_ray.serving.batcher import Batcher
from rlhf_ray.serving.foreign import (
    Classified,
    ClassifyRequest,
    ClassifyResponse,
    GetRewardRequest,
    GetRewardResponse,
    RerankDocument,
    RerankRequest,
    RerankResponse,
    RerankResult,
    Usage,
)
from rlhf_ray.serving.meters import Meters
from rlhf_ray.serving.schemas import (
    CompareRequest,
    CompareResponse,
    Item,
    ModelCard,
    ModelList,
    Normalisation,
    ScoreRequest,
    ScoreResponse,
    Status,
)
from rlhf_ray.types import Rollout, Score

log = logging.getLogger("rlhf_ray.serving")


class UnknownModelError(Exception):
    """A request names a model that is not served."""


class TooManyItemsError(Exception):
    """A request holds more responses than one may."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedModel:
    """One version of one model. Its batcher forwards with it alone, so no batch mixes versions."""

    config: ServedModelConfig
    scorer: RewardScorer
    batcher: Batcher
    files: tuple[tuple[str, int, int], ...]
    """(name, bytes, time of change) of its weights when they were loaded."""
    update_error: str | None = None

    @property
    def version(self) -> str:
        """Name and content hash."""
        return self.scorer.version


class RewardService:
    """One replica: one or several models, each batched over all its callers.

    It is ready once it is constructed: every model is loaded and has run a forward.
    """

    def __init__(self, args: RewardServiceArgs, scorer: RewardScorer | None = None) -> None:
        """
        Args:
            scorer: a loaded one to use instead of loading ``args.model``.

        Raises:
            ModelError: a folder holds no reward model.
        """
        self._args = args
        self._meters = Meters()
        self._changing = asyncio.Lock()
        self._background: set[asyncio.Task[None]] = set()
        self._models: dict[str, ServedModel] = {}
        for name, config in args.served_models().items():
            given = scorer if name == args.name else None
            self._models[name] = self._served(name, config, given or self._load(config))

    @property
    def max_body_bytes(self) -> int:
        """Largest body of a request."""
        return int(self._args.max_body_mb * 1e6)

    async def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Serve the models of ``user_config["models"]`` from now on, without an interruption. Serve calls this.

        A model that cannot be loaded leaves its old version in service; the log and ``/v1/models`` say why. The model
        that requests get by default stays until another one takes its name.
        """
        wanted = {name: ServedModelConfig.model_validate(value) for name, value in user_config["models"].items()}
        async with self._changing:
            for name, config in wanted.items():
                await self._change(name, config)
            for name in set(self._models) - {self._args.name, *wanted}:
                self._retire(self._models.pop(name))

    async def score_rollout(self, rollout: Rollout) -> Score:
        """Score a rollout by its own token ids, with the first model; calls under way share forwards.

        Raises:
            ScorerError: it has no score.
        """
        model = self._model(None)
        (reading,) = await model.batcher.score([model.scorer.rollout_ids(rollout)])
        return reading.score

    async def score(self, request: ScoreRequest) -> ScoreResponse:
        """Score responses."""
        model = self._model(request.model)
        readings = await self._read(model, [partial(_item_ids, model, item) for item in request.all_items()])
        return ScoreResponse(
            scores=[reading.score.value for reading in readings],
            raw_scores=[reading.score.raw for reading in readings],
            model=model.version,
        )

    async def compare(self, request: CompareRequest) -> CompareResponse:
        """Which of two responses is preferred, and how surely (Bradley and Terry 1952)."""
        model = self._model(request.model)
        ids = [partial(model.scorer.text_ids, request.prompt, text) for text in (request.first, request.second)]
        first, second = (reading.score for reading in await self._read(model, ids))
        return CompareResponse(
            probability=sigmoid(first.raw - second.raw),
            scores=[first.value, second.value],
            raw_scores=[first.raw, second.raw],
            model=model.version,
        )

    async def get_reward(self, request: GetRewardRequest) -> GetRewardResponse:
        """OpenRLHF's remote reward model."""
        model = self._model(request.model)
        readings = await self._read(model, [partial(model.scorer.whole_text_ids, text) for text in request.texts()])
        scores = [reading.score.value for reading in readings]
        return GetRewardResponse(rewards=scores, scores=scores, extra_logs={}, model=model.version)

    async def classify(self, request: ClassifyRequest) -> ClassifyResponse:
        """vLLM's classes and probabilities."""
        model = self._model(request.model)
        ids = [partial(model.scorer.whole_text_ids, text) for text in request.texts()]
        tokens: list[int] = []
        readings = await self._read(model, ids, tokens)
        data = [_classified(index, model, reading, request.use_activation) for index, reading in enumerate(readings)]
        return ClassifyResponse(
            id=f"classify-{uuid.uuid4().hex}",
            created=int(time.time()),
            model=model.version,
            data=data,
            usage=Usage(prompt_tokens=sum(tokens), total_tokens=sum(tokens)),
        )

    async def rerank(self, request: RerankRequest) -> RerankResponse:
        """Documents by score, the best first."""
        model = self._model(request.model)
        texts = request.texts()
        tokens: list[int] = []
        readings = await self._read(model, [partial(model.scorer.text_ids, request.query, t) for t in texts], tokens)
        order = sorted(range(len(texts)), key=lambda index: -readings[index].score.value)
        return RerankResponse(
            id=f"rerank-{uuid.uuid4().hex}",
            model=model.version,
            results=[
                RerankResult(
                    index=index,
                    document=RerankDocument(text=texts[index]),
                    relevance_score=readings[index].score.value,
                )
                for index in order[: request.top_n or None]
            ],
            usage=Usage(prompt_tokens=sum(tokens), total_tokens=sum(tokens)),
        )

    async def models(self) -> ModelList:
        """The models, their versions, normalisations and limits."""
        return ModelList(data=[self._card(name, model) for name, model in self._models.items()])

    async def healthz(self) -> Status:
        """The process answers."""
        return Status(status="ok")

    async def readyz(self) -> Status:
        """The models are loaded and score."""
        return Status(status="ready")

    def count_refusal(self, status: int) -> None:
        """Tell the meters."""
        self._meters.refused(status)

    def _model(self, name: str | None) -> ServedModel:
        name = self._args.name if name is None else name
        if name not in self._models:
            raise UnknownModelError(f"no model is named {name!r} here; there are: {', '.join(self._models)}")
        return self._models[name]

    async def _read(
        self, model: ServedModel, encoders: Sequence[Callable[[], list[int]]], tokens: list[int] | None = None
    ) -> list[Reading]:
        """A reading of each response, in order.

        Args:
            encoders: one for each response; gives its token ids.
            tokens: is given the number of each.

        Raises:
            TooManyItemsError: more responses than ``max_items``.
            DataError: one cannot be read; with its number.
            OverloadedError: it would take too long to begin.
        """
        if len(encoders) > self._args.max_items:
            raise TooManyItemsError(
                f"the request has {len(encoders)} responses and {self._args.max_items} are allowed at once; "
                "send several requests, or raise serve.max_items"
            )
        encoded = []
        for number, encode in enumerate(encoders, start=1):
            try:
                ids = encode()
            except DataError as error:
                raise DataError(f"response {number}: {error}") from error
            if refusal := model.scorer.refusal(ids):
                raise DataError(f"response {number}: {refusal}")
            encoded.append(ids)
        if tokens is not None:
            tokens += map(len, encoded)
        async with asyncio.timeout(self._args.request_timeout_s):
            return await model.batcher.score(encoded, max_wait_seconds=self._args.max_queue_s)

    def _load(self, config: ServedModelConfig) -> RewardScorer:
        """A model that has run a forward: the first one of a process takes seconds.

        Raises:
            ModelError: the folder holds no such model.
            ScorerError: the forward gives no number.
        """
        args = self._args
        return RewardScorer(
            Path(config.folder),
            device=args.device,
            num_gpus=args.num_gpus,
            precision=args.precision,
            threads=args.threads,
            max_batch_size=args.max_batch_size,
            label=config.label,
            prompt_format=config.prompt_format,
            trust_remote_code=args.trust_remote_code,
            allow_pickle=args.allow_pickle,
        )

    def _served(self, name: str, config: ServedModelConfig, scorer: RewardScorer) -> ServedModel:
        scorer.score_ids([scorer.warm_up_ids()])
        batcher = Batcher(
            scorer.verdicts,
            max_batch_size=self._args.max_batch_size,
            max_batch_tokens=self._args.max_batch_tokens,
            wait_seconds=self._args.batch_wait_ms / 1000,
            on_forward=partial(self._meters.forward, name, scorer.version),
        )
        return ServedModel(config=config, scorer=scorer, batcher=batcher, files=_weight_files(config))

    async def _change(self, name: str, config: ServedModelConfig) -> None:
        """Take one model over in its new version, unless it is the one that is served already."""
        old = self._models.get(name)
        if old is not None and old.config == config and old.files == _weight_files(config):
            return
        try:
            scorer = await asyncio.to_thread(self._load, config)
            new = await asyncio.to_thread(self._served, name, config, scorer)
        except RlhfRayError as error:
            log.error("model %s stays as it is: %s", name, error)
            if old is None:
                raise
            self._models[name] = replace(old, update_error=str(error))
            return
        self._models[name] = new
        if old is not None:
            log.warning("model %s is %s from now on; it was %s", name, new.version, old.version)
            self._retire(old)

    def _retire(self, old: ServedModel) -> None:
        """Let what waits for it be answered, then give its memory back."""

        async def drain() -> None:
            await old.batcher.idle()
            await asyncio.to_thread(return_freed_memory)

        task = asyncio.create_task(drain())
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def _card(self, name: str, model: ServedModel) -> ModelCard:
        normalisation = model.scorer.normalisation
        return ModelCard(
            id=name,
            version=model.version,
            normalisation=Normalisation(mean=normalisation.mean, std=normalisation.std),
            labels=list(model.scorer.labels),
            prompt_format=model.scorer.prompt_format,
            max_tokens=model.scorer.max_tokens,
            max_items=self._args.max_items,
            update_error=model.update_error,
        )


def _item_ids(model: ServedModel, item: Item) -> list[int]:
    if item.messages is not None:
        return model.scorer.dialogue_ids([message.turn() for message in item.messages])
    if item.prompt_ids is not None:
        return model.scorer.token_ids(item.prompt_ids, item.response_ids or [])
    return model.scorer.text_ids(item.prompt or "", item.response or "")


def _classified(index: int, model: ServedModel, reading: Reading, use_activation: bool) -> Classified:
    values = model.scorer.probabilities(reading.logits) if use_activation else list(reading.logits)
    likeliest = max(range(len(values)), key=lambda label: values[label])
    return Classified(index=index, label=model.scorer.labels[likeliest], probs=values, num_classes=len(values))


def _weight_files(config: ServedModelConfig) -> tuple[tuple[str, int, int], ...]:
    """What tells that a folder's weights were replaced, without reading them."""
    found = sorted(path for path in Path(config.folder).glob("*") if path.suffix in (".safetensors", ".bin"))
    return tuple((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in found)
