"""The commands take one configuration, refuse what cannot be right in a sentence, and never overwrite unasked."""

from __future__ import annotations

import errno
import fcntl
import json
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
from ray.exceptions import RayTaskError
from typer.testing import CliRunner

from rlhf_ray.cli import PRODUCTS, app
from rlhf_ray.config import RunConfig
from rlhf_ray.errors import ModelError, ParityError
from rlhf_ray.stages.evaluate import EvalRow, Evaluation, compare

COMMANDS = ("demo", "collect", "judge", "reward", "serve", "sft", "dpo", "ppo", "evaluate", "report")


@pytest.fixture(autouse=True)
def _own_process_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a command does to its whole process (quiet libraries, a log on the screen) stays out of the test process."""
    monkeypatch.setattr("rlhf_ray.report.quiet.quiet_libraries", lambda: None)
    monkeypatch.setattr("rlhf_ray.report.console.Console.show_logs", lambda self: None)


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(
        f"name: mine\noutput_dir: {tmp_path / 'runs'}\nmodel: {{path: some/model}}\n"
        "prompts: {path: train.jsonl, eval_path: held_out.jsonl}\n"
    )
    return path


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    """Puts a function in a stage's place and keeps what it was called with."""

    monkeypatch.setattr("rlhf_ray.stages.report.write", lambda config: config.run_dir / "report.html")

    def replace(module: str, name: str, result: Any = None, error: BaseException | None = None) -> Any:
        calls: list[dict[str, Any]] = []

        def stage(*args: Any, **kwargs: Any) -> Any:
            calls.append({"config": args[0], **kwargs})
            if error is not None:
                raise error
            return result

        monkeypatch.setattr(f"{module}.{name}", stage)
        return calls

    return replace


PPO_SUMMARY = types.SimpleNamespace(status="finished", steps=100, samples_per_second=3.5)


def run(*arguments: object) -> click.testing.Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_help_names_every_command() -> None:
    result = run("--help")
    assert result.exit_code == 0
    for command in (*COMMANDS, "config", "status", "scale"):
        assert f" {command} " in result.output


@pytest.mark.parametrize("command", [*COMMANDS, "config", "status", "scale"])
def test_each_command_s_help_ends_with_examples(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"rlhf-ray {command}" in result.output.partition("Examples")[2]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_a_wrong_key_with_exit_code_2_and_no_traceback(command: str, config_file: Path) -> None:
    result = run(command, "--config", config_file, "--set", "lerner.lr=1", "--set", "ppo.steps=x")
    assert result.exit_code == 2
    assert result.stderr.splitlines() == [
        'error: ppo.steps (--set) must be a whole number, not "x"',
        "error: lerner (--set) is not a key; did you mean learner",
    ]


@pytest.mark.parametrize("command", [c for c in COMMANDS if c != "demo"])
def test_a_configuration_must_be_given(command: str) -> None:
    result = run(command)
    assert result.exit_code == 2
    assert "--config" in result.stderr


def test_the_demo_runs_its_recipe_by_default(stand_in: Callable[..., Any], tmp_path: Path) -> None:
    calls = stand_in("rlhf_ray.demo", "run_demo", {"status": "finished"})
    result = run("demo", "--set", f"output_dir={tmp_path}", "--set", "seed=5")
    assert result.exit_code == 0, result.output
    config: RunConfig = calls[0]["config"]
    assert (config.name, config.seed, config.sampling.max_new_tokens) == ("demo", 5, 24)
    assert str(tmp_path / "demo" / "report.html") in result.output.replace("\n", "")


def test_overrides_reach_the_stage(stand_in: Callable[..., Any], config_file: Path) -> None:
    calls = stand_in("rlhf_ray.stages.ppo", "run_ppo", PPO_SUMMARY)
    result = run("ppo", "-c", config_file, "--set", "learner.lr=1e-6", "--set", "ppo.steps=7")
    assert result.exit_code == 0, result.output
    assert (calls[0]["config"].learner.lr, calls[0]["config"].ppo.steps, calls[0]["resume"]) == (1e-6, 7, False)
    assert "finished at step 100, 3.50 samples/s; took" in result.output


@pytest.fixture
def evaluation() -> Evaluation:
    row = EvalRow(prompt="The train", sample=0, response="so", tokens=1, truncated=False, gold=0.0, score=None, kl=0.0)
    return compare([row], [replace(row, response="a joy", gold=1.0)])


def test_evaluate_takes_the_pair_the_prompts_and_the_judge_as_flags(
    stand_in: Callable[..., Any], config_file: Path, run_dir: Path, tmp_path: Path, evaluation: Evaluation
) -> None:
    calls = stand_in("rlhf_ray.stages.evaluate_run", "run_evaluate", evaluation)
    output = tmp_path / "result.json"
    flags = {"policy": "org/a", "baseline": "runs/b: c/policy", "prompts": "007", "judge": "my:judge", "output": output}
    arguments = [argument for flag, value in flags.items() for argument in (f"--{flag}", value)]
    result = run("evaluate", "-c", config_file, *arguments, "--set", "evaluate.policy=org/other")
    assert result.exit_code == 0, result.output
    section = calls[0]["config"].evaluate
    assert {flag: getattr(section, flag) for flag in flags} == flags, "a flag goes before --set"
    assert "evaluate: a against b: c on 007, judged by my:judge" in result.output
    assert "trained wins 100.0% (95 % interval 100.0% to 100.0%), ties (0%) count half; judged by vader" in (
        result.output
    )
    assert "a joy" in (tmp_path / "result.html").read_text()
    assert not (run_dir / "report.html").exists()


def test_evaluate_without_flags_renews_the_run_s_report(
    stand_in: Callable[..., Any], config_file: Path, run_dir: Path, evaluation: Evaluation
) -> None:
    calls = stand_in("rlhf_ray.stages.evaluate_run", "run_evaluate", evaluation)
    result = run("evaluate", "-c", config_file)
    assert result.exit_code == 0, result.output
    assert calls[0]["config"].evaluate.of_the_run
    assert f"wrote {run_dir / 'report.html'}" in result.output
    assert [path.name for path in run_dir.iterdir()] == [".lock"]


def test_evaluate_refuses_an_unknown_judge_in_a_sentence(config_file: Path) -> None:
    result = run("evaluate", "-c", config_file, "--judge", "me")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: evaluate.judge = me is neither vader, nor module:name")


def test_an_input_error_from_a_stage_is_one_sentence_and_exit_code_2(
    stand_in: Callable[..., Any], config_file: Path
) -> None:
    stand_in("rlhf_ray.stages.ppo", "run_ppo", error=ModelError("there is no reward model in runs/mine/reward"))
    result = run("ppo", "-c", config_file)
    assert (result.exit_code, result.stderr) == (2, "error: there is no reward model in runs/mine/reward\n")


def test_a_failed_run_tells_its_cause_with_exit_code_1(stand_in: Callable[..., Any], config_file: Path) -> None:
    stand_in("rlhf_ray.stages.ppo", "run_ppo", error=ParityError("generator-0 is 0.4 nats off"))
    result = run("ppo", "-c", config_file)
    assert (result.exit_code, result.stderr) == (1, "error: generator-0 is 0.4 nats off\n")


def test_an_error_that_came_through_a_worker_or_a_task_group_is_told_without_its_wrapping(
    stand_in: Callable[..., Any], config_file: Path
) -> None:
    class RemoteError(Exception):
        cause = ModelError("the folder is empty")

    stand_in("rlhf_ray.stages.ppo", "run_ppo", error=ExceptionGroup("tasks", [RemoteError("a long remote traceback")]))
    result = run("ppo", "-c", config_file)
    assert (result.exit_code, result.stderr) == (2, "error: the folder is empty\n")


def test_a_full_disk_is_told_in_a_sentence_whoever_found_it(stand_in: Callable[..., Any], config_file: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "/runs/first/metrics.jsonl")
    remote = RayTaskError("export", "a long traceback", full).as_instanceof_cause()
    stand_in("rlhf_ray.stages.ppo", "run_ppo", error=ExceptionGroup("tasks", [remote]))
    result = run("ppo", "-c", config_file)
    assert result.exit_code == 1
    assert result.stderr == (
        "error: the disk is full at /runs/first/metrics.jsonl; make room and run it again, with --resume where "
        "the command has it\n"
    )


def test_a_bug_keeps_its_traceback(stand_in: Callable[..., Any], config_file: Path) -> None:
    stand_in("rlhf_ray.stages.ppo", "run_ppo", error=ZeroDivisionError("a bug"))
    result = run("ppo", "-c", config_file)
    assert result.exit_code == 1
    assert isinstance(result.exception, ZeroDivisionError)


def test_ctrl_c_ends_with_130(stand_in: Callable[..., Any], config_file: Path) -> None:
    stand_in("rlhf_ray.stages.ppo", "run_ppo", error=KeyboardInterrupt())
    result = run("ppo", "-c", config_file)
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")


def test_a_run_that_was_stopped_after_its_checkpoint_ends_with_130_too(
    stand_in: Callable[..., Any], config_file: Path
) -> None:
    stopped = types.SimpleNamespace(status="interrupted", steps=4, samples_per_second=3.5)
    stand_in("rlhf_ray.stages.ppo", "run_ppo", stopped)
    result = run("ppo", "-c", config_file)
    assert result.exit_code == 130
    assert "interrupted at step 4" in result.output


def test_a_folder_in_use_is_refused_with_the_three_ways_out(
    stand_in: Callable[..., Any], config_file: Path, run_dir: Path
) -> None:
    calls = stand_in("rlhf_ray.stages.ppo", "run_ppo", PPO_SUMMARY)
    (run_dir / "metrics.jsonl").write_text('{"step": 1}\n')
    result = run("ppo", "-c", config_file)
    assert (result.exit_code, calls) == (2, [])
    assert result.stderr == (
        f"error: {run_dir} already holds metrics.jsonl of an earlier run; choose another folder with --set name=..., "
        "--resume to go on, or --overwrite to delete it\n"
    )


def test_resume_goes_on_in_a_folder_in_use(stand_in: Callable[..., Any], config_file: Path, run_dir: Path) -> None:
    calls = stand_in("rlhf_ray.stages.ppo", "run_ppo", PPO_SUMMARY)
    (run_dir / "metrics.jsonl").write_text('{"step": 1}\n')
    assert run("ppo", "-c", config_file, "--resume").exit_code == 0
    assert calls[0]["resume"] is True
    assert (run_dir / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_overwrite_deletes_what_ppo_wrote_and_nothing_else(
    stand_in: Callable[..., Any], config_file: Path, run_dir: Path
) -> None:
    stand_in("rlhf_ray.stages.ppo", "run_ppo", PPO_SUMMARY)
    for name in ("reward", "policy", "checkpoints", "my_notes"):
        (run_dir / name).mkdir()
        (run_dir / name / "file").write_text("x")
    for name in ("metrics.jsonl", "evaluation.json", "preferences.jsonl"):
        (run_dir / name).write_text("x")
    assert run("ppo", "-c", config_file, "--overwrite").exit_code == 0
    left = {path.name for path in run_dir.iterdir()}
    assert left == {"reward", "my_notes", "preferences.jsonl", ".lock"}


def test_overwrite_keeps_what_the_summary_says_of_the_reward_model(
    stand_in: Callable[..., Any], config_file: Path, run_dir: Path
) -> None:
    stand_in("rlhf_ray.stages.ppo", "run_ppo", PPO_SUMMARY)
    (run_dir / "summary.json").write_text('{"reward_accuracy": 0.75, "status": "finished", "win_rate": 0.9}')
    assert run("ppo", "-c", config_file, "--overwrite").exit_code == 0
    assert json.loads((run_dir / "summary.json").read_text()) == {"reward_accuracy": 0.75}


@pytest.mark.parametrize("command", ["collect", "reward", "sft", "dpo", "ppo"])
def test_overwrite_loses_nothing_when_the_new_input_is_refused(
    config_file: Path, run_dir: Path, tmp_path: Path, command: str
) -> None:
    """Nothing stands in: each command meets a model folder that is not there, or prompts that are not."""
    kept = {"completions.jsonl": "1", "metrics.jsonl": "2", "summary.json": '{"status": "finished"}'}
    for name, text in kept.items():
        (run_dir / name).write_text(text)
    for name in ("reward", "policy", "checkpoints"):
        (run_dir / name).mkdir()
        (run_dir / name / "file").write_text(name)
    missing = f"model.path={tmp_path / 'nowhere'}"
    assert run(command, "-c", config_file, "--overwrite", "--set", missing).exit_code == 2
    assert {name: (run_dir / name).read_text() for name in kept} == kept
    assert {name: (run_dir / name / "file").read_text() for name in ("reward", "policy", "checkpoints")} == {
        name: name for name in ("reward", "policy", "checkpoints")
    }
    assert not list(run_dir.glob(".replaced-*"))


def test_a_tilde_in_output_dir_is_the_home_folder(
    stand_in: Callable[..., Any], config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in("rlhf_ray.stages.ppo", "run_ppo", PPO_SUMMARY)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert run("ppo", "-c", config_file, "--set", "output_dir=~/runs").exit_code == 0
    assert (tmp_path / "home" / "runs" / "mine").is_dir()
    assert not (tmp_path / "~").exists()


def test_a_reward_model_s_training_is_resumed_in_a_folder_with_its_checkpoints(
    stand_in: Callable[..., Any], config_file: Path, run_dir: Path
) -> None:
    calls = stand_in("rlhf_ray.demo", "run_reward")
    (run_dir / "reward.checkpoints" / "step-000500").mkdir(parents=True)
    refused = run("reward", "-c", config_file)
    assert refused.exit_code == 2
    assert "already holds reward.checkpoints of an earlier run" in refused.stderr
    assert "--resume to go on, or --overwrite to delete it" in refused.stderr
    assert run("reward", "-c", config_file, "--resume").exit_code == 0
    assert [call["resume"] for call in calls] == [True]


@pytest.mark.parametrize("command", ["sft", "dpo"])
def test_a_policy_of_another_trainer_is_in_the_way_and_goes_with_all_that_describes_it(
    stand_in: Callable[..., Any], config_file: Path, run_dir: Path, command: str
) -> None:
    calls = stand_in("rlhf_ray.demo", f"run_{command}")
    (run_dir / "policy").mkdir()
    (run_dir / "policy" / "config.json").write_text("{}")
    for name in ("metrics.jsonl", "evaluation.json", "preferences.jsonl"):
        (run_dir / name).write_text("x")
    refused = run(command, "-c", config_file)
    assert refused.exit_code == 2
    assert "already holds metrics.jsonl, policy of an earlier run" in refused.stderr
    assert "--resume" not in refused.stderr
    assert run(command, "-c", config_file, "--overwrite").exit_code == 0
    assert {path.name for path in run_dir.iterdir()} == {"preferences.jsonl", ".lock"}
    assert [call["resume"] for call in calls] == [False]


@pytest.mark.parametrize("command", ["sft", "dpo"])
def test_a_policy_s_training_is_resumed_in_a_folder_with_its_checkpoints(
    stand_in: Callable[..., Any], config_file: Path, run_dir: Path, command: str
) -> None:
    calls = stand_in("rlhf_ray.demo", f"run_{command}")
    (run_dir / f"{command}.checkpoints" / "step-000500").mkdir(parents=True)
    refused = run(command, "-c", config_file)
    assert refused.exit_code == 2
    assert "--resume to go on, or --overwrite to delete it" in refused.stderr
    assert run(command, "-c", config_file, "--resume").exit_code == 0
    assert [call["resume"] for call in calls] == [True]


@pytest.mark.parametrize("command", ["ppo", "reward", "sft", "dpo"])
def test_resume_and_overwrite_together_make_no_sense(config_file: Path, command: str) -> None:
    result = run(command, "-c", config_file, "--resume", "--overwrite")
    assert result.exit_code == 2
    assert "give one of them" in result.stderr


def test_the_demo_refuses_a_folder_that_any_stage_has_used(stand_in: Callable[..., Any], tmp_path: Path) -> None:
    calls = stand_in("rlhf_ray.demo", "run_demo", {})
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "completions.jsonl").write_text("x")
    result = run("demo", "--set", f"output_dir={tmp_path}")
    assert (result.exit_code, calls) == (2, [])
    assert "already holds completions.jsonl" in result.stderr
    assert run("demo", "--set", f"output_dir={tmp_path}", "--overwrite").exit_code == 0
    assert not (tmp_path / "demo" / "completions.jsonl").exists()


def test_what_a_refused_run_left_empty_is_not_in_the_way(
    stand_in: Callable[..., Any], config_file: Path, run_dir: Path
) -> None:
    stand_in("rlhf_ray.stages.ppo", "run_ppo", PPO_SUMMARY)
    (run_dir / "metrics.jsonl").touch()
    (run_dir / "checkpoints").mkdir()
    assert run("ppo", "-c", config_file).exit_code == 0


def test_a_folder_where_another_command_is_at_work_is_refused(config_file: Path, run_dir: Path) -> None:
    with (run_dir / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = run("ppo", "-c", config_file, "--overwrite")
    assert result.exit_code == 2
    assert f"another rlhf-ray command is at work in {run_dir}" in result.stderr


def test_an_output_folder_that_cannot_be_made_is_refused(config_file: Path, tmp_path: Path) -> None:
    (tmp_path / "a_file").write_text("x")
    result = run("collect", "-c", config_file, "--set", f"output_dir={tmp_path / 'a_file'}")
    assert result.exit_code == 2
    assert "cannot be made (Not a directory); set output_dir to another place" in result.stderr


def test_report_writes_the_page_of_a_run(config_file: Path, run_dir: Path) -> None:
    (run_dir / "metrics.jsonl").write_text(json.dumps({"step": 1, "score_mean": 0.5}) + "\n")
    result = run("report", "-c", config_file)
    assert result.exit_code == 0
    assert "0.5" in (run_dir / "report.html").read_text()


def test_report_of_a_run_that_has_nothing_is_refused(config_file: Path) -> None:
    result = run("report", "-c", config_file)
    assert result.exit_code == 2
    assert "holds no metrics, evaluation or reward model yet" in result.stderr


def test_config_explains_every_key() -> None:
    result = run("config")
    assert result.exit_code == 0
    assert "ppo.kl.coef  (number, default 0.05)\n    Weight of the per-token k1 estimate" in result.output
    assert "model.path  (text, required)" in result.output
    assert "learner.betas  (list of 2, default [0.9, 0.95])" in result.output
    assert "learner.value_lr  (number or null, default null)" in result.output
    assert "device  (one of auto, cpu, cuda, default auto)" in result.output
    assert "scorers  (list, default [{kind: served, name: reward, weight: 1.0}])" in result.output
    assert "scorers.N.urls  (list, required)" in result.output


def test_config_prints_a_recipe_that_loads_again(tmp_path: Path, stand_in: Callable[..., Any]) -> None:
    calls = stand_in("rlhf_ray.demo", "run_demo", {})
    copy = tmp_path / "copy.yaml"
    copy.write_text(run("config", "--recipe", "demo").output)
    assert run("demo", "-c", copy, "--set", f"output_dir={tmp_path}").exit_code == 0
    assert calls[0]["config"].name == "demo"
    assert run("config", "--recipe", "nope").exit_code == 2


def test_help_and_a_wrong_key_need_no_heavy_library() -> None:
    heavy = "{'torch', 'ray', 'vllm', 'transformers', 'numpy'}"
    code = f"""
import sys
from typer.testing import CliRunner
from rlhf_ray.cli import app
assert CliRunner().invoke(app, ["--help"]).exit_code == 0
assert CliRunner().invoke(app, ["ppo", "-c", "recipe:demo", "--set", "pro.steps=1"]).exit_code == 2
assert not {heavy} & sys.modules.keys(), {heavy} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_only_the_commands_that_train_a_policy_share_their_products() -> None:
    assert PRODUCTS["sft"] == PRODUCTS["dpo"] == PRODUCTS["ppo"], "a run has one policy"
    names = [name for stage, products in PRODUCTS.items() if stage not in ("sft", "dpo") for name in products]
    assert len(names) == len(set(names))
