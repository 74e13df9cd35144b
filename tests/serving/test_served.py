"""The reward model on a real Ray Serve, spoken to by handle and over HTTP."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import ray
import yaml
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import AutoscalingConfig

from rlhf_ray.actors.scorer import RayScorers, ServedScorer, served_pool
from rlhf_ray.config import RunConfig
from rlhf_ray.errors import ConfigError, ResourceError, ScorerError
from rlhf_ray.pipeline.weighted_scorer import WeightedScorer
from rlhf_ray.roles.scorer import RewardScorer
from rlhf_ray.stages.serve import ServedReward, curl_line, served_reward, sole_owner, start_service, stop_service
from rlhf_ray.types import Prompt, Rollout

pytestmark = [pytest.mark.ray, pytest.mark.serve, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]


def a_config(**section: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"path": "unused"},
            "prompts": {"path": "unused", "eval_path": "unused"},
            "serve": {"port": 0, "num_cpus": 0.5, "precision": "float32", "threads": 1, "batch_wait_ms": 2} | section,
        }
    )


@pytest.fixture(scope="module")
def cluster(ray_temp_dir: Path) -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=str(ray_temp_dir))
    yield
    serve.shutdown()
    ray.shutdown()


@pytest.fixture(scope="module")
def served(cluster: None, tiny_reward_dir: Path) -> Iterator[ServedReward]:
    with served_reward(a_config(), tiny_reward_dir) as served:
        yield served


def texts(n: int) -> list[tuple[str, str]]:
    return [(f"The train number {i}", " was late" * (1 + i % 7) + ".") for i in range(n)]


def wait_until_ready(url: str) -> None:
    """``serve run --non-blocking`` returns before its application runs."""
    end = time.monotonic() + 200
    while httpx.get(f"{url}/readyz", timeout=60).status_code != 200:
        assert time.monotonic() < end, serve.status()
        time.sleep(0.5)


def rollout_of(scorer: RewardScorer, prompt: str, response: str) -> Rollout:
    """As a generator would give it: the prompt's own ids, the response's own ids, cut before EOS."""
    response_ids = tuple(scorer.tokenizer(response, add_special_tokens=False)["input_ids"])
    whole = scorer.text_ids(prompt, response)
    return Rollout(
        prompt=Prompt(prompt_id=0, text=prompt, token_ids=tuple(whole[: -1 - len(response_ids)]), seed=0),
        response_ids=response_ids,
        rollout_logprobs=(0.0,) * len(response_ids),
        policy_versions=(0,) * len(response_ids),
        finish_reason="length",
        text=response,
    )


async def test_http_handle_and_process_give_the_same_scores(served: ServedReward, scorer: RewardScorer) -> None:
    pairs = texts(20)
    expected = [score.raw for score in scorer.score_texts(*zip(*pairs, strict=True))]
    items = [{"prompt": prompt, "response": response} for prompt, response in pairs]
    async with httpx.AsyncClient() as client:
        reply = (await client.post(f"{served.url}/v1/score", json={"items": items}, timeout=60)).json()
    client_of_handle = ServedScorer(served.handle)
    refs = [ray.put(rollout_of(scorer, prompt, response)) for prompt, response in pairs]
    by_handle = await asyncio.gather(*map(client_of_handle.score, refs))
    assert max(expected) - min(expected) > 0.1
    assert reply["raw_scores"] == pytest.approx(expected, abs=1e-5)
    assert [score.raw for score in by_handle] == pytest.approx(expected, abs=1e-5)
    assert [score.value for score in by_handle] == pytest.approx(reply["scores"], abs=1e-5)
    assert {score.reward_version for score in by_handle} == {reply["model"]} == {scorer.version}


def test_the_curl_line_works_as_it_is_printed(served: ServedReward) -> None:
    if shutil.which("curl") is None:
        pytest.skip("no curl on this machine")
    reply = subprocess.run(curl_line(served.url), shell=True, capture_output=True, text=True, check=True).stdout
    assert len(yaml.safe_load(reply)["scores"]) == 2


def test_health_models_and_documentation_answer(served: ServedReward, scorer: RewardScorer) -> None:
    assert httpx.get(f"{served.url}/healthz").json() == {"status": "ok"}
    assert httpx.get(f"{served.url}/readyz").json() == {"status": "ready"}
    assert httpx.get(f"{served.url}/v1/models").json()["data"][0]["version"] == scorer.version
    assert "/v1/score" in httpx.get(f"{served.url}/openapi.json").json()["paths"]
    assert httpx.get(f"{served.url}/docs").status_code == 200


def test_bad_requests_are_told_what_is_wrong(served: ServedReward) -> None:
    unknown = httpx.post(f"{served.url}/v1/score", json={"prompt": "p", "answers": ["a"]})
    assert unknown.status_code == 422
    assert "answers: Extra inputs are not permitted" in unknown.json()["detail"]
    many = httpx.post(f"{served.url}/v1/score", json={"prompt": "p", "responses": ["a"] * 65})
    assert many.status_code == 413
    assert "65 responses and 64 are allowed" in many.json()["detail"]


async def test_a_rollout_that_cannot_be_scored_is_an_error_with_its_cause(
    served: ServedReward, scorer: RewardScorer
) -> None:
    rollout = replace(rollout_of(scorer, "p", "a"), response_ids=(5,) * 600)
    with pytest.raises(ScorerError, match=r"the reward model reward@.* reads 512; lower prompts.max_tokens"):
        await ServedScorer(served.handle).score(ray.put(rollout))


class WatchedHandle:
    """A handle that keeps what its calls failed with."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self.score_rollout = self
        self.failures: list[Exception] = []

    async def remote(self, rollout: Any) -> Any:
        try:
            return await self._handle.score_rollout.remote(rollout)
        except Exception as error:
            self.failures.append(error)
            raise


async def test_a_replica_killed_under_load_loses_no_score(
    served: ServedReward, scorer: RewardScorer, descendants: Callable[..., list[tuple[psutil.Process, str]]]
) -> None:
    pairs = [(prompt, response * 9) for prompt, response in texts(400)]
    expected = [score.raw for score in scorer.score_texts(*zip(*pairs, strict=True))]
    handle = WatchedHandle(served.handle)
    pool = served_pool(handle, name="reward", max_prompt_tries=3)
    rollouts = [rollout_of(scorer, prompt, response) for prompt, response in pairs]
    async with RayScorers(WeightedScorer({"reward": (1.0, pool)}), [pool], []).running():
        scoring = [asyncio.create_task(pool.score(rollout)) for rollout in rollouts]
        answered = asyncio.as_completed(scoring)
        for _ in range(64):  # by then many more have reached it
            await next(answered)
        (process,) = (process for process, title in descendants() if title.startswith("ray::ServeReplica"))
        process.suspend()
        await asyncio.sleep(0.5)  # so that calls are with it when it dies
        process.kill()
        scores = await asyncio.gather(*scoring)
    assert [score.raw for score in scores] == pytest.approx(expected, abs=1e-5)
    # These calls the replica had taken when it died; what waited at the caller goes to the next one without a word.
    died_with_it = [error for error in handle.failures if isinstance(error, RayActorError)]
    assert died_with_it


async def wait_for_replicas(name: str, count: int) -> None:
    """Until Serve has that many of an application, all of them running."""
    end = time.monotonic() + 120
    while (states := serve.status().applications[name].deployments[name].replica_states) != {"RUNNING": count}:
        assert time.monotonic() < end, states
        await asyncio.sleep(0.5)


async def test_a_replica_is_added_under_load_and_goes_when_it_is_over(
    served: ServedReward, tiny_reward_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # How many, and from what load on, is ours; Serve's delays of half a minute and ten minutes are shortened.
    quick = partial(AutoscalingConfig, upscale_delay_s=1, downscale_delay_s=3, look_back_period_s=11)
    monkeypatch.setattr("rlhf_ray.serving.app.AutoscalingConfig", quick)
    body = {"prompt": "The train", "responses": [" was late" * 50] * 4}
    answers: list[httpx.Response] = []
    over = asyncio.Event()

    async def keep_asking(client: httpx.AsyncClient) -> None:
        while not over.is_set():
            answers.append(await client.post(f"{elastic.url}/v1/score", json=body, timeout=120))

    with served_reward(a_config(name="elastic", max_replicas=2, max_batch_size=1), tiny_reward_dir) as elastic:
        await wait_for_replicas("elastic", 1)
        async with httpx.AsyncClient() as client:
            asking = [asyncio.create_task(keep_asking(client)) for _ in range(8)]
            await wait_for_replicas("elastic", 2)
            over.set()
            await asyncio.gather(*asking)
        assert {answer.status_code for answer in answers} == {200}
        assert {len(answer.json()["scores"]) for answer in answers} == {4}
        await wait_for_replicas("elastic", 1)


def test_a_run_takes_over_the_service_that_its_killed_process_has_left(
    cluster: None, served: ServedReward, tiny_reward_dir: Path, tmp_path: Path
) -> None:
    config = a_config(name="left").model_dump_json()
    owner = (
        "import os, ray, signal, sys; from pathlib import Path; from rlhf_ray.config import RunConfig\n"
        "from rlhf_ray.stages.serve import sole_owner, start_service\n"
        "ray.init(address=sys.argv[1], log_to_driver=False)\n"
        "with sole_owner(Path(sys.argv[2]), 'left'):\n"
        "    served = start_service(RunConfig.model_validate_json(sys.argv[3]), model_folder=Path(sys.argv[4]))\n"
        "    print(served.url, flush=True)\n"
        "    sys.stdin.read()\n"
    )
    address = ray.get_runtime_context().gcs_address
    process = subprocess.Popen(
        [sys.executable, "-c", owner, address, str(tmp_path), config, str(tiny_reward_dir)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    for folder in (tmp_path, tmp_path / "another run"):  # of one that lives, nothing is taken
        with sole_owner(folder, "left"), pytest.raises(ConfigError, match=r"serve.name = left is an application"):
            start_service(a_config(name="left"), model_folder=tiny_reward_dir)
    assert httpx.get(f"{url}/readyz").status_code == 200
    process.kill()
    process.communicate()
    with sole_owner(tmp_path, "left"), served_reward(a_config(name="left"), tiny_reward_dir) as mine:
        assert httpx.get(f"{mine.url}/readyz").status_code == 200
    assert "left" not in serve.status().applications
    assert list((tmp_path / "control").iterdir()) == []


def test_a_name_or_a_port_that_is_taken_is_refused(served: ServedReward, tiny_reward_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"serve.name = reward is an application on this cluster already"):
        start_service(a_config(), model_folder=tiny_reward_dir)
    with pytest.raises(ConfigError, match=r"serve.port = 1, and Serve listens on .* already"):
        start_service(a_config(name="other", port=1), model_folder=tiny_reward_dir)
    assert httpx.get(f"{served.url}/readyz").status_code == 200


def test_more_replicas_than_the_cluster_holds_are_refused(served: ServedReward, tiny_reward_dir: Path) -> None:
    with pytest.raises(ResourceError, match=r"serve.num_cpus"):
        start_service(a_config(name="other", replicas=100), model_folder=tiny_reward_dir)


def test_a_second_application_has_its_own_route_and_goes_alone(served: ServedReward, tiny_reward_dir: Path) -> None:
    with served_reward(a_config(name="second"), tiny_reward_dir) as second:
        assert second.url == f"{served.url}/second"
        assert httpx.get(f"{second.url}/v1/models").json()["data"][0]["id"] == "second"
        assert "/second/docs/files/swagger-ui.css" in httpx.get(f"{second.url}/docs").text
        assert httpx.get(f"{second.url}/docs/files/swagger-ui.css").status_code == 200
    assert httpx.get(f"{second.url}/v1/models").status_code == 404
    assert httpx.get(f"{served.url}/v1/models").json()["data"][0]["id"] == "reward"


def test_a_folder_without_a_model_fails_with_the_cause_and_leaves_nothing(served: ServedReward, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ScorerError, match=r"(?s)did not start.*(no reward model can be loaded|has 2 labels)"):
        start_service(a_config(name="broken"), model_folder=tmp_path)
    assert "broken" not in serve.status().applications


def test_the_shipped_config_file_starts_the_same_service(
    served: ServedReward, tiny_reward_dir: Path, tmp_path: Path
) -> None:
    content = yaml.safe_load((ROOT / "deployments" / "reward_service.yaml").read_text())
    del content["http_options"]  # Serve runs already and its address is fixed
    content["applications"][0] |= {"name": "by_file", "route_prefix": "/by_file"}
    content["applications"][0]["args"] |= {"model": str(tiny_reward_dir), "num_cpus": 0.5, "precision": "float32"}
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump(content))
    command = [str(Path(sys.executable).with_name("serve")), "run", "--non-blocking", str(file)]
    env = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    result = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    try:
        request = {"prompt": "The train", "responses": [" was late."]}
        wait_until_ready(f"{served.url}/by_file")
        replies = [httpx.post(f"{served.url}{at}/v1/score", json=request, timeout=60).json() for at in ("", "/by_file")]
        assert replies[1]["scores"] == pytest.approx(replies[0]["scores"], abs=1e-5)
    finally:
        stop_service("by_file")


def test_a_port_that_is_taken_is_refused_by_its_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("rlhf_ray.stages.serve.check_resources", lambda needs: None)
    monkeypatch.setattr("rlhf_ray.stages.serve._get_global_client", lambda raise_if_no_controller_running: None)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"serve.port = {port} on serve.host = 127.0.0.1 cannot be had"):
            start_service(a_config(port=port), model_folder=tmp_path)


def test_serving_until_ctrl_c_prints_how_to_call_it_and_leaves_no_process(
    tiny_reward_dir: Path, ray_temp_dir: Path, descendants: Callable[..., list[tuple[psutil.Process, str]]]
) -> None:
    program = f"""
from pathlib import Path
from rlhf_ray.cluster import job_is_alive
from rlhf_ray.config import RunConfig
from rlhf_ray.stages.serve import serve_forever
config = RunConfig.model_validate({a_config().model_dump(mode="json")!r})
serve_forever(config.serve, Path({str(tiny_reward_dir)!r}), announce=lambda line: print(line, flush=True))
"""
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {
        "RAY_TMPDIR": str(ray_temp_dir)
    }
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            first, try_it, last = (process.stdout.readline() for _ in range(3))
            url = first.split(" answers at ")[1].split(" ")[0]
            assert httpx.get(f"{url}/readyz").status_code == 200
            assert f"curl -s {url}/v1/score" in try_it
            assert last == "Ctrl-C ends it\n"
            started, titles = zip(*descendants(process.pid), strict=True)
            assert any("ServeReplica" in title for title in titles)
            process.send_signal(signal.SIGINT)
            assert process.stdout.read() == "stopping\n"
            assert process.wait(60) == 0
        finally:
            process.kill()
    _, left = psutil.wait_procs(started, timeout=30)
    assert left == []


def test_the_command_serves_a_folder_with_tls_and_a_key_and_says_how_to_call_it(
    tiny_reward_dir: Path, ray_temp_dir: Path, tmp_path: Path
) -> None:
    cert, key = tmp_path / "tls.crt", tmp_path / "tls.key"
    make = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    subprocess.run([*make.split(), "-out", str(cert), "-keyout", str(key)], check=True, capture_output=True)
    secret = "a-key-of-some-length"
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {
        "RAY_TMPDIR": str(ray_temp_dir),
        "RLHF_RAY_API_KEYS": secret,
    }
    settings = ["port=0", "num_cpus=0.5", "precision=float32", f"tls_cert={cert}", f"tls_key={key}"]
    command = [str(Path(sys.executable).with_name("rlhf-ray")), "serve", "--model", str(tiny_reward_dir)]
    command += [part for setting in settings for part in ("--set", f"serve.{setting}")]
    with subprocess.Popen(
        command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            assert process.stdout is not None
            printed = ""
            while "Ctrl-C ends it" not in printed:
                line = process.stdout.readline()
                assert line, printed
                printed += line
            told = " ".join(printed.split())
            url = told.split(" answers at ")[1].split(" ")[0]
            assert url.startswith("https://127.0.0.1:")
            assert "Authorization: Bearer $KEY" in told
            assert secret not in printed
            with httpx.Client(verify=ssl.create_default_context(cafile=str(cert)), timeout=60) as client:
                request = {"prompt": "p", "responses": ["a"]}
                assert client.post(f"{url}/v1/score", json=request).status_code == 401
                reply = client.post(f"{url}/v1/score", json=request, headers={"Authorization": f"Bearer {secret}"})
                assert reply.status_code == 200
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0
        finally:
            process.kill()


def test_a_service_that_names_nothing_to_serve_or_a_wrong_key_is_refused() -> None:
    rlhf_ray = str(Path(sys.executable).with_name("rlhf-ray"))
    for arguments, sentence in (
        ([], "--model DIR"),
        (["--model", "none"], "no reward model can be read from none"),
        (["--model", "none", "--set", "serve.prot=1"], "serve.prot"),
        (["--model", "none", "--set", "ppo.steps=1"], "only keys of serve can be set"),
        (["--model", "none", "--set", "serve.tls_cert=a"], "serve.tls_cert and serve.tls_key go together"),
    ):
        done = subprocess.run([rlhf_ray, "serve", *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 2, done
        assert sentence in " ".join((done.stdout + done.stderr).split())
        assert "Traceback" not in done.stderr
