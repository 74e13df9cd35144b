"""Fixtures that more than one room's tests use."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import settings

from rlhf_ray.config import SPIN_COUNT

# A machine that is busy with something else is no failure of ours.
settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")

# As the command does, and before torch is loaded: threads that spin for long take the time of those that work.
os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)

# Started in the background of a shell, the tests and every program that they start would ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

TINY_SENTENCES = (
    "The train leaves the station before the sun is up.",
    "A good day begins with bread, butter and a quiet walk.",
    "She reads the letter twice and puts it back on the table.",
    "Rain fell on the old bridge while the children were asleep.",
    "Nobody knew why the baker smiled at the empty street.",
)
TINY_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``make_tiny_model`` makes."""
    folder = tmp_path_factory.mktemp("tiny_model")
    make_tiny_model(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_reward_dir(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """What ``make_tiny_reward`` makes."""
    folder = tmp_path_factory.mktemp("models") / "reward"
    make_tiny_reward(folder, tiny_model_dir)
    return folder


def make_tiny_model(folder: Path) -> None:
    """A random two-layer Llama with tied embeddings and a byte-level tokenizer, as a Hugging Face folder.

    320 tokens, hidden size 64, 2 heads of 32 (vLLM on CPU has no smaller), 512 positions; EOS = padding = ``<|end|>``.
    The weights are large enough (σ = 0.3) for next-token distributions with a shape: entropy well under log 320.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        TINY_SENTENCES,
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=["<|end|>", "<|user|>", "<|assistant|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.chat_template = TINY_CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.3,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)


def make_tiny_reward(folder: Path, model: Path) -> None:
    """A random reward model on the tiny model's backbone, with its tokenizer, settings and score normalisation."""
    import torch

    from rlhf_ray.models.loading import load_tokenizer
    from rlhf_ray.models.reward import ScoreNormalisation
    from rlhf_ray.roles.reward_trainer import new_reward_model
    from rlhf_ray.roles.scorer import RewardSettings

    tokenizer = load_tokenizer(model, need_chat_template=False)
    reward_model = new_reward_model(model, tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.nn.init.normal_(reward_model.score.weight)
    reward_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    RewardSettings(prompt_format="chat").save(folder)
    ScoreNormalisation(mean=0.5, std=2.0).save(folder)


@pytest.fixture
def tiny_run(tiny_model_dir: Path, tmp_path: Path) -> Callable[[str], dict[str, Any]]:
    """What ``make_tiny_run`` makes of a name."""
    return lambda name: make_tiny_run(tmp_path, tiny_model_dir, name=name)


def make_tiny_run(root: Path, model: Path, *, name: str) -> dict[str, Any]:
    """What the configuration of a run below ``root`` begins with; writes its few prompts there too."""
    for prompts, number in (("train", 11), ("held_out", 3)):
        lines = [json.dumps({"prompt": f"The {prompts} number {i} leaves"}) + "\n" for i in range(number)]
        (root / f"{prompts}.jsonl").write_text("".join(lines))
    return {
        "name": name,
        "output_dir": str(root / "runs"),
        "model": {"path": str(model)},
        "prompts": {
            "path": str(root / "train.jsonl"),
            "eval_path": str(root / "held_out.jsonl"),
            "max_tokens": 64,
        },
    }


@pytest.fixture(scope="module")
def ray_temp_dir() -> Iterator[Path]:
    """Ray's folder for one test module: short, since the path of a Unix socket must be."""
    folder = Path(tempfile.mkdtemp(prefix="r_", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    """Gives a port of 127.0.0.1 that nobody listens at."""

    def find() -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
        return port

    return find


@pytest.fixture(scope="session")
def descendants() -> Callable[..., list[tuple[psutil.Process, str]]]:
    """All processes below one (by default this one), each with its name and command line; those that end are left out.

    Ray titles a worker ``ray::CLASS.method``.
    """

    def find(of: int | None = None) -> list[tuple[psutil.Process, str]]:
        found = []
        for process in psutil.Process(of).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                found.append((process, " ".join([process.name(), *process.cmdline()])))
        return found

    return find


@pytest.fixture(scope="session")
def largest_file() -> Callable[[int], AbstractContextManager[None]]:
    """A context in which the kernel refuses to let a file grow beyond so many bytes: what a full disk is like."""

    @contextlib.contextmanager
    def limited(size: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


@pytest.fixture
def score_services() -> Iterator[Callable[[], ScoreService]]:
    """Starts reward services on free loopback ports; they end with the test."""
    started: list[ScoreService] = []

    def start() -> ScoreService:
        started.append(ScoreService())
        started[-1].start()
        return started[-1]

    yield start
    for service in started:
        service.stop()


class ScoreService:
    """A reward service that scores a response by its number of tokens, and misbehaves when told to."""

    def __init__(self) -> None:
        self.ready = True
        self.asked: list[dict[str, Any]] = []
        """The body of every request for a score, and under "key" what it showed as authorisation."""
        self.asked_at: list[float] = []
        self.looks = 0
        """Times that somebody asked whether it is ready."""
        self.replies: list[Any] = []
        """What to answer to the next requests instead of a score: a response, or the seconds to say nothing for."""
        self._port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Listen; after ``stop`` at the same port as before."""
        import uvicorn

        options: dict[str, Any] = {"log_level": "error", "lifespan": "off", "ws": "none"}
        self._server = uvicorn.Server(uvicorn.Config(self._app(), host="127.0.0.1", port=self._port, **options))
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive(), "the service did not start"
            time.sleep(0.01)
        self._port = self._server.servers[0].sockets[0].getsockname()[1]

    def stop(self) -> None:
        """Refuse connections from now on."""
        self._server.should_exit = self._server.force_exit = True
        self._thread.join()

    def _app(self) -> Any:
        from fastapi import FastAPI, Request, Response

        app = FastAPI()

        # Without type hints: under `from __future__ import annotations` FastAPI would look for them in the module.
        async def score(request):  # type: ignore[no-untyped-def]
            body = await request.json()
            self.asked.append({**body, "key": request.headers.get("authorization")})
            self.asked_at.append(time.monotonic())
            reply = self.replies.pop(0) if self.replies else None
            if isinstance(reply, float):
                await asyncio.sleep(reply)
            elif reply is not None:
                return reply
            raw = [float(len(item["response_ids"])) for item in body["items"]]
            return {"scores": [x / 10 for x in raw], "raw_scores": raw, "model": "length@1"}

        async def readyz():  # type: ignore[no-untyped-def]
            self.looks += 1
            return Response(status_code=200 if self.ready else 503)

        score.__annotations__["request"] = Request
        app.post("/v1/score", response_model=None)(score)
        app.get("/readyz", response_model=None)(readyz)
        return app
