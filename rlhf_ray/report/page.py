"""One HTML file about a run: figures, curves, samples and the configuration, from what lies in the run's folder.

Self-contained: no script, no font, no picture from elsewhere. Whatever a model wrote is untrusted text: the template
escapes it, and the page forbids scripts. What a stage has not produced yet is shown as absent.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib import metadata
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from rlhf_ray.config import RESOLVED_FILE
from rlhf_ray.errors import DataError
from rlhf_ray.metrics import METRICS_FILE, SAMPLES_FILE, read_lines, read_summary
from rlhf_ray.models.reward import QUALITY_FILE
from rlhf_ray.report.charts import BOTTOM, HEIGHT, LEFT, MAX_POINTS, RIGHT, TOP, WIDTH, Chart, ChartSpec, draw, short
from rlhf_ray.report.comparison import comparison_rows, first_of_each_prompt
from rlhf_ray.report.reward_section import reward_section
from rlhf_ray.report.step_table import duration
from rlhf_ray.roles.judge import SIMULATED_ANNOTATOR, VaderJudge
from rlhf_ray.stages.evaluate import Evaluation, load_evaluation

REPORT_FILE = "report.html"
LEARNER_STAGES = {"train": "training", "wait": "waiting for samples", "publish": "publishing", "checkpoint": "saving"}

CHARTS: Mapping[str, tuple[ChartSpec, ...]] = {
    "Is it learning?": (
        ChartSpec(
            title="Score",
            about="mean of the reward model's normalised score, or of the scorers' weighted sum; what PPO raises",
            series={"score_mean": "score"},
        ),
        ChartSpec(
            title="Gold score",
            about="mean verdict of VADER, the simulated labeller, which PPO never sees",
            series={"gold_mean": "gold"},
        ),
        ChartSpec(
            title="KL to the reference",
            about="nats per response; how far the policy has moved",
            series={"kl": "k1", "kl_k3": "k3"},
            from_zero=True,
        ),
        ChartSpec(
            title="Entropy",
            about="nats per token; near 0 the policy always says the same",
            series={"entropy": "entropy"},
            from_zero=True,
        ),
        ChartSpec(title="Response length", about="mean tokens", series={"response_length": "tokens"}, from_zero=True),
        ChartSpec(
            title="Truncated share",
            about="responses cut at sampling.max_new_tokens",
            series={"truncated_share": "share"},
            from_zero=True,
        ),
    ),
    "Is the update healthy?": (
        ChartSpec(
            title="Approximate KL of one update",
            about="nats per token between the policy before and after the step",
            series={"approx_kl": "approx_kl"},
            from_zero=True,
        ),
        ChartSpec(
            title="Clip fraction",
            about="tokens whose ratio left the clip range",
            series={"clipfrac": "clipfrac"},
            from_zero=True,
        ),
        ChartSpec(
            title="Explained variance",
            about="1: the critic foresees the return; 0 or less: it does not",
            series={"explained_variance": "explained variance"},
        ),
        ChartSpec(title="Gradient norm", about="before clipping", series={"grad_norm": "grad_norm"}, from_zero=True),
    ),
    "Is the loop healthy?": (
        ChartSpec(
            title="Staleness",
            about="versions that a sample's oldest token lags behind the learner",
            series={"staleness_mean": "mean", "staleness_max": "largest"},
            from_zero=True,
        ),
        ChartSpec(
            title="Seconds by stage",
            about="the learner's step, part by part",
            series={
                "seconds_train": "train",
                "seconds_wait": "wait for samples",
                "seconds_publish": "publish weights",
            },
            stacked=True,
        ),
        ChartSpec(
            title="Seconds beside the learner",
            about="mean of one rollout in each worker, and of one weight update; they overlap",
            series={
                "seconds_generate": "generate",
                "seconds_score": "score",
                "seconds_reference": "reference",
                "seconds_sync": "weight update",
            },
            from_zero=True,
        ),
        ChartSpec(
            title="Samples per second",
            about="trained, end to end",
            series={"samples_per_second": "samples/s"},
            from_zero=True,
        ),
        ChartSpec(
            title="Sampler–learner gap",
            about="largest log-probability difference after a weight update, nats",
            series={"parity_max": "largest gap"},
            from_zero=True,
        ),
    ),
}


OF_TUNING: Mapping[str, tuple[ChartSpec, ...]] = {
    "Is it learning?": (
        ChartSpec(
            title="Loss",
            about="of DPO, nats a pair: log 2 = 0.69 is where it starts; of SFT, nats a response token",
            series={"dpo_loss": "DPO", "sft_loss": "SFT"},
            from_zero=True,
        ),
        ChartSpec(
            title="Accuracy in training",
            about="of DPO, pairs whose preferred response has the higher implicit reward; of SFT, tokens foreseen",
            series={"dpo_accuracy": "DPO", "sft_accuracy": "SFT"},
            from_zero=True,
        ),
    ),
}
"""Of a policy that SFT or DPO trained."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """A headline number; ``value`` is None where no stage has produced it, and ``note`` then says which would."""

    label: str
    value: str | None
    note: str
    good: bool | None = None
    """True and False colour the figure; None leaves it plain."""


def with_gold(
    rows: Sequence[Mapping[str, float]], samples: Sequence[Mapping[str, Any]], judge: Callable[[str], float]
) -> list[dict[str, float]]:
    """The steps' metrics with ``gold_mean``: the judge's mean over the responses that ``samples.jsonl`` kept of each.

    The labeller is a program here, so it can be asked about every step, long after the run; PPO never saw its word.
    """
    gold: dict[float, list[float]] = defaultdict(list)
    for sample in samples:
        gold[sample["step"]].append(judge(sample["response"]))
    return [{**row, **({"gold_mean": fmean(gold[row["step"]])} if row["step"] in gold else {})} for row in rows]


def write_report(run_dir: Path, *, samples: int = 12) -> Path:
    """Write ``report.html`` into the run's folder and return its path.

    ``samples`` is the number of held-out prompts shown with both policies' responses.
    Raises ``DataError`` when the folder holds nothing to report on.
    """
    rows = [row for row in read_lines(run_dir / METRICS_FILE) if isinstance(row.get("step"), int | float)]
    summary, evaluation = read_summary(run_dir), load_evaluation(run_dir)
    reward = _read_json(run_dir / "reward" / QUALITY_FILE)
    if not (rows or summary or evaluation or reward):
        raise DataError(
            f"{run_dir} holds no metrics, evaluation or reward model yet; run rlhf-ray ppo, dpo, sft or demo first"
        )
    config_text = _read_text(run_dir / RESOLVED_FILE)
    if SIMULATED_ANNOTATOR in (reward or {}).get("annotators", ()):
        rows = with_gold(rows, read_lines(run_dir / SAMPLES_FILE), VaderJudge().score)
    sections, absent = draw_all(rows)
    page = _template("report.html").render(
        name=run_dir.resolve().name,
        summary=summary,
        facts=_facts(rows, summary, config_text),
        notice=_simulated_notice(summary, evaluation, reward),
        about_gold=_about_gold(evaluation.judge, any(f"{stage}_steps" in summary for stage in ("sft", "dpo")))
        if evaluation
        else "",
        figures=headline(summary, evaluation, reward),
        sections=sections,
        absent=absent,
        step_mean=math.ceil(len(rows) / MAX_POINTS),
        frame={"left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM, "width": WIDTH, "height": HEIGHT},
        evaluation=evaluation,
        comparison=comparison_rows(evaluation) if evaluation else [],
        samples=first_of_each_prompt(evaluation.samples if evaluation else (), samples),
        reward=reward_section(reward),
        stages=_stage_bars(summary),
        config_text=config_text,
        **_written(),
    )
    return _write(run_dir / REPORT_FILE, page)


def write_comparison_page(path: Path, evaluation: Evaluation, *, samples: int = 12) -> Path:
    """Write a comparison of any two policies as a page of its own and return its path.

    ``samples`` is the number of prompts shown with both policies' responses.
    """
    page = _template("comparison.html").render(
        notice=_simulated_notice({}, evaluation, None),
        figures=[*_evaluated(evaluation), _kl({}, evaluation)],
        evaluation=evaluation,
        about_gold=_about_gold(evaluation.judge, False),
        comparison=comparison_rows(evaluation),
        samples=first_of_each_prompt(evaluation.samples, samples),
        **_written(),
    )
    return _write(path, page)


def _template(name: str) -> Template:
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template(name)


def _written() -> dict[str, str]:
    return {"version": _version(), "written": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")}


def _write(path: Path, page: str) -> Path:
    temporary = path.with_suffix(".html.tmp")
    temporary.write_text(page, "utf-8")
    temporary.replace(path)
    return path


def _about_gold(judge: str, by_preference: bool) -> str:
    """What the gold score is, and what follows where it and the score part ways."""
    if judge.startswith("scorer "):
        return (
            f"Gold is what {judge} adds to the loop's score: how much of it each policy gets. A policy that was "
            "trained on it has learned to please it, so it is no independent judge."
        )
    if judge != "vader":
        return (
            f"Gold is the verdict of {judge}; where the score rises and gold does not, the scorers are over-optimised."
        )
    if by_preference:
        return "Gold is VADER's verdict; where it also made the comparisons, the policy learned from it directly."
    return (
        "Gold is the verdict of VADER, a judge that PPO never sees; where the score rises and gold does not, the "
        "reward model is being over-optimised."
    )


def draw_all(rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, list[Chart]], list[str]]:
    """The charts under their headings, and the titles of those that had nothing to show."""
    sections: dict[str, list[Chart]] = {}
    absent: list[str] = []
    tuned = any("sft_loss" in row or "dpo_loss" in row for row in rows)
    for heading, specs in (OF_TUNING if tuned else CHARTS).items():
        for spec in specs:
            chart = draw(spec, rows)
            if chart is None:
                absent.append(spec.title)
            else:
                sections.setdefault(heading, []).append(chart)
    return sections, absent


def headline(
    summary: Mapping[str, Any], evaluation: Evaluation | None, reward: Mapping[str, Any] | None
) -> list[Figure]:
    """The figures at the top of the page, in the order a reader asks for them."""
    tuned = _tuned(summary)
    return [*_evaluated(evaluation), _kl(summary, evaluation), *(tuned or (_accuracy(reward), *_loop(summary)))]


def _evaluated(evaluation: Evaluation | None) -> list[Figure]:
    if evaluation is None:
        note = "no evaluation yet: rlhf-ray evaluate"
        return [Figure(label=label, value=None, note=note) for label in ("Gold score", "Win rate")]
    gain, win = evaluation.gold_gain, evaluation.win_rate
    return [
        Figure(
            label="Gold score",
            value=f"{evaluation.base.gold:.2f} → {evaluation.trained.gold:.2f}",
            note=f"{gain.value:+.2f} ({gain.low:+.2f} to {gain.high:+.2f}) on {evaluation.prompts} prompts, "
            f"judged by {evaluation.judge}",
            good=True if gain.low > 0 else False if gain.high < 0 else None,
        ),
        Figure(
            label="Win rate",
            value=f"{win.value:.0%}",
            note=f"{win.low:.0%} to {win.high:.0%}, {evaluation.trained_name} over {evaluation.base_name}; "
            f"ties ({evaluation.tie_share:.0%}) count half",
            good=True if win.low > 0.5 else False if win.high < 0.5 else None,
        ),
    ]


def _kl(summary: Mapping[str, Any], evaluation: Evaluation | None) -> Figure:
    if evaluation is not None:
        return Figure(
            label="KL",
            value=f"{evaluation.trained.kl:.1f}",
            note=f"nats per response of {evaluation.trained_name}, to the reference",
        )
    if summary.get("kl_last") is not None:
        return Figure(label="KL", value=f"{summary['kl_last']:.1f}", note="nats per response at the last step")
    note = "no evaluation yet: rlhf-ray evaluate" if _tuned(summary) else "no PPO step yet: rlhf-ray ppo"
    return Figure(label="KL", value=None, note=note)


def _accuracy(reward: Mapping[str, Any] | None) -> Figure:
    if reward is None or reward.get("accuracy") is None:
        return Figure(label="Reward-model accuracy", value=None, note="not trained in this run: rlhf-ray reward")
    interval = ""
    if reward.get("accuracy_low") is not None and reward.get("accuracy_high") is not None:
        interval = f"{reward['accuracy_low']:.0%} to {reward['accuracy_high']:.0%} "
    pairs = f"on {reward['pairs']} held-out pairs" if "pairs" in reward else "on held-out pairs"
    return Figure(label="Reward-model accuracy", value=f"{reward['accuracy']:.0%}", note=interval + pairs)


def _tuned(summary: Mapping[str, Any]) -> list[Figure]:
    """What SFT or DPO taught the policy, on held-out prompts; none where neither did."""
    if summary.get("dpo_accuracy") is not None:
        low, high = summary["dpo_accuracy_low"], summary["dpo_accuracy_high"]
        return [
            Figure(
                label="Implicit-reward accuracy",
                value=f"{summary['dpo_accuracy']:.0%}",
                note=f"{low:.0%} to {high:.0%} on {summary['dpo_pairs']} held-out pairs",
                good=True if low > 0.5 else False if high < 0.5 else None,
            ),
            Figure(
                label="DPO loss",
                value=f"{summary['dpo_loss']:.3f}",
                note=f"nats a pair, mean of {summary['dpo_steps']} steps on {summary['dpo_train_pairs']} pairs",
            ),
        ]
    if summary.get("sft_holdout_loss") is not None:
        before, after = summary["sft_holdout_loss_before"], summary["sft_holdout_loss"]
        return [
            Figure(
                label="Loss on held-out responses",
                value=f"{before:.2f} → {after:.2f}",
                note=f"nats a token, {summary['sft_holdout_responses']} responses",
                good=after < before,
            ),
            Figure(
                label="SFT loss",
                value=f"{summary['sft_loss']:.3f}",
                note=f"nats a token, mean of {summary['sft_steps']} steps on {summary['sft_responses']} responses",
            ),
        ]
    return []


def _loop(summary: Mapping[str, Any]) -> list[Figure]:
    def shown(key: str, form: str) -> str | None:
        return None if summary.get(key) is None else format(summary[key], form)

    absent = "no PPO run yet: rlhf-ray ppo"
    speed, tokens = shown("samples_per_second", ".1f"), shown("tokens_per_second", ".0f")
    lost, twice = summary.get("lost"), summary.get("trained_twice")
    known = lost is not None and twice is not None
    return [
        Figure(
            label="Samples per second", value=speed, note=f"{tokens} tokens/s" if tokens else "" if speed else absent
        ),
        Figure(
            label="Lost · trained twice",
            value=f"{lost} · {twice}" if known else None,
            note="samples, by the prompt ledger" if known else absent,
            good=None if not known else not (lost or twice),
        ),
    ]


def _facts(rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any], config_text: str | None) -> list[str]:
    config = yaml.safe_load(config_text) if config_text else {}
    facts = [str(config["model"]["path"])] if config else []
    if rows:
        facts.append(f"{int(rows[-1]['step'])} steps")
    if summary.get("samples") is not None:
        facts.append(f"{summary['samples']} samples")
    if summary.get("staleness_max") is not None:
        facts.append(f"staleness at most {short(summary['staleness_max'])}")
    if summary.get("wall_seconds") is not None:
        facts.append(duration(summary["wall_seconds"]))
    return facts


def _stage_bars(summary: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    """(stage, duration, per cent of the longest) of the learner's stages, whose seconds add up over the run."""
    timed = summary.get("stage_seconds") or {}
    seconds = {name: float(timed[key]) for key, name in LEARNER_STAGES.items() if timed.get(key) is not None}
    longest = max(seconds.values(), default=0) or 1
    return [(name, duration(s), round(100 * s / longest, 1)) for name, s in seconds.items()]


def _simulated_notice(
    summary: Mapping[str, Any], evaluation: Evaluation | None, reward: Mapping[str, Any] | None
) -> str | None:
    """What a program did in this run where people would; None where none did."""
    learners = {
        "the reward model": (reward or {}).get("annotators", ()),
        "the policy": (*summary.get("sft_annotators", ()), *summary.get("dpo_annotators", ())),
    }
    taught = [learner for learner, annotators in learners.items() if _any_simulated(annotators)]
    roles = [f"compared the responses that {' and '.join(taught)} learned from"] if taught else []
    roles += ["gave the gold scores below"] if evaluation is not None and evaluation.judge == "vader" else []
    if not roles:
        return None
    return (
        f"A program (VADER sentiment) {' and '.join(roles)}. It stands in for people: these figures show that the loop "
        "works, not what people want."
    )


def _any_simulated(annotators: Sequence[Any]) -> bool:
    return any(str(name).startswith("simulated:") for name in annotators)


def _version() -> str:
    try:
        return metadata.version("rlhf-ray")
    except metadata.PackageNotFoundError:
        return "(from source)"


def _read_text(path: Path) -> str | None:
    return path.read_text("utf-8") if path.exists() else None


def _read_json(path: Path) -> dict[str, Any] | None:
    return dict(json.loads(path.read_text("utf-8"))) if path.exists() else None
