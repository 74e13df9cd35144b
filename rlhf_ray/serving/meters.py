"""What the service tells Prometheus, through Ray's own exporter on each node (``ray_rlhf_ray_…``)."""

from __future__ import annotations

from ray.serve import metrics

from rlhf_ray.serving.batcher import Forward

_SECONDS = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30]
_ROWS = [1, 2, 4, 8, 16, 32, 64, 128]


class Meters:
    """Of one replica; Serve adds deployment, replica and application as labels."""

    def __init__(self) -> None:
        model = ("model",)
        self._scores = metrics.Counter("rlhf_ray_scores", "Responses scored.", tag_keys=("model", "version"))
        self._refused = metrics.Counter("rlhf_ray_refused", "HTTP requests refused, by status.", tag_keys=("status",))
        self._forward = metrics.Histogram(
            "rlhf_ray_forward_seconds", "Seconds of a forward.", boundaries=_SECONDS, tag_keys=model
        )
        self._waited = metrics.Histogram(
            "rlhf_ray_batch_wait_seconds", "Wait of a batch's oldest row.", boundaries=_SECONDS, tag_keys=model
        )
        self._rows = metrics.Histogram("rlhf_ray_batch_rows", "Rows of a forward.", boundaries=_ROWS, tag_keys=model)
        self._padding = metrics.Gauge("rlhf_ray_padding_share", "Share of padding in the last forward.", tag_keys=model)

    def forward(self, name: str, version: str, forward: Forward) -> None:
        """Count one."""
        if forward.scored:
            self._scores.inc(forward.scored, {"model": name, "version": version})
        self._forward.observe(max(forward.seconds, 1e-9), {"model": name})
        self._waited.observe(max(forward.waited_seconds, 1e-9), {"model": name})
        self._rows.observe(forward.rows, {"model": name})
        self._padding.set(1 - forward.tokens / forward.padded_tokens, {"model": name})

    def refused(self, status: int) -> None:
        """Count one."""
        self._refused.inc(1, {"status": str(status)})
