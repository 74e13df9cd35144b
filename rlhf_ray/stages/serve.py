"""The reward model as a Ray Serve application: started for a run, or kept up until Ctrl-C."""

from __future__ import annotations

import contextlib
import json
import logging
import shlex
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.config import ProxyLocation
from ray.serve.context import _get_global_client
from ray.serve.schema import ApplicationStatus, LoggingConfig

from rlhf_ray.cluster import WAIT_NOTICE_SECONDS, Need, check_resources, connected, job_is_alive
from rlhf_ray.config import Device, RunConfig, ServeConfig, ServedModelConfig
from rlhf_ray.errors import ConfigError, ScorerError
from rlhf_ray.metrics import read_json, write_json
from rlhf_ray.models.reward import check_reward_folder
from rlhf_ray.serving.app import application
from rlhf_ray.serving.args import RewardServiceArgs
from rlhf_ray.serving.keys import read_keys

log = logging.getLogger("rlhf_ray.serve")

START_LIMIT_SECONDS = 600.0
"""A service that is not up by then has failed."""

HANG_SECONDS = 10.0
"""Longer than ``serve.request_timeout_s`` by this much, Serve gives a request up that no replica has answered."""

SERVICE_FILE = Path("control") / "service.json"
"""In a run's folder while the run serves its reward model: which application, and on which cluster."""

FAILED_START = "A replica failed to start with exception"
"""Serve's word on a replica before it tries once more."""

OF_A_DEATH = ("ActorDiedError", "ActorUnavailableError")
"""In that word: the replica was killed, or went with its node, and the next one may start well. Any other error comes
again with the same model."""

HEARSAY_SECONDS = 5.0
"""Ray knows of a driver's end by then."""

_POLL_SECONDS = 0.25


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedReward:
    """A reward model that answers."""

    name: str
    """Of the Serve application; what ``stop_service`` is given."""
    handle: Any
    """Deployment handle with ``score_rollout``."""
    url: str
    """Base URL: scores are at ``url``/v1/score."""


def start_service(config: RunConfig, *, model_folder: Path) -> ServedReward:
    """Start the application on the Ray cluster that this process is connected to; returns once it answers over HTTP.

    On a cluster where Serve runs already its address stands as it is. The application is mounted at /, or at /NAME
    where another one has / already.

    Raises:
        ConfigError: the folder is missing, the API keys cannot be read, the port or the name is taken, or Serve listens
            elsewhere already.
        ResourceError: the cluster can never hold the replicas.
        ScorerError: the service failed to start, with Serve's word on why.
    """
    keys = read_keys(config.serve.api_keys_file)
    section = config.serve.model_copy(update={"max_batch_tokens": 1}) if config.deterministic else config.serve
    return _start(section, model_folder=model_folder, device=config.device, key_digests=keys)


def _start(section: ServeConfig, *, model_folder: Path, device: Device, key_digests: frozenset[str]) -> ServedReward:
    if not model_folder.is_dir():
        raise ConfigError(
            f"{model_folder} is no folder; run `rlhf-ray reward` first, or name a reward model in serve.model"
        )
    check_resources(
        [Need(section="serve", count=section.replicas, num_cpus=section.num_cpus, num_gpus=section.num_gpus)]
    )
    target = application(RewardServiceArgs.of_section(section, model_folder, device), key_digests)
    address, taken_routes = _ensure_serve(section, asks_for_key=bool(key_digests))
    route = "/" if "/" not in taken_routes else f"/{section.name}"
    url = f"{address}{route}".rstrip("/")
    try:
        (handle,) = serve.run_many(
            [serve.RunTarget(target, name=section.name, route_prefix=route)], wait_for_applications_running=False
        )
        _wait_until_running(section.name)
        _wait_until_answering(url)
    except BaseException:  # Ctrl-C too: a half-started application must not stay behind
        stop_service(section.name)
        raise
    return ServedReward(name=section.name, handle=handle, url=url)


@contextlib.contextmanager
def served_reward(config: RunConfig, model_folder: Path) -> Iterator[ServedReward]:
    """A service started for the block and deleted with it."""
    served = start_service(config, model_folder=model_folder)
    try:
        yield served
    finally:
        stop_service(served.name)


@contextlib.contextmanager
def sole_owner(run_dir: Path, name: str) -> Iterator[None]:
    """This process owns the application for the block, and leaves a note of it in the run's folder.

    A process that was killed leaves the note, and on a cluster that outlives it the application too: whoever goes on
    with the run finds both, and deletes the application first. While the one that left it lives, nothing is touched:
    the name is taken.
    """
    note, context = run_dir / SERVICE_FILE, ray.get_runtime_context()
    mine = {"name": name, "cluster": context.get_session_name(), "job": context.get_job_id()}
    left = read_json(note)
    if left.get("name") == name and left.get("cluster") == mine["cluster"]:
        if _outlives(left["job"]):
            yield
            return
        log.warning("the reward service %s is left from this run's last process, which was killed; deleting it", name)
        stop_service(name)
    note.parent.mkdir(parents=True, exist_ok=True)
    write_json(note, mine)
    try:
        yield
    finally:
        note.unlink(missing_ok=True)


def _outlives(job_id: str) -> bool:
    """Whether a driver lives, and not only because Ray has not heard of its end yet."""
    end = time.monotonic() + HEARSAY_SECONDS
    while alive := job_is_alive(job_id):
        if time.monotonic() > end:
            break
        time.sleep(_POLL_SECONDS)
    return alive


def stop_service(name: str) -> None:
    """Delete the application; Serve itself and other applications stay. Harmless when it is gone already.

    One that is slow to go is left to Serve: the outcome of what it was used for must not be hidden behind it.
    """
    try:
        serve.delete(name)
    except TimeoutError as error:
        log.warning("the reward service %s is still being deleted: %s", name, error)


@dataclass(frozen=True, kw_only=True, slots=True)
class Replicas:
    """What Serve says of an application's replicas."""

    states: Mapping[str, int] = field(default_factory=dict)
    """Serve's word for a state, such as RUNNING → how many are in it."""
    message: str = ""

    @property
    def are_coming(self) -> bool:
        """Nobody is up yet, and Serve knows of nobody that failed to start: they wait for a place, or load."""
        return bool(self.states) and "RUNNING" not in self.states and FAILED_START not in self.message


def replicas_of(name: str) -> Replicas:
    """Ask Serve."""
    application = serve.status().applications.get(name)
    states: Counter[str] = Counter()
    for deployment in application.deployments.values() if application else ():
        states.update({str(state): n for state, n in deployment.replica_states.items()})
    return Replicas(states=states, message=_message(application))


def serve_forever(
    section: ServeConfig, model_folder: Path, *, device: Device = "auto", announce: Callable[[str], None] = log.info
) -> None:
    """Serve until Ctrl-C, on the cluster at hand or else a local one, and leave nothing of it behind.

    Args:
        announce: told the URL and a command line to try it with.
    """
    check_models(section, model_folder)
    keys = read_keys(section.api_keys_file)
    with connected():
        served = _start(section, model_folder=model_folder, device=device, key_digests=keys)
        try:
            announce(f"reward model {served.name} answers at {served.url} (documentation: {served.url}/docs)")
            announce(f"try: {curl_line(served.url, with_key=bool(keys), certificate=section.tls_cert)}")
            announce("Ctrl-C ends it")
            with contextlib.suppress(KeyboardInterrupt):
                threading.Event().wait()
            announce("stopping")
        finally:
            stop_service(served.name)


def check_models(section: ServeConfig, model_folder: Path) -> None:
    """Refuse, before anything is started, a folder that no replica could load.

    Raises:
        ModelError: naming the folder and what is wrong with it.
    """
    first = ServedModelConfig(folder=str(model_folder), label=section.label)
    for model in (first, *section.models.values()):
        check_reward_folder(
            Path(model.folder).expanduser(),
            label=model.label,
            trust_remote_code=section.trust_remote_code,
            allow_pickle=section.allow_pickle,
        )


def curl_line(url: str, *, with_key: bool = False, certificate: Path | None = None) -> str:
    """A shell command that scores two responses."""
    body = json.dumps({"prompt": "The train", "responses": [" was late again.", " was a joy!"]})
    key = '-H "Authorization: Bearer $KEY" ' if with_key else ""
    trusted = f"--cacert {shlex.quote(str(certificate))} " if certificate else ""
    return f"curl -s {trusted}{url}/v1/score {key}-H 'Content-Type: application/json' -d {shlex.quote(body)}"


def _ensure_serve(section: ServeConfig, *, asks_for_key: bool) -> tuple[str, set[str]]:
    """(base URL that Serve listens on, routes that other applications have), starting Serve where it does not run."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    client = _get_global_client(raise_if_no_controller_running=False)  # no public call tells a running Serve's address
    if client is None:
        port = free_port(section)
        serve.start(
            proxy_location=ProxyLocation.HeadOnly,
            http_options=_http_options(section, port),
            logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False),
        )
        _warn_if_open(section.host, asks_for_key=asks_for_key)
        return _base_url(section.host, port, tls=section.tls_cert is not None), set()
    details = client.get_serve_details()
    options = details["http_options"]
    host, port = options["host"], options["port"]
    if section.port not in (0, port):
        raise ConfigError(
            f"serve.port = {section.port}, and Serve listens on {host}:{port} on this cluster already, which the first "
            f"start fixes; set serve.port to {port}, or to 0 for whatever is there"
        )
    tls = bool(options.get("ssl_certfile"))
    if section.tls_cert is not None and not tls:
        raise ConfigError(
            "serve.tls_cert is set, and Serve on this cluster listens without TLS, which its first start fixes; "
            "leave it out, or serve on another cluster"
        )
    if section.name in details["applications"]:
        raise ConfigError(
            f"serve.name = {section.name} is an application on this cluster already; choose another serve.name, or end "
            "the run that owns it"
        )
    taken = {app["route_prefix"] for app in details["applications"].values()}
    _warn_if_open(host, asks_for_key=asks_for_key)
    return _base_url(host, port, tls=tls), taken


def _warn_if_open(host: str, *, asks_for_key: bool) -> None:
    if host not in ("127.0.0.1", "::1", "localhost") and not asks_for_key:
        log.warning("%s is open to the network and asks for no key; name some in serve.api_keys_file", host)


def _http_options(section: ServeConfig, port: int) -> dict[str, Any]:
    """Serve's own time-out is for a replica that hangs: it is longer than the one that the service keeps itself.

    Raises:
        ConfigError: a file of ``serve.tls_*`` is missing.
    """
    options: dict[str, Any] = {
        "host": section.host,
        "port": port,
        "request_timeout_s": section.request_timeout_s + HANG_SECONDS,
    }
    for key, option in (("tls_cert", "ssl_certfile"), ("tls_key", "ssl_keyfile")):
        path = getattr(section, key)
        if path is not None:
            if not path.expanduser().is_file():
                raise ConfigError(f"serve.{key} = {path} is no file; name one in PEM form")
            options[option] = str(path.expanduser().resolve())
    return options


def free_port(section: ServeConfig) -> int:
    """``serve.port`` after a look whether it can be had, or any free one for 0."""
    with socket.socket(socket.AF_INET6 if ":" in section.host else socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((section.host, section.port))
        except OSError as error:
            raise ConfigError(
                f"serve.port = {section.port} on serve.host = {section.host} cannot be had ({error.strerror}); "
                "choose another serve.port, or 0 for any free one"
            ) from error
        port: int = probe.getsockname()[1]
    return port


def _base_url(host: str, port: int, *, tls: bool) -> str:
    """Where to call a listener on ``host`` from its own machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"{'https' if tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"


def _wait_until_running(name: str) -> None:
    """Wait for the replicas, saying every few seconds what Serve says of them."""
    began = said = time.monotonic()
    while True:
        application = serve.status().applications.get(name)
        status = application.status if application else ApplicationStatus.NOT_STARTED
        if status == ApplicationStatus.RUNNING:
            return
        waited = time.monotonic() - began
        message = _message(application)
        has_failed = status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY)
        would_fail_again = FAILED_START in message and not any(word in message for word in OF_A_DEATH)
        if has_failed or would_fail_again or waited > START_LIMIT_SECONDS:
            raise ScorerError(f"the reward service did not start ({status.value} after {waited:.0f} s): {message}")
        if time.monotonic() - said > WAIT_NOTICE_SECONDS:
            said = time.monotonic()
            log.info("waiting for the reward service %s (%.0f s): %s %s", name, waited, status.value, message)
        time.sleep(_POLL_SECONDS)


def _message(application: Any) -> str:
    """What Serve says of an application and of its deployments."""
    if application is None:
        return ""
    parts = [application.message, *(deployment.message for deployment in application.deployments.values())]
    return " ".join(part for part in parts if part)


def _wait_until_answering(url: str) -> None:
    """Wait until the HTTP proxy knows the route: it learns of it a moment after the replicas run."""
    unchecked = ssl.create_default_context()  # the certificate may be for another name; nothing secret is sent here
    unchecked.check_hostname = False
    unchecked.verify_mode = ssl.CERT_NONE
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=unchecked)
    )
    end = time.monotonic() + START_LIMIT_SECONDS
    while True:
        try:
            with opener.open(f"{url}/readyz", timeout=10):
                return
        except OSError as error:  # URLError, time-outs and connections that are cut while the proxy starts
            if time.monotonic() > end:
                raise ScorerError(f"the reward service runs and {url}/readyz does not answer: {error}") from error
        time.sleep(_POLL_SECONDS)
