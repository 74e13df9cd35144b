"""Every stage as a person sees it, and the demo: those that make a policy by PPO, one after the other.

collect ─► judge ─► reward ─► serve ─► ppo ─► evaluate ─► report

The first four make the served reward model: where no scorer is that model, the demo begins with ppo.
"""

from __future__ import annotations

import os
import time
from typing import Any

import ray

from rlhf_ray.cluster import PeakMemory, check_resources, connected, trainer_need, worker_needs
from rlhf_ray.config import RunConfig
from rlhf_ray.metrics import read_summary, write_summary
from rlhf_ray.pipeline.summary import RunSummary
from rlhf_ray.report.comparison import comparison_lines
from rlhf_ray.report.console import Console
from rlhf_ray.roles.judge import VaderJudge
from rlhf_ray.stages import collect, dpo, evaluate_run, judge, ppo, report, reward, serve, sft
from rlhf_ray.stages.evaluate import Evaluation, pairing
from rlhf_ray.stages.evaluate_input import make_judge
from rlhf_ray.stages.prepare import check_scorers, prepare
from rlhf_ray.stages.serve import ServedReward

STAGES = ("collect", "judge", "reward", "serve", "ppo", "evaluate", "report")


def run_demo(config: RunConfig, console: Console) -> dict[str, Any]:
    """Run all stages into ``runs/NAME`` and return what ``summary.json`` holds in the end.

    After a Ctrl-C during PPO nothing further is run.

    Raises:
        InputError: something that cannot work, before the stage that needs it.
        RlhfRayError: the cause that ended a stage.
    """
    check_inputs(config)
    console.plan(STAGES if config.serves_reward else STAGES[STAGES.index("ppo") :])
    began = time.monotonic()
    with PeakMemory() as memory, connected():
        if config.serves_reward:
            check_resources([trainer_need(config.reward)])
        check_resources(worker_needs(config))
        service = None
        if config.serves_reward:
            run_collect(config, console)
            run_judge(config, console)
            run_reward(config, console)
            service = _start_service(config, console)
        try:
            if run_ppo(config, console, service=service).status == "interrupted":
                return read_summary(config.run_dir)
            run_evaluate(config, console, service=service)
        finally:
            if service is not None:
                serve.stop_service(service.name)
    summary = write_summary(
        config.run_dir, {"wall_seconds": time.monotonic() - began, "peak_memory_gb": memory.peak_bytes / 1e9}
    )
    run_report(config, console)
    return summary


def check_inputs(config: RunConfig) -> None:
    """Refuse now what a later stage would refuse after minutes of work: a prompt file, the model, a scorer, a port."""
    if config.serves_reward:
        VaderJudge()
    make_judge(config)
    check_scorers(config)
    prepared = prepare(config, config.prompts.path, config.prompts.eval_path)
    prepared.encode(config.prompts.path)
    prepared.encode(config.prompts.eval_path)
    on_a_cluster = ray.is_initialized() or "RAY_ADDRESS" in os.environ  # there Serve may have the port already
    if config.serves_reward and not on_a_cluster:
        serve.free_port(config.serve)


def run_collect(config: RunConfig, console: Console) -> None:
    """Sample candidates."""
    about = f"{config.collect.completions} responses to each prompt"
    with console.stage("collect", about) as stage, console.progress("responses") as progress:
        done = collect.collect(config, progress)
        stage.outcome = f"{done.completions} responses to {done.prompts} prompts, {done.tokens} tokens"


def run_judge(config: RunConfig, console: Console) -> None:
    """Compare them."""
    with console.stage("judge", "a simulated labeller (VADER sentiment) stands in for people") as stage:
        judged = judge.judge(config)
        stage.outcome = f"{judged.train_pairs} pairs to train on, {judged.holdout_pairs} held out"


def run_reward(config: RunConfig, console: Console, *, resume: bool = False) -> None:
    """Train the reward model."""
    with console.stage("reward", "training the reward model on the preferences") as stage:
        with console.progress("optimiser steps") as progress:
            done = reward.train_reward(
                config, lambda seen: progress(int(seen["step"]), int(seen["steps"])), resume=resume
            )
        interval = f"{done.accuracy_low:.2f} to {done.accuracy_high:.2f}"
        stage.outcome = f"accuracy {done.accuracy:.2f} ({interval}) on {done.pairs} held-out pairs"


def run_sft(config: RunConfig, console: Console, *, resume: bool = False) -> None:
    """Teach the policy given responses."""
    with console.stage("sft", "training the policy on given responses") as stage:
        with console.progress("optimiser steps") as progress:
            done = sft.train_sft(config, lambda seen: progress(int(seen["step"]), int(seen["steps"])), resume=resume)
        stage.outcome = (
            f"loss on {done.holdout_responses} held-out responses {done.holdout_loss_before:.2f} to "
            f"{done.holdout_loss:.2f} nats a token"
        )


def run_dpo(config: RunConfig, console: Console, *, resume: bool = False) -> None:
    """Teach the policy preferences."""
    with console.stage("dpo", "training the policy on the preferences") as stage:
        with console.progress("optimiser steps") as progress:
            done = dpo.train_dpo(config, lambda seen: progress(int(seen["step"]), int(seen["steps"])), resume=resume)
        interval = f"{done.accuracy_low:.2f} to {done.accuracy_high:.2f}"
        stage.outcome = f"accuracy {done.accuracy:.2f} ({interval}) on {done.pairs} held-out pairs"


def run_ppo(
    config: RunConfig, console: Console, *, service: ServedReward | None = None, resume: bool = False
) -> RunSummary:
    """Improve the policy."""
    section = config.ppo
    about = f"{section.steps} steps of {section.batch_table}, staleness at most {section.max_staleness}"
    with console.stage("ppo", about) as stage, console.steps(config.name, section.steps) as table:
        summary = ppo.run_ppo(config, resume=resume, service=service, on_step=table.update)
        stage.outcome = f"{summary.status} at step {summary.steps}, {summary.samples_per_second:.2f} samples/s"
    return summary


def run_evaluate(config: RunConfig, console: Console, *, service: ServedReward | None = None) -> Evaluation:
    """Compare two policies."""
    pair = pairing(config)
    about = f"{pair.trained.name} against {pair.base.name} on {pair.prompts}, judged by {pair.judge}"
    with console.stage("evaluate", about) as stage, console.progress("responses") as progress:
        found = evaluate_run.run_evaluate(config, service=service, progress=progress)
        win = found.win_rate
        stage.outcome = (
            f"gold {found.base.gold:.2f} to {found.trained.gold:.2f}, win rate {win.value:.2f} "
            f"({win.low:.2f} to {win.high:.2f}), KL {found.trained.kl:.1f} nats"
        )
    for line in comparison_lines(found):
        console.say(f"      {line}".rstrip())
    return found


def run_comparison_page(config: RunConfig, console: Console, found: Evaluation) -> None:
    """Write the page of a comparison that is not the run's own."""
    with console.stage("report", "the comparison as one page") as stage:
        output = pairing(config).output
        stage.outcome = f"wrote {output} and {report.write_comparison(config, found)}"


def run_report(config: RunConfig, console: Console) -> None:
    """Write the page."""
    with console.stage("report", "one page with everything") as stage:
        stage.outcome = f"wrote {report.write(config)}"


def _start_service(config: RunConfig, console: Console) -> ServedReward:
    with console.stage("serve", "the reward model on Ray Serve, for the loop and over HTTP") as stage:
        service = serve.start_service(config, model_folder=ppo.reward_model_folder(config))
        stage.outcome = f"listening on {service.url} while the demo runs"
    console.say(f"      try: {serve.curl_line(service.url)}")
    return service
