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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rlhf_ray.config import ServedModelConfig
from rlhf_ray.errors import ConfigError, DataError, ScorerError
from rlhf_ray.models.loading import return_freed_memory
from rlhf_ray.models.reward import version_files
from rlhf_ray.roles.scorer import Reading, RewardScorer, sigmoid
from rlhf_ray.serving.args import RewardServiceArgs
from rlhf_ray.serving.batcher import Batcher, Forward
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

FAILURES_OF_THE_SICK = 3
"""Forwards in a row without a score after which a replica is replaced."""

LONGEST_FORWARD_SECONDS = 300.0
"""A forward that takes longer hangs, and its replica is replaced: well before ``hang_timeout_s`` ends a run."""

WARM_UP_TOKENS = 32
"""Of each row of the warm-up that the first expected waits are reckoned from."""


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
    """(name, bytes, time of change) of what it was loaded from."""
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
        self._configured = False
        self._encoding = ThreadPoolExecutor(max_workers=1, thread_name_prefix="encode")
        self._background: set[asyncio.Task[None]] = set()
        self._models: dict[str, ServedModel] = {}
        for name, config in args.served_models().items():
            given = scorer if name == args.name else None
            files = _files(config)
            self._models[name] = self._served(name, config, given or self._load(config), files)

    @property
    def max_body_bytes(self) -> int:
        """Largest body of a request."""
        return int(self._args.max_body_mb * 1e6)

    async def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Serve the models of ``user_config["models"]`` from now on, without an interruption. Serve calls this.

        A model that cannot be loaded leaves its old version in service; the log and ``/v1/models`` say why. The model
        that requests get by default stays until another one takes its name.

        Raises:
            RlhfRayError: at the first call of a process, which has nothing older to go on with. Later ones raise
                nothing: Serve would answer by ending the replica.
        """
        async with self._changing:
            try:
                wanted = _wanted(user_config)
            except ConfigError as error:
                if not self._configured:
                    raise
                log.error("%s", error)
                self._models = {n: replace(model, update_error=str(error)) for n, model in self._models.items()}
                return
            for name, config in wanted.items():
                await self._change(name, config)
            self._configured = True
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
        ids: list[Callable[[], list[int]]] = [
            partial(model.scorer.whole_text_ids, given) if isinstance(given, str) else partial(list, given)
            for given in request.inputs()
        ]
        tokens: list[int] = []
        readings = await self._read(model, ids, tokens)
        data = [
            _classified(index, model, reading, request.use_activation is not False)
            for index, reading in enumerate(readings)
        ]
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
        """The models are loaded and score.

        Raises:
            ScorerError: one no longer does.
        """
        await self.check_health()
        return Status(status="ready")

    async def check_health(self) -> None:
        """Serve calls this, and replaces a replica for which it raises.

        Raises:
            ScorerError: the last forwards of a model all failed, as after an error that a GPU does not get over, or one
                hangs.
        """
        for name, model in self._models.items():
            if (seconds := model.batcher.running_seconds()) > LONGEST_FORWARD_SECONDS:
                raise ScorerError(f"a forward of model {name} has been under way for {seconds:.0f} s")
            if model.batcher.failures >= FAILURES_OF_THE_SICK:
                raise ScorerError(f"model {name} gave no score in {model.batcher.failures} forwards in a row")

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
        model.batcher.refuse_if_overloaded(self._args.max_queue_s)
        async with asyncio.timeout(self._args.request_timeout_s):
            # In a thread: a long text takes a while, and the others are to be answered meanwhile.
            encode = partial(_encode_all, model, encoders)
            encoded = await asyncio.get_running_loop().run_in_executor(self._encoding, encode)
            if tokens is not None:
                tokens += map(len, encoded)
            return await model.batcher.score(encoded)

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
            max_tokens=args.max_tokens,
            trust_remote_code=args.trust_remote_code,
            allow_pickle=args.allow_pickle,
        )

    def _served(
        self, name: str, config: ServedModelConfig, scorer: RewardScorer, files: tuple[tuple[str, int, int], ...]
    ) -> ServedModel:
        scorer.score_ids([scorer.warm_up_ids(1)])  # the first forward of a process is not like those that follow
        rows, length = self._args.max_batch_size, min(WARM_UP_TOKENS, scorer.max_tokens)
        began = time.monotonic()
        scorer.score_ids([scorer.warm_up_ids(length)] * rows)
        seconds, tokens = time.monotonic() - began, rows * length
        warm_up = Forward(
            rows=rows, scored=rows, tokens=tokens, padded_tokens=tokens, seconds=seconds, waited_seconds=0.0
        )
        batcher = Batcher(
            scorer.verdicts,
            max_batch_size=self._args.max_batch_size,
            max_batch_tokens=self._args.max_batch_tokens,
            wait_seconds=self._args.batch_wait_ms / 1000,
            packs=scorer.packs,
            warm_up=warm_up,
            on_forward=partial(self._meters.forward, name, scorer.version),
        )
        return ServedModel(config=config, scorer=scorer, batcher=batcher, files=files)

    async def _change(self, name: str, config: ServedModelConfig) -> None:
        """Take one model over in its new version, unless it is the one that is served already."""
        old = self._models.get(name)
        try:
            files = _files(config)
            if old is not None and old.config == config and old.files == files:
                self._models[name] = replace(old, update_error=None)
                return
            scorer = await asyncio.to_thread(self._load, config)
            new = await asyncio.to_thread(self._served, name, config, scorer, files)
        except Exception as error:
            if not self._configured:
                raise
            log.error("model %s stays as it is: %s: %s", name, type(error).__name__, error)
            if old is not None:
                self._models[name] = replace(old, update_error=str(error))
            return
        self._models[name] = new
        if old is not None:
            log.warning("model %s is %s from now on; it was %s", name, new.version, old.version)
            self._retire(old)

    def _retire(self, old: ServedModel) -> None:
        """Let what waits for it be answered, then give its memory back."""

        task = asyncio.create_task(_drain(old))
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


async def _drain(old: ServedModel) -> None:
    """Wait until nothing waits for it, then give its memory back: nobody else holds it."""
    await old.batcher.idle()
    del old
    await asyncio.to_thread(return_freed_memory)


def _encode_all(model: ServedModel, encoders: Sequence[Callable[[], list[int]]]) -> list[list[int]]:
    """Raises:
    DataError: a response cannot be read; with its number.
    """
    encoded = []
    for number, encode in enumerate(encoders, start=1):
        try:
            ids = encode()
        except DataError as error:
            raise DataError(f"response {number}: {error}") from error
        if refusal := model.scorer.refusal(ids):
            raise DataError(f"response {number}: {refusal}")
        encoded.append(ids)
    return encoded


def _wanted(user_config: Mapping[str, Any]) -> dict[str, ServedModelConfig]:
    """Raises:
    ConfigError: it is not of the form ``{"models": {name: {"folder": ...}}}``.
    """
    try:
        return {name: ServedModelConfig.model_validate(value) for name, value in user_config["models"].items()}
    except (KeyError, TypeError, AttributeError, ValidationError) as error:
        cause = " ".join(str(error).split())[:300]
        raise ConfigError(f"user_config must be {{models: {{NAME: {{folder: DIR}}}}}}: {cause}") from error


def _files(config: ServedModelConfig) -> tuple[tuple[str, int, int], ...]:
    """What tells that a folder's content was replaced, without reading it."""
    stats = [(path.name, path.stat()) for path in version_files(config.folder)]
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)
