"""What a run adds up to: the metrics of one step, and the summary of them all."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from rlhf_ray.types import ExperienceRefs, RolloutReceipt, Score, StepReport

ROLLOUT_STAGES = ("generate", "score", "reference")
LEARNER_STAGES = ("wait", "train", "publish", "checkpoint")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSummary:
    """How a run of the pipeline went."""

    status: Literal["finished", "interrupted"]
    steps: int
    """Learner steps, those before a resume included; so are samples and tokens."""
    samples: int
    tokens: int
    """Response tokens trained on."""
    seconds: float
    """Of this process, from the first publication on."""
    samples_per_second: float
    """From the first prompt given to a generator to the end of the last step."""
    tokens_per_second: float
    score_first: float | None
    """Mean score of the first step's batch; None if no step was taken."""
    score_last: float | None
    kl_last: float | None
    """Mean over the last batch of the KL per response, k1, nats."""
    staleness_mean: float
    staleness_max: int
    stage_seconds: Mapping[str, float]
    """wait, train, publish, checkpoint: the learner's time, in all. generate, score, reference: mean of one prompt.
    sync: mean of the slowest generator's weight updates."""
    sampler_parity_max: float
    """Largest sampler-learner log-probability gap after a sync, nats."""
    skipped: int
    """Steps without an update, because something in them was not finite."""
    lost: int
    trained_twice: int
    quarantined: int
    """Prompts that no worker could work on, those before a resume included."""
    deaths: Mapping[str, int]
    """Workers that died while this process ran, by kind: generator, reference, scorer NAME; learner: restarts of all
    its ranks."""


class Tally:
    """Adds up what the pipeline sees. Seconds come from the pipeline's clock."""

    def __init__(self) -> None:
        self.samples = 0
        self.tokens = 0
        self._prompts = 0
        self.score_first: float | None = None
        self._resumed_samples = 0
        self._resumed_tokens = 0
        self._last: Mapping[str, float] = {}
        self._kl_last: float | None = None
        self._skipped = 0
        self._staleness: list[int] = [0, 0]  # sum, largest
        self._learner: dict[str, float] = defaultdict(float)
        self._this_step: dict[str, float] = defaultdict(float)
        self._rollouts: dict[int, dict[str, float]] = defaultdict(dict)
        self._rollout_totals: dict[str, float] = defaultdict(float)
        self._syncs: list[float] = []
        self._step_ended: float | None = None
        self._sampling_since: float | None = None

    def admitted(self, now: float) -> None:
        """A generator was given a prompt; the first one starts the clock of the rates."""
        self._sampling_since = now if self._sampling_since is None else self._sampling_since

    def rollout_stage(self, prompt_id: int, stage: str, seconds: float) -> None:
        """One of ``ROLLOUT_STAGES`` is over for one prompt's responses."""
        self._rollouts[prompt_id][stage] = seconds

    def forget(self, prompt_id: int) -> None:
        """The prompt is quarantined: no step will have it."""
        self._rollouts.pop(prompt_id, None)

    def learner_stage(self, stage: str, seconds: float) -> None:
        """One of ``LEARNER_STAGES`` is over."""
        self._learner[stage] += seconds
        self._this_step[stage] += seconds

    def staleness(self) -> dict[str, float]:
        """Mean and largest so far, in versions, over the responses trained on."""
        total, largest = self._staleness
        return {"mean": total / max(self.samples - self._resumed_samples, 1), "max": largest}

    def step(
        self, step: int, batch: Sequence[ExperienceRefs], report: StepReport, now: float, others: Mapping[str, float]
    ) -> dict[str, float]:
        """The row of metrics.jsonl of a step that trained ``batch`` and ended at ``now``.

        ``samples`` counts up from the start of the run; rates are this step's, waiting included.
        """
        receipts = [e.receipt for e in batch]
        tokens = sum(r.response_tokens for r in receipts)
        began = self._step_ended if self._step_ended is not None else self._sampling_since
        seconds = max(now - (began if began is not None else now), 1e-9)
        self._step_ended = now
        self.samples += len(batch)
        self.tokens += tokens
        row = dict(report.metrics) | {
            "step": step,
            "version": report.version,
            "samples": self.samples,
            "seconds_step": seconds,
            "samples_per_second": len(batch) / seconds,
            "tokens_per_second": tokens / seconds,
            **self._seconds(receipts),
            **_part_means([e.score for e in batch]),
            **others,
        }
        if "seconds_sync" in others:
            self._syncs.append(others["seconds_sync"])
        stale = [report.version - 1 - r.oldest_version for r in receipts]
        self._staleness = [self._staleness[0] + sum(stale), max(self._staleness[1], *stale)]
        self._last = row
        self._kl_last = row.get("kl", self._kl_last)
        self._skipped += int(row.get("skipped", 0))
        if self.score_first is None:
            self.score_first = row.get("score_mean")
        return row

    def _seconds(self, receipts: Sequence[RolloutReceipt]) -> dict[str, float]:
        spent, self._this_step = self._this_step, defaultdict(float)
        row = {f"seconds_{stage}": spent[stage] for stage in ("wait", "train", "publish")}
        rollouts = [self._rollouts.pop(prompt_id) for prompt_id in dict.fromkeys(r.prompt_id for r in receipts)]
        self._prompts += len(rollouts)
        for stage in ROLLOUT_STAGES:
            of_each = [rollout[stage] for rollout in rollouts]
            self._rollout_totals[stage] += sum(of_each)
            row[f"seconds_{stage}"] = fmean(of_each)
        return row

    def summary(
        self,
        *,
        status: Literal["finished", "interrupted"],
        steps: int,
        seconds: float,
        parity_max: float,
        lost: int,
        trained_twice: int,
        quarantined: int,
        deaths: Mapping[str, int],
    ) -> RunSummary:
        """Everything so far, at the end of the run."""
        samples = self.samples - self._resumed_samples
        sampling = 0.0
        if self._step_ended is not None and self._sampling_since is not None:
            sampling = self._step_ended - self._sampling_since
        stage_seconds = {stage: self._learner[stage] for stage in LEARNER_STAGES}
        stage_seconds |= {stage: self._rollout_totals[stage] / max(self._prompts, 1) for stage in ROLLOUT_STAGES}
        stage_seconds["sync"] = fmean(self._syncs) if self._syncs else 0.0
        return RunSummary(
            status=status,
            steps=steps,
            samples=self.samples,
            tokens=self.tokens,
            seconds=seconds,
            samples_per_second=samples / sampling if sampling else 0.0,
            tokens_per_second=(self.tokens - self._resumed_tokens) / sampling if sampling else 0.0,
            score_first=self.score_first,
            score_last=self._last.get("score_mean"),
            kl_last=self._kl_last,
            staleness_mean=self.staleness()["mean"],
            staleness_max=self._staleness[1],
            stage_seconds=stage_seconds,
            sampler_parity_max=parity_max,
            skipped=self._skipped,
            lost=lost,
            trained_twice=trained_twice,
            quarantined=quarantined,
            deaths=deaths,
        )

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must go on counting from."""
        return {
            "samples": self.samples,
            "tokens": self.tokens,
            "score_first": self.score_first,
            "skipped": self._skipped,
            "rollouts": {str(prompt_id): dict(stages) for prompt_id, stages in self._rollouts.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting; rates, seconds and staleness are of the resumed part alone."""
        self.samples = self._resumed_samples = state["samples"]
        self.tokens = self._resumed_tokens = state["tokens"]
        self.score_first = state["score_first"]
        self._skipped = state["skipped"]
        for prompt_id, stages in state["rollouts"].items():
            self._rollouts[int(prompt_id)] = dict(stages)


def _part_means(scores: Sequence[Score]) -> dict[str, float]:
    """``score_NAME_mean`` of each scorer whose sum the scores are; {} where they come from one."""
    return {f"score_{name}_mean": fmean(score.parts[name] for score in scores) for name in scores[0].parts}
