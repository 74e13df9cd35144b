"""The report shows what the run left behind, invents nothing, and is safe to open."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rlhf_ray.errors import DataError
from rlhf_ray.metrics import write_json, write_summary
from rlhf_ray.report.comparison import first_of_each_prompt
from rlhf_ray.report.page import write_comparison_page, write_report
from rlhf_ray.stages.evaluate import EvalRow, PairedSample, compare, load_evaluation

WriteRun = Callable[..., Path]


class Page(HTMLParser):
    """What a browser would make of the page: its tags with attributes, and its visible text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._inside: list[str] = []
        self.feed(path.read_text("utf-8"))
        self.text = re.sub(r"\s+", " ", self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "style":
            self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag == "style":
            self._inside.pop()

    def handle_data(self, data: str) -> None:
        if not self._inside:
            self.text += f"{data} "

    def charts(self) -> dict[str, str]:
        """Chart title → its description in words."""
        labels = [attrs["aria-label"] or "" for tag, attrs in self.tags if tag == "svg"]
        return {label.partition(":")[0]: label for label in labels}


@pytest.fixture
def page(write_run: WriteRun, tmp_path: Path) -> Page:
    return Page(write_report(write_run(tmp_path / "made-up")))


def test_the_headline_gives_the_figures_with_their_intervals(page: Page) -> None:
    for figure in (
        "Gold score 0.10 → 0.60 +0.50 (+0.50 to +0.50) on 8 prompts, judged by vader",
        "Win rate 100% 100% to 100%, trained over base; ties (0%) count half",
        "KL 6.0 nats per response of trained, to the reference",
        "Reward-model accuracy 74% 65% to 82% on 96 held-out pairs",
        "Samples per second 4.0 92 tokens/s",
        "Lost · trained twice 0 · 0 samples, by the prompt ledger",
    ):
        assert figure in page.text


def test_the_head_names_the_run_its_model_and_how_it_ended(page: Page) -> None:
    assert "made-up finished some/model-135M 60 steps 1920 samples staleness at most 1 12 min 34 s" in page.text


def test_the_curves_go_from_the_first_step_to_the_last(page: Page) -> None:
    charts = page.charts()
    assert charts["Score"] == "Score: score from 0.1 at step 1 to 1.908 at step 60"
    assert charts["KL to the reference"] == (
        "KL to the reference: k1 from 0.4 at step 1 to 7.631 at step 60; k3 from 0.425 at step 1 to 8.108 at step 60"
    )
    for title in ("Entropy", "Response length", "Truncated share", "Staleness", "Seconds by stage", "Clip fraction"):
        assert title in charts
    assert "Not recorded in this run: Gold score." in page.text


def test_a_program_that_stood_in_for_people_is_named(page: Page) -> None:
    assert "Simulated labeller. A program (VADER sentiment) compared the responses" in page.text
    assert "It stands in for people" in page.text


def test_both_responses_stand_side_by_side(page: Page) -> None:
    assert "The <train> number 3 base gold 0.10 score 0.00 It was <i>dull</i>, number 3." in page.text
    assert "trained gold 0.60 score 1.50 It was a joy, number 3!" in page.text


def test_what_a_model_wrote_is_shown_and_never_run(page: Page, hostile: str) -> None:
    assert hostile in page.text
    assert not {"script", "train"} & {tag for tag, _ in page.tags}
    assert all(attrs for tag, attrs in page.tags if tag == "i"), "ours have a class or a style, the model's had none"
    policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_the_page_fetches_nothing(page: Page, tmp_path: Path) -> None:
    assert not [attrs for _, attrs in page.tags if {"src", "href"} & attrs.keys()]
    assert "url(" not in (tmp_path / "made-up" / "report.html").read_text("utf-8")


def test_the_configuration_is_in_the_page(page: Page) -> None:
    assert "name: made-up model: path: some/model-135M" in page.text


def test_the_learner_s_stages_are_drawn_to_one_scale(page: Page) -> None:
    widths = [attrs["style"] for tag, attrs in page.tags if tag == "i" and "style" in attrs]
    assert widths == ["width: 100.0%", "width: 66.7%", "width: 5.6%"]
    assert "training 4 min 30 s waiting for samples 3 min 00 s publishing 15 s" in page.text


def test_a_run_without_evaluation_says_so(write_run: WriteRun, tmp_path: Path) -> None:
    run = write_run(tmp_path / "young")
    (run / "evaluation.json").unlink()
    page = Page(write_report(run))
    assert "Gold score not there yet no evaluation yet: rlhf-ray evaluate" in page.text
    assert "Win rate not there yet" in page.text
    assert "KL 7.6 nats per response at the last step" in page.text
    assert "gave the gold scores" not in page.text


def test_a_reward_model_alone_makes_a_page_without_curves(tmp_path: Path) -> None:
    (tmp_path / "reward").mkdir()
    write_json(tmp_path / "reward" / "reward_report.json", {"accuracy": 0.71, "annotators": ["alice", "bob"]})
    page = Page(write_report(tmp_path))
    assert "Reward-model accuracy 71% on held-out pairs" in page.text
    assert "No training step has been recorded yet" in page.text
    assert "Lost · trained twice not there yet" in page.text
    assert "Simulated labeller" not in page.text


def dpo_run(run_dir: Path) -> Path:
    """As `dpo` and `evaluate` leave it where there is no reward model."""
    run_dir.mkdir()
    steps = [{"step": step, "dpo_loss": 0.7 - step / 100, "dpo_accuracy": 0.5, "dpo_per_second": 2} for step in (3, 6)]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps))
    figures = {"accuracy": 0.8, "accuracy_low": 0.7, "accuracy_high": 0.87, "pairs": 90, "loss": 0.6, "steps": 6}
    more = {"train_pairs": 48, "annotators": ["simulated:vader"]}
    write_summary(run_dir, {"status": "finished", **{f"dpo_{key}": value for key, value in (figures | more).items()}})
    answers = [
        EvalRow(prompt="p", sample=0, response=text, tokens=2, truncated=False, gold=gold, score=None, kl=4 * gold)
        for text, gold in (("so so", 0.0), ("a joy", 0.5))
    ]
    write_json(run_dir / "evaluation.json", asdict(compare(answers[:1], answers[1:])))
    return run_dir


def test_a_policy_by_dpo_has_its_own_figures_and_curves(tmp_path: Path) -> None:
    page = Page(write_report(dpo_run(tmp_path / "direct")))
    assert "direct finished 6 steps" in page.text
    assert "Implicit-reward accuracy 80% 70% to 87% on 90 held-out pairs" in page.text
    assert "DPO loss 0.600 nats a pair, mean of 6 steps on 48 pairs" in page.text
    assert page.charts()["Loss"] == "Loss: DPO from 0.67 at step 3 to 0.64 at step 6"
    assert "Accuracy in training" in page.charts()
    assert "compared the responses that the policy learned from" in page.text
    for of_ppo in ("PPO", "Not recorded in this run", "Samples per second", "Reward-model accuracy"):
        assert of_ppo not in page.text


def test_where_nothing_scores_the_judge_alone_stands_beside_the_responses(tmp_path: Path) -> None:
    page = Page(write_report(dpo_run(tmp_path / "direct")))
    assert "Gold score 0.00 → 0.50" in page.text
    assert "base gold 0.00 so so trained gold 0.50 a joy" in page.text
    assert "Score" not in page.text.replace("Gold score", "")


def test_a_comparison_of_any_two_policies_has_a_page_of_its_own(
    write_run: WriteRun, tmp_path: Path, hostile: str
) -> None:
    of_the_run = load_evaluation(write_run(tmp_path / "run"))
    assert of_the_run is not None
    named = {"base_name": "first", "base_path": "org/first", "trained_name": "<i>second</i>", "trained_path": "second"}
    evaluation = replace(of_the_run, **named, reference="the/base", judge="mine:helpful", prompts_path="asks.jsonl")
    page = Page(write_comparison_page(tmp_path / "pair.html", evaluation, samples=2))
    for text in (
        "Gold score 0.10 → 0.60 +0.50 (+0.50 to +0.50) on 8 prompts, judged by mine:helpful",
        "Win rate 100% 100% to 100%, <i>second</i> over first; ties (0%) count half",
        "KL 6.0 nats per response of <i>second</i>, to the reference",
        "8 prompts of asks.jsonl, 1 response each from either policy. Gold is the verdict of mine:helpful;",
        "first: org/first. <i>second</i>: second. The KL of both is to the/base.",
        "Mean first <i>second</i> Gold score 0.100 0.600 Score, as PPO raises it 0.000 1.500",
        hostile,
    ):
        assert text in page.text
    assert page.text.count("The <train> number") == 2
    assert "Simulated labeller" not in page.text, "no program stood in for people that we know of"
    assert not {"script", "i"} & {tag for tag, _ in page.tags}


@pytest.mark.parametrize(
    ("judge", "about"),
    [
        ("vader", "Gold is the verdict of VADER, a judge that PPO never sees"),
        ("scorer reward", "Gold is what scorer reward adds to the loop's score"),
        ("mine:helpful", "Gold is the verdict of mine:helpful; where the score rises"),
    ],
)
def test_the_page_says_who_judged(write_run: WriteRun, tmp_path: Path, judge: str, about: str) -> None:
    run = write_run(tmp_path / "run")
    evaluation = json.loads((run / "evaluation.json").read_text())
    write_json(run / "evaluation.json", evaluation | {"judge": judge})
    page = Page(write_report(run))
    assert about in page.text
    assert f"judged by {judge}" in page.text
    assert ("and gave the gold scores below" in page.text) == (judge == "vader")


def test_a_policy_by_sft_shows_what_it_learnt_on_held_out_responses(tmp_path: Path) -> None:
    figures = {"steps": 4, "loss": 2.5, "responses": 32, "holdout_responses": 8, "annotators": []}
    losses = {"holdout_loss_before": 3.25, "holdout_loss": 2.75}
    write_summary(tmp_path, {f"sft_{key}": value for key, value in (figures | losses).items()})
    page = Page(write_report(tmp_path))
    assert "Loss on held-out responses 3.25 → 2.75 nats a token, 8 responses" in page.text
    assert "SFT loss 2.500 nats a token, mean of 4 steps on 32 responses" in page.text
    assert "Simulated labeller" not in page.text


def test_an_empty_folder_has_nothing_to_report(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no metrics, evaluation or reward model yet; run rlhf-ray ppo"):
        write_report(tmp_path)


def test_a_loss_is_coloured_as_one(tmp_path: Path) -> None:
    write_summary(tmp_path, {"status": "interrupted", "lost": 2, "trained_twice": 0})
    page = Page(write_report(tmp_path))
    assert "2 · 0" in page.text
    assert ("p", {"class": "value bad"}) in page.tags


def test_a_long_run_stays_a_small_file(write_run: WriteRun, tmp_path: Path) -> None:
    path = write_report(write_run(tmp_path / "long", steps=5000))
    page = Page(path)
    assert "Each point is the mean of 25 steps." in page.text
    assert page.charts()["Score"].endswith("at step 5000")
    assert path.stat().st_size < 1_000_000


def test_samples_are_the_first_of_each_prompt_in_order() -> None:
    pairs = [
        PairedSample(prompt=prompt, base=f"{n}", trained="", base_gold=0, trained_gold=0, base_score=0, trained_score=0)
        for prompt in ("a", "b", "c")
        for n in (1, 2)
    ]
    shown = first_of_each_prompt(pairs, 2)
    assert [(pair.prompt, pair.base) for pair in shown] == [("a", "1"), ("b", "1")]
