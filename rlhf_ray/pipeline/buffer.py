"""The experience buffer: slots that bound staleness, and the rule that says which batch is trained when.

Words. B is ``batch_size`` in prompts, S is ``max_staleness`` in versions. Responses do not count: however many a
prompt has, they are admitted, finished and trained together. The version j is the newest published policy, which is
also the learner's at the start of the step that makes j + 1. A prompt is *admitted* when a generator that serves j is
given it; it carries a *deadline* d = j + S, the last version at which it may be trained. Every token of it is sampled
under j or later, so training it at a version k ≤ d keeps its staleness, k minus its oldest token's version, at most S.

Slots. There are (S + 1)·B. A prompt holds one from before its admission until the version that its batch made is
published. So A(k), the number of prompts admitted, not yet taken, with d ≤ k, is never above (S + 1)·B, and not above
S·B while a batch is being trained, because that batch holds B slots.

Rule. At version j, choose the B finished prompts with the earliest deadlines (ties: the smaller prompt id, the
order of issue). The choice is allowed if for every k in [j, j + S): A(k) − (chosen with d ≤ k) ≤ (k − j)·B. Otherwise
wait: an unfinished prompt is waited for only where going on without it would break the bound.

Invariant I(j): A(k) ≤ (k − j + 1)·B for every k ≥ j, and no prompt that is waiting has d < j. Read: whatever falls due
by k fits into the steps at versions j … k. It holds at the start, where nothing is admitted.

* An admission at j has d = j + S and moves A(k) only for k ≥ j + S, where the slots alone give A(k) ≤ (S + 1)·B
  ≤ (k − j + 1)·B. A withdrawal (its worker died) only lowers A; the prompt keeps its slot, and when another generator
  gets it, that is an admission at the version of that time, so with the same deadline or a later one. Where the prompt
  is quarantined, a fresh one takes its slot, and the same holds.
* A take at j turns I(j) into I(j + 1): for k in [j, j + S) the rule says so word for word, and at k = j it says that
  nothing is left behind its deadline. For k ≥ j + S, what is left is at most S·B ≤ (k − j)·B by the slots, and stays
  so until the publication frees B of them, because admissions meanwhile are counted by the slots too.

Never stale: by I(j) everything trained at j has d ≥ j.

Progress: once all admitted prompts are finished, of at least B, the choice is allowed. If A(k) ≤ B all of A(k) is
chosen, and 0 ≤ (k − j)·B. Otherwise the B chosen are all from A(k), and A(k) − B ≤ (k − j)·B is I(j). And B prompts
are admitted in time: with no batch in training, every slot is held by a prompt that is waiting or free for a new one.

No allowed choice is missed: earliest deadlines first leaves the fewest behind for every k at once.

A restored snapshot keeps I(j). It is some of what was admitted, at the version at which it waited, and A over a part is
no higher; each prompt holds a slot again. Should S be smaller than it was, those that no longer fit, by I(j) in the
order of their deadlines, are left out; they are issued again.

With S = 0 there are B slots, so the batch is exactly the prompts admitted at version j: synchronous training.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from rlhf_ray.errors import RlhfRayError, StalenessError
from rlhf_ray.types import ExperienceRefs, ScoredPrompt


class ExperienceBuffer:
    """Hands the learner batches that are never staler than ``max_staleness``; see the module's rule and proof.

    One prompt's path is ``acquire`` → ``admit`` (→ ``withdraw`` → ``admit`` …) → ``put`` → ``take`` → ``release``.
    """

    def __init__(self, *, batch_size: int, max_staleness: int, version: int = 0) -> None:
        self.batch_size = batch_size
        self.max_staleness = max_staleness
        self.version = version
        """The newest published version."""
        self.capacity = (max_staleness + 1) * batch_size
        self.slots_in_use = 0
        self._slot_freed = asyncio.Event()
        self._changed = asyncio.Event()
        self._deadlines: dict[int, int] = {}  # of every prompt admitted and not taken, finished or not
        self._finished: dict[int, Sequence[ExperienceRefs]] = {}
        self._in_training = 0
        self._ended = False

    async def acquire(self) -> None:
        """Wait for a slot and hold it. Waits while ``capacity`` prompts are under way; ``release`` unblocks it."""
        while self.slots_in_use >= self.capacity:
            self._slot_freed.clear()
            await self._slot_freed.wait()
        self.slots_in_use += 1

    def admit(self, prompt_id: int, version: int) -> None:
        """A generator that serves ``version``, the newest published one, is given the prompt.

        Raises ``StalenessError`` for any other version: the proof rests on it.
        """
        if version != self.version:
            raise StalenessError(
                f"prompt {prompt_id} was given to a generator of version {version} while {self.version} is published"
            )
        if prompt_id in self._deadlines:
            raise RlhfRayError(f"prompt {prompt_id} was given to two generators at once")
        if len(self._deadlines) + self._in_training >= self.slots_in_use:
            raise RlhfRayError(f"prompt {prompt_id} was given to a generator without holding a slot")
        self._deadlines[prompt_id] = version + self.max_staleness

    def withdraw(self, prompt_id: int) -> None:
        """The generator that had the prompt died: it has no deadline until it is admitted again, and keeps its slot.
        Or the prompt is quarantined, and leaves its slot to another.
        """
        if prompt_id in self._finished or prompt_id not in self._deadlines:
            raise RlhfRayError(f"prompt {prompt_id} cannot be withdrawn: nobody is at work on it")
        del self._deadlines[prompt_id]
        self._changed.set()

    def put(self, prompt_id: int, experiences: Sequence[ExperienceRefs]) -> None:
        """A prompt's scored rollouts are ready.

        Raises ``StalenessError`` if a token is older than the prompt's admission.
        """
        if prompt_id in self._finished or prompt_id not in self._deadlines:
            raise RlhfRayError(f"prompt {prompt_id} is not awaited: it was never admitted, or came in before")
        admitted = self._deadlines[prompt_id] - self.max_staleness
        for receipt in (experience.receipt for experience in experiences):
            if receipt.oldest_version < admitted:
                raise StalenessError(
                    f"{receipt.generator} sampled prompt {prompt_id} under version {receipt.oldest_version} "
                    f"after it had acknowledged version {admitted}"
                )
        self._finished[prompt_id] = experiences
        self._changed.set()

    async def take(self) -> list[ExperienceRefs]:
        """The batch for the step that starts at the newest published version, ordered by deadline, then prompt id;
        a prompt's experiences stand together.

        Waits until the rule allows a choice; ``put`` and ``withdraw`` unblock it. Empty after ``end``.
        """
        while (batch := self.try_take()) is None:
            self._changed.clear()
            await self._changed.wait()
        return batch

    def try_take(self) -> list[ExperienceRefs] | None:
        """``take`` without waiting: None while the rule allows no choice."""
        if self._ended:
            return []
        if self._in_training:
            raise RlhfRayError("a batch was taken before the version that the last one made was published")
        chosen = sorted(self._finished, key=lambda i: (self._deadlines[i], i))[: self.batch_size]
        if len(chosen) < self.batch_size or not self._allowed(chosen):
            return None
        self._in_training = len(chosen)
        for prompt_id in chosen:
            del self._deadlines[prompt_id]
        return [experience for prompt_id in chosen for experience in self._finished.pop(prompt_id)]

    def release(self, version: int) -> None:
        """The version that the taken batch made is published: its slots are free. Unblocks ``acquire``."""
        if version <= self.version or not self._in_training:
            raise RlhfRayError(
                f"version {version} cannot free slots: {self.version} is out and no batch was trained since"
            )
        self.version = version
        self.slots_in_use -= self._in_training
        self._in_training = 0
        self._slot_freed.set()

    def end(self) -> None:
        """No further batch is wanted: ``take`` returns an empty one from now on."""
        self._ended = True
        self._changed.set()

    def finished_ids(self) -> list[int]:
        """Prompts whose experiences wait here for the learner."""
        return list(self._finished)

    def finished(self) -> list[ScoredPrompt]:
        """What waits here for the learner: the snapshot that ``restore`` takes."""
        return [
            ScoredPrompt(
                prompt_id=prompt_id,
                admitted=self._deadlines[prompt_id] - self.max_staleness,
                experiences=tuple(experiences),
            )
            for prompt_id, experiences in self._finished.items()
        ]

    def restore(self, scored: Sequence[ScoredPrompt]) -> list[int]:
        """Put a snapshot back into an empty buffer whose ``version`` is that of the snapshot; deadlines count from the
        admissions, as before.

        Returns:
            Prompts that cannot all be trained in time any more, and are left out: none, unless ``max_staleness`` is
            lower than it was.
        """
        left_out = []
        for prompt in sorted(scored, key=lambda p: (p.admitted, p.prompt_id)):
            if prompt.admitted > self.version:
                raise RlhfRayError(
                    f"prompt {prompt.prompt_id} was admitted at version {prompt.admitted} and cannot be restored at "
                    f"version {self.version}"
                )
            if prompt.admitted + self.max_staleness < self.version + self.slots_in_use // self.batch_size:
                left_out.append(prompt.prompt_id)
                continue
            self.slots_in_use += 1
            self._deadlines[prompt.prompt_id] = prompt.admitted + self.max_staleness
            self.put(prompt.prompt_id, prompt.experiences)
        return left_out

    def _allowed(self, chosen: list[int]) -> bool:
        taken = set(chosen)
        left_behind = sorted(d for i, d in self._deadlines.items() if i not in taken)
        # The n-th of those left behind (from 1) is trained n // B steps after this one, rounded up: A(k) − chosen
        # ≤ (k − j)·B for every k says just that each of them still meets its deadline.
        return all(
            deadline >= self.version + -(-n // self.batch_size) for n, deadline in enumerate(left_behind, start=1)
        )
