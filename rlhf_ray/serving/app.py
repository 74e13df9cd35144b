"""The reward service as a Ray Serve application: ``serve run rlhf_ray.serving.app:build_app model=DIR``.

A run and the command line come through ``application``, ``deployments/reward_service.yaml`` through ``build_app``.
``from __future__ import annotations`` is missing on purpose: Serve looks at the class that annotates the builder's
argument, and would pass a plain dict where it finds the class's name.
"""

from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, BackpressureConfig
from ray.serve.schema import LoggingConfig

from rlhf_ray.cluster import WORKER_ENV
from rlhf_ray.serving.args import RewardServiceArgs
from rlhf_ray.serving.http import http_app
from rlhf_ray.serving.keys import read_keys
from rlhf_ray.serving.reward_service import RewardService

ONGOING_BATCHES = 64
"""Batches' worth of calls that a replica holds at once: it must see many to choose companions of like length from, and
to know how long a further one would wait."""

BUSY_BATCHES = 2
"""Batches' worth of calls for each replica above which Serve adds one, where it may: one runs, one waits."""

STARTS = 5
"""Failed starts, as far as Serve's controller can tell, before it gives the application up; Serve allows three for each
replica at most.
"""

MAX_QUEUED_REQUESTS = 4096
"""Calls that one caller may have waiting for a replica; more are told 429. Far above a burst of rollouts."""


class _ServedRewardService(RewardService):
    """What Serve asks of an ingress class: its ASGI app, once the replica is constructed."""

    def __init__(self, args: RewardServiceArgs, key_digests: frozenset[str]) -> None:
        super().__init__(args)
        self._key_digests = key_digests

    def __serve_build_asgi_app__(self) -> FastAPI:
        return http_app(self, key_digests=self._key_digests)


def build_app(args: RewardServiceArgs) -> Application:
    """What ``serve`` calls: the application, with the API keys that it finds where it is built.

    Raises:
        ConfigError: the API keys cannot be read.
    """
    return application(args, read_keys(args.api_keys_file))


def application(args: RewardServiceArgs, key_digests: frozenset[str]) -> Application:
    """The application; its ingress answers HTTP and the handle method ``score_rollout``.

    Args:
        key_digests: of the API keys that open the door; with none it stands open.
    """
    scaling = (
        {"num_replicas": args.replicas}
        if args.max_replicas is None
        else {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=args.replicas,
                initial_replicas=args.replicas,
                max_replicas=args.max_replicas,
                target_ongoing_requests=BUSY_BATCHES * args.max_batch_size,
            )
        }
    )
    deployment = serve.deployment(
        serve.ingress()(_ServedRewardService),
        name=args.name,
        **scaling,
        user_config={"models": {name: model.model_dump() for name, model in args.served_models().items()}},
        max_ongoing_requests=ONGOING_BATCHES * args.max_batch_size,
        max_queued_requests=MAX_QUEUED_REQUESTS,
        # Not 1, though what cannot be loaded fails again: a controller that was killed at the same time as the replica
        # takes that one's death for a failed first start.
        max_constructor_retry_count=STARTS,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
        ray_actor_options={
            "num_cpus": args.num_cpus,
            "num_gpus": args.num_gpus,
            "runtime_env": {"env_vars": dict(WORKER_ENV)},
        },
        logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False),
    )
    return deployment.bind(args, key_digests)
