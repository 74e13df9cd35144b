"""Weight sync: the learner's policy out to the generators, and proof that they compute with it.

    learner.publish() ──► VersionedWeights (one object, with a probe) ──► pool.update_all ──► each generator loads it
                                                                                                     │
    ParityError ◄── gap above the tolerance, or NaN ◄── the probe's log-probabilities, compared ◄────┘  (WeightAck)

The probe is what makes a silent failure loud: a generator that loaded the wrong thing still samples fluent text.
"""

from __future__ import annotations

import math

from rlhf_ray.errors import ParityError
from rlhf_ray.interfaces import Learner
from rlhf_ray.pipeline.pool import GeneratorPool
from rlhf_ray.types import WeightAck


class WeightSync:
    """Publishes policies and judges the acknowledgements.

    Args:
        tolerance: largest |generator − learner| that a probe's log-probability may show, nats.
    """

    def __init__(self, pool: GeneratorPool, learner: Learner, *, tolerance: float) -> None:
        self._pool = pool
        self._learner = learner
        self._tolerance = tolerance
        self._recent: list[WeightAck] = []
        self.parity_max = 0.0
        """Largest gap that any acknowledgement showed, nats."""

    async def publish(self) -> int:
        """Publish the learner's policy and tell every generator; returns its version without waiting for them.

        Only the pool holds the weights, and only those of the newest version: an older one is freed as soon as the last
        generator that is loading it has done so.
        """
        published = await self._learner.publish()
        self._pool.update_all(published, self.accept)
        return published.version

    def accept(self, ack: WeightAck) -> None:
        """Take note of an acknowledgement.

        Raises:
            ParityError: generator and learner disagree about the probe by more than the tolerance, or by NaN.
        """
        self._refuse(ack.parity_max, f"{ack.generator} and the learner", ack.version)
        self.parity_max = max(self.parity_max, ack.parity_max)
        self._recent.append(ack)

    def check_rollouts(self, sampler_gap: float | None, *, version: int) -> None:
        """Hold what was really sampled to the same tolerance as the probe.

        Args:
            sampler_gap: mean |learner − sampler| over responses of ``version``, nats; None where a batch had none.

        Raises:
            ParityError: it is above the tolerance, or NaN.
        """
        if sampler_gap is not None:
            self._refuse(sampler_gap, "on average over a batch, the generators and the learner", version)

    def _refuse(self, gap: float, who: str, version: int) -> None:
        if not gap <= self._tolerance:  # written so that NaN fails it
            shown = "NaN" if math.isnan(gap) else f"{gap:.2g} nats"
            raise ParityError(
                f"{who} differ by {shown} on the same tokens under version {version}, and "
                f"ppo.parity_tolerance is {self._tolerance:g}; likely causes: an old packed lm_head under tied "
                "embeddings, a prefix cache kept across the update, another sampling temperature, or generator.dtype "
                "differing from learner.precision (then raise ppo.parity_tolerance to what that dtype needs)"
            )

    def collect_metrics(self) -> dict[str, float]:
        """``parity_max`` (nats) and ``seconds_sync`` (slowest generator) of the acknowledgements since the last call.

        Empty if there was none.
        """
        recent, self._recent = self._recent, []
        if not recent:
            return {}
        return {"parity_max": max(a.parity_max for a in recent), "seconds_sync": max(a.seconds for a in recent)}
