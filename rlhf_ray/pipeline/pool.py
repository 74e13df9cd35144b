"""The pools of the loop: generators, which must have the newest policy; references and scorers, which never change.

A generator's state (``workers.py``) is about versions: STALE until it has acknowledged the newest policy, READY while
it serves that, STALE again when a newer one is out. Only READY workers are given prompts, so whoever joins or comes
back serves nobody until it has acknowledged the newest policy, and a worker that is slow to load it holds up itself
alone.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from rlhf_ray.errors import DataLostError, PromptError, StalenessError, WorkerDiedError
from rlhf_ray.interfaces import Generator, PooledScorer, Reference
from rlhf_ray.pipeline.workers import Member, WorkerPool
from rlhf_ray.types import Prompt, Ref, RolloutReceipt, Score, VersionedWeights, WeightAck


class GeneratorPool(WorkerPool[Generator]):
    """Owns the generators: brings them up, gives them prompts, keeps them on the newest policy, replaces the dead.

    Arguments: see ``WorkerPool``.
    """

    kind = section = "generator"

    _published: tuple[VersionedWeights, Callable[[WeightAck], None]] | None = None

    def update_all(self, published: VersionedWeights, accept: Callable[[WeightAck], None]) -> None:
        """A policy is out: from this moment nobody is given a prompt before having acknowledged it.

        Returns at once; each worker loads it in its own time and skips versions that it missed.

        Args:
            accept: is shown each acknowledgement, of later joiners too; an error from it ends the run.
        """
        self._published = published, accept
        self.make_stale()

    async def generate(
        self,
        prompt: Prompt,
        *,
        on_admit: Callable[[int, int], None] = lambda prompt_id, version: None,
        on_withdraw: Callable[[int], None] = lambda prompt_id: None,
    ) -> Sequence[tuple[RolloutReceipt, Ref]]:
        """Sample the prompt's responses on the least loaded READY generator; on another one if that dies.

        Args:
            on_admit: called with (prompt id, version) as a generator that serves ``version`` gets the prompt.
            on_withdraw: called with the prompt id when that generator has given nothing; another ``on_admit`` follows,
                or an error.

        Raises:
            PromptError: ``max_prompt_tries`` workers died on this prompt, or a response has no log-probabilities.
            DataLostError: the responses went with their node; ``on_withdraw`` was called.
            WorkerDiedError: more workers died than ``max_restarts`` replaces.
        """

        async def sample(member: Member[Generator], generator: Generator) -> Sequence[tuple[RolloutReceipt, Ref]]:
            assert member.version is not None
            on_admit(prompt.prompt_id, member.version)
            try:
                return await generator.generate(prompt)
            except (WorkerDiedError, DataLostError, PromptError):
                on_withdraw(prompt.prompt_id)
                raise

        return await self._call(
            sample,
            lambda tries: (
                f"prompt {prompt.named()} was given to {tries} generators and each died; "
                "remove it from prompts.path, or raise ppo.max_prompt_tries if the deaths have another cause"
            ),
        )

    async def _refresh(self, member: Member[Generator], worker: Generator) -> bool:
        if (published := self._published) is None:
            return False
        newest, accept = published
        ack = await worker.update_weights(newest)
        if ack.version != newest.version:
            raise StalenessError(f"{member.name} was sent version {newest.version} and acknowledged {ack.version}")
        accept(ack)
        member.version = ack.version
        return self._published is published


class ReferencePool(WorkerPool[Reference]):
    """Owns the references: brings them up, gives them rollouts, replaces the dead. Arguments: see ``WorkerPool``."""

    kind = section = "reference"

    async def logprobs(self, prompt: Prompt, rollout: Ref) -> Ref:
        """See ``interfaces.Reference``: by the least loaded one, and by another one if that dies.

        Args:
            prompt: whose response the rollout is.

        Raises:
            PromptError: ``max_prompt_tries`` workers died on this rollout, or it has no log-probabilities.
            WorkerDiedError: more workers died than ``max_restarts`` replaces.
        """
        return await self._call(
            lambda member, reference: reference.logprobs(rollout),
            lambda tries: (
                f"a response to prompt {prompt.named()} was given to {tries} references and each died; lower "
                "reference.max_batch_tokens if memory ran out, or raise ppo.max_prompt_tries if the deaths have "
                "another cause"
            ),
        )


class ScorerPool(WorkerPool[PooledScorer]):
    """One scorer, whose process is replaced when it dies; satisfies ``interfaces.Scorer``.

    Args:
        name: of the scorer, as people know it.
        section: its place in the configuration, such as ``scorers.0``.
        is_watched: see ``WorkerPool``.

    Other arguments: see ``WorkerPool``.
    """

    def __init__(
        self,
        factory: Callable[[str], Awaitable[PooledScorer]],
        *,
        name: str,
        section: str,
        max_concurrent: int,
        max_restarts: int | None,
        max_prompt_tries: int,
        is_watched: bool = True,
    ) -> None:
        super().__init__(
            factory,
            count=1,
            max_concurrent=max_concurrent,
            max_restarts=max_restarts,
            max_prompt_tries=max_prompt_tries,
        )
        self.kind = f"scorer {name}"
        self.section = section
        self.is_watched = is_watched

    async def score(self, rollout: Ref) -> Score:
        """See ``interfaces.Scorer``: again by the next process if this one dies.

        Raises:
            PromptError: ``max_prompt_tries`` processes died on this rollout.
            WorkerDiedError: more processes died than ``max_restarts`` replaces.
        """
        return await self._call(
            lambda member, scorer: scorer.score(rollout),
            lambda tries: (
                f"a response was given to {tries} processes of {self.kind} and each died; mend the scorer, or raise "
                "ppo.max_prompt_tries if the deaths have another cause"
            ),
        )
