"""The prompt ledger: issued → scored → trained, or issued → quarantined, by prompt id.

It is what makes a crash or a resume exact. A prompt that is not scored is issued again, with its id and so with its
sampling seed; one that is scored waits to be trained; one that is trained is never trained again; one that no
worker can work on is quarantined, and nobody gets it any more. Pure state: no clock, no tasks, no files.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

from rlhf_ray.errors import RlhfRayError

Stage = Literal["issued", "scored"]


class Ledger:
    """Where every prompt of a run stands.

    Example::

        ledger = Ledger()
        ledger.issue(0)
        ledger.scored(0)
        ledger.trained([0])
        assert ledger.close(in_flight=[]) == [] and ledger.trained_twice == 0

    A transition that the arrows above do not allow raises ``RlhfRayError``: it would be a bug of the pipeline.
    """

    def __init__(self) -> None:
        self.next_id = 0
        """Ids below it have been issued; it is the next to be."""
        self.lost = 0
        """Issued prompts that were neither trained, quarantined nor in flight when the run was closed."""
        self.trained_twice = 0
        """Times that a prompt already trained was offered for training; each was refused."""
        self._open: dict[int, Stage] = {}
        self._quarantined: set[int] = set()
        # Every id below the floor is trained or quarantined; above it, those in the set. The set stays as small as what
        # is in flight.
        self._floor = 0
        self._above: set[int] = set()

    def issue(self, prompt_id: int) -> None:
        """A prompt goes out for the first time; ids go out in order."""
        if prompt_id != self.next_id:
            raise RlhfRayError(
                f"prompt {prompt_id} cannot be issued: prompts are issued in order and {self.next_id} is next"
            )
        self.next_id += 1
        self._open[prompt_id] = "issued"

    def reissue(self, prompt_id: int) -> None:
        """A prompt goes out again because the worker that had it died, or because the run was resumed."""
        self._require(prompt_id, "issued", "issued again")

    def scored(self, prompt_id: int) -> None:
        """The response has its score."""
        self._require(prompt_id, "issued", "scored")
        self._open[prompt_id] = "scored"

    def trained(self, prompt_ids: Sequence[int]) -> None:
        """Claim a batch for training, called just before the learner gets it.

        A prompt that was trained before, or stands in the batch twice, is counted in ``trained_twice`` and the whole
        batch is refused with ``RlhfRayError``, so it never reaches the learner. The claim becomes durable with the next
        checkpoint, which is written between steps: a crash within the step leaves the batch untrained.
        """
        repeated = [i for n, i in enumerate(prompt_ids) if self.is_trained(i) or i in prompt_ids[:n]]
        self.trained_twice += len(repeated)
        if repeated:
            raise RlhfRayError(f"prompts {repeated} were about to be trained a second time; the batch was refused")
        for prompt_id in prompt_ids:
            self._require(prompt_id, "scored", "trained")
        for prompt_id in prompt_ids:
            del self._open[prompt_id]
        self._settle(prompt_ids)

    def quarantine(self, prompt_id: int) -> None:
        """No worker can work on the prompt: it is neither trained nor issued again, in a resumed run either."""
        self._require(prompt_id, "issued", "quarantined")
        del self._open[prompt_id]
        self._quarantined.add(prompt_id)
        self._settle([prompt_id])

    @property
    def quarantined(self) -> int:
        """Number of prompts in quarantine, those before a resume included."""
        return len(self._quarantined)

    def is_trained(self, prompt_id: int) -> bool:
        """Whether a batch with this prompt has been claimed."""
        return (prompt_id < self._floor or prompt_id in self._above) and prompt_id not in self._quarantined

    def unscored(self, prompt_id: int) -> None:
        """A resumed run cannot use the responses: the prompt has to be sampled again."""
        self._require(prompt_id, "scored", "sampled again")
        self._open[prompt_id] = "issued"

    def unfinished(self) -> list[int]:
        """Ids issued and not scored, in order: what a resumed run issues again first."""
        return sorted(i for i, stage in self._open.items() if stage == "issued")

    def past_sampling(self) -> int:
        """Number of prompts that are scored or trained."""
        settled = self._floor + len(self._above)
        return settled - len(self._quarantined) + sum(stage == "scored" for stage in self._open.values())

    def close(self, in_flight: Collection[int]) -> list[int]:
        """The run ends with these prompts still under way; returns the lost ids and sets ``lost`` to their number."""
        accounted = set(in_flight)
        missing = [i for i in range(self._floor, self.next_id) if i not in self._above and i not in accounted]
        self.lost = len(missing)
        return missing

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready and compact: ``{"next_id": 96, "trained": [[0, 63], [70, 71]], "scored": [64, 69],
        "quarantined": [65]}``; the ranges of what is trained are inclusive, and what stands nowhere is issued.
        """
        quarantined = sorted(self._quarantined)
        gaps = [-1, *(i for i in quarantined if i < self._floor), self._floor]
        ranges = [[before + 1, after - 1] for before, after in pairwise(gaps) if after - before > 1]
        for prompt_id in sorted(self._above - self._quarantined):
            if ranges and ranges[-1][1] == prompt_id - 1:
                ranges[-1][1] = prompt_id
            else:
                ranges.append([prompt_id, prompt_id])
        scored = sorted(i for i, stage in self._open.items() if stage == "scored")
        return {"next_id": self.next_id, "trained": ranges, "scored": scored, "quarantined": quarantined}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint, which holds what was scored."""
        self.next_id, self._floor, self._above, self._quarantined = state["next_id"], 0, set(), set()
        for first, last in state["trained"]:
            if not 0 <= first <= last < self.next_id:
                raise RlhfRayError(f"the checkpoint's ledger trains prompts {first} to {last} of {self.next_id} issued")
            self._settle(range(first, last + 1))
        self._open = {i: "issued" for i in range(self._floor, self.next_id) if i not in self._above}
        for prompt_id in state["scored"]:
            self.scored(prompt_id)
        for prompt_id in state["quarantined"]:
            self.quarantine(prompt_id)

    def _settle(self, prompt_ids: Iterable[int]) -> None:
        """These are trained, or quarantined: nobody works on them any more."""
        self._above.update(prompt_ids)
        while self._floor in self._above:
            self._above.discard(self._floor)
            self._floor += 1

    def _require(self, prompt_id: int, stage: Stage, wanted: str) -> None:
        now = "trained" if self.is_trained(prompt_id) else self._open.get(prompt_id, "not issued")
        now = "quarantined" if prompt_id in self._quarantined else now
        if now != stage:
            raise RlhfRayError(f"prompt {prompt_id} cannot be {wanted}: it is {now}, not {stage}")
