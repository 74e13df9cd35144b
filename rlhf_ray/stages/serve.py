"""The reward model as a Ray Serve application: started for a run, or kept up until Ctrl-C."""

from __future__ import annotations

import contextlib
import json
import logging
import shlex
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.config import ProxyLocation
from ray.serve.context import _get_global_client
from ray.serve.schema import ApplicationStatus, LoggingConfig

from rlhf_ray.cluster import WAIT_NOTICE_SECONDS, Need, check_resources, connected
from rlhf_ray.config import RunConfig, ServeConfig
from rlhf_ray.errors import ConfigError, ScorerError
from rlhf_ray.serving.app import build_app
from rlhf_ray.serving.schemas import RewardServiceArgs

log = logging.getLogger("rlhf_ray.serve")

START_LIMIT_SECONDS = 600.0
"""A service that is not up by then has failed."""

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
        ConfigError: the folder is missing, the port or the name is taken, or Serve listens elsewhere already.
        ResourceError: the cluster can never hold the replicas.
        ScorerError: the service failed to start, with Serve's word on why.
    """
    section = config.serve
    if not model_folder.is_dir():
        raise ConfigError(
            f"{model_folder} is no folder; run `rlhf-ray reward` first, or name a reward model in serve.model"
        )
    check_resources(
        [Need(section="serve", count=section.replicas, num_cpus=section.num_cpus, num_gpus=section.num_gpus)]
    )
    address, taken_routes = _ensure_serve(section)
    route = "/" if "/" not in taken_routes else f"/{section.name}"
    url = f"http://{address}{route}".rstrip("/")
    application = build_app(RewardServiceArgs.of_run(config, model_folder))
    try:
        (handle,) = serve.run_many(
            [serve.RunTarget(application, name=section.name, route_prefix=route)], wait_for_applications_running=False
        )
        _wait_until_running(section.name)
        _wait_until_answering(url)
    except BaseException:  # Ctrl-C too: a half-started application must not stay behind
        stop_service(section.name)
        raise
    return ServedReward(name=section.name, handle=handle, url=url)


@contextlib.contextmanager
def served_reward(config: RunConfig, model_folder: Path, service: ServedReward | None = None) -> Iterator[ServedReward]:
    """``service`` as it is, or one started for the block and deleted with it."""
    if service is not None:
        yield service
        return
    served = start_service(config, model_folder=model_folder)
    try:
        yield served
    finally:
        stop_service(served.name)


def stop_service(name: str) -> None:
    """Delete the application; Serve itself and other applications stay. Harmless when it is gone already."""
    serve.delete(name)


def serve_forever(config: RunConfig, model_folder: Path, *, announce: Callable[[str], None] = log.info) -> None:
    """Serve until Ctrl-C, on the cluster at hand or else a local one, and leave nothing of it behind.

    Args:
        announce: told the URL and a command line to try it with.
    """
    with connected(), served_reward(config, model_folder) as served:
        announce(f"reward model {served.name} answers at {served.url} (documentation: {served.url}/docs)")
        announce(f"try: {curl_line(served.url)}")
        announce("Ctrl-C ends it")
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
        announce("stopping")


def curl_line(url: str) -> str:
    """A shell command that scores two responses."""
    body = json.dumps({"prompt": "The train", "responses": [" was late again.", " was a joy!"]})
    return f"curl -s {url}/v1/score -H 'Content-Type: application/json' -d {shlex.quote(body)}"


def _ensure_serve(section: ServeConfig) -> tuple[str, set[str]]:
    """(host:port that Serve listens on, routes that other applications have), starting Serve where it does not run."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    client = _get_global_client(raise_if_no_controller_running=False)  # no public call tells a running Serve's address
    if client is None:
        port = free_port(section)
        serve.start(
            proxy_location=ProxyLocation.HeadOnly,
            http_options={"host": section.host, "port": port},
            logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False),
        )
        return f"{_reachable(section.host)}:{port}", set()
    details = client.get_serve_details()
    host, port = details["http_options"]["host"], details["http_options"]["port"]
    if section.port not in (0, port):
        raise ConfigError(
            f"serve.port = {section.port}, and Serve listens on {host}:{port} on this cluster already, which the first "
            f"start fixes; set serve.port to {port}, or to 0 for whatever is there"
        )
    if section.name in details["applications"]:
        raise ConfigError(
            f"serve.name = {section.name} is an application on this cluster already; choose another serve.name, or end "
            "the run that owns it"
        )
    return f"{_reachable(host)}:{port}", {app["route_prefix"] for app in details["applications"].values()}


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


def _reachable(host: str) -> str:
    """The address to call a listener on ``host`` at, from its own machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host


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
        if status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY) or waited > START_LIMIT_SECONDS:
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
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    end = time.monotonic() + START_LIMIT_SECONDS
    while True:
        try:
            with opener.open(f"{url}/readyz", timeout=10):
                return
        except OSError as error:  # URLError, time-outs and connections that are cut while the proxy starts
            if time.monotonic() > end:
                raise ScorerError(f"the reward service runs and {url}/readyz does not answer: {error}") from error
        time.sleep(_POLL_SECONDS)
