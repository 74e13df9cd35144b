"""The command line: one command for each word of the picture, ``demo`` for all of them, ``config`` to look things up.

Every command takes ``--config`` and ``--set``. Heavy libraries are imported by the command that needs them, so that
``--help`` and a wrong key answer at once. Exit codes: 0 done, 1 the run failed, 2 the input is wrong, 130 interrupted.
"""

from __future__ import annotations

import builtins
import errno
import fcntl
import json
import os
import shutil
import tempfile
import types
import typing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from pydantic import BaseModel

from rlhf_ray.config import SPIN_COUNT, RunConfig, load_config, load_serve_config
from rlhf_ray.config_file import config_keys, recipe_text
from rlhf_ray.errors import ConfigError, InputError, RlhfRayError

if TYPE_CHECKING:
    from rlhf_ray.report.console import Console

_OF_POLICY = (
    *("metrics.jsonl", "samples.jsonl", "quarantine.jsonl", "tensorboard", "checkpoints", "policy", "bad_sample.json"),
    *("sft.rejects.jsonl", "sft.checkpoints", "dpo.rejects.jsonl", "dpo.checkpoints"),
)
"""A run has one policy, whoever trained it: what one of the three has left is in the way of the others."""

PRODUCTS: dict[str, tuple[str, ...]] = {
    "collect": ("completions.jsonl",),
    "judge": ("preferences.jsonl", "preferences.holdout.jsonl"),
    "reward": ("reward", "reward.rejects.jsonl", "reward.checkpoints"),
    "sft": _OF_POLICY,
    "dpo": _OF_POLICY,
    "ppo": _OF_POLICY,
}
"""What a command leaves in the run's folder: its traces, and what --overwrite deletes."""
DERIVED = dict.fromkeys(("sft", "dpo", "ppo"), ("summary.json", "evaluation.json", "report.html"))
"""What describes those products and goes with them."""

app = typer.Typer(
    name="rlhf-ray",
    help="RLHF on Ray: preferences, a served reward model, and asynchronous PPO with vLLM generators.",
    epilog="Try it: rlhf-ray demo",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

data_app = typer.Typer(help="Preference data.", no_args_is_help=True, rich_markup_mode="rich")
app.add_typer(data_app, name="data")

ConfigOption = Annotated[
    str, typer.Option("--config", "-c", metavar="FILE|recipe:NAME", help="The run's YAML file, or a packaged recipe.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, dotted, such as learner.lr=1e-6. Repeatable."),
]
OverwriteOption = Annotated[
    bool,
    typer.Option("--overwrite", help="Delete what this command left in the run's folder before, and start afresh."),
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint of this run.")]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder, or its name under runs/.")]
RecipeOption = Annotated[
    str | None, typer.Option("--recipe", metavar="NAME", help="Print this recipe instead, to copy and edit.")
]


def main() -> None:
    """Entry point of the ``rlhf-ray`` command."""
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    app()


def _examples(*lines: str) -> str:
    return "\n\n".join(["[bold]Examples[/bold]", *(line.replace("[", r"\[") for line in lines)])


@app.command(epilog=_examples("rlhf-ray demo", "rlhf-ray demo --overwrite --set seed=1"))
def demo(
    config: ConfigOption = "recipe:demo",
    overrides: SetOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Run everything on a small model: collect, judge, reward, serve, ppo, evaluate, report."""
    with _reported():
        run, console = _begin(config, overrides)
        from rlhf_ray.demo import run_demo

        with _claimed(run, *PRODUCTS, overwrite=overwrite):
            _exit_if_interrupted(run_demo(run, console).get("status"))
            console.say(f"Done: open {run.run_dir / 'report.html'}", style="bold")


@app.command(
    epilog=_examples("rlhf-ray collect -c run.yaml", "rlhf-ray collect -c run.yaml --set collect.completions=8")
)
def collect(config: ConfigOption, overrides: SetOption = None, overwrite: OverwriteOption = False) -> None:
    """Sample several responses to each prompt, to be compared: completions.jsonl."""
    with _reported():
        run, console = _begin(config, overrides)
        with _claimed(run, "collect", overwrite=overwrite):
            from rlhf_ray.demo import run_collect

            run_collect(run, console)


@app.command(epilog=_examples("rlhf-ray judge -c run.yaml", "rlhf-ray judge -c run.yaml --set judge.min_margin=0.3"))
def judge(config: ConfigOption, overrides: SetOption = None, overwrite: OverwriteOption = False) -> None:
    """Compare the responses with a simulated labeller, a program that stands in for people: preferences.jsonl."""
    with _reported():
        run, console = _begin(config, overrides)
        with _claimed(run, "judge", overwrite=overwrite):
            from rlhf_ray.demo import run_judge

            run_judge(run, console)


@app.command(
    epilog=_examples(
        "rlhf-ray reward -c run.yaml",
        "rlhf-ray reward -c run.yaml --set reward.data=judgements.csv --set reward.lora_rank=16",
        "rlhf-ray reward -c run.yaml --resume",
    )
)
def reward(
    config: ConfigOption,
    overrides: SetOption = None,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Train the reward model on preferences.jsonl and test it on the held-out pairs: reward/."""
    with _reported():
        run, console = _begin(config, overrides)
        _check_either(resume, overwrite)
        with _claimed(run, "reward", overwrite=overwrite, resume=resume):
            from rlhf_ray.demo import run_reward

            run_reward(run, console, resume=resume)


@app.command(
    epilog=_examples(
        "rlhf-ray sft -c run.yaml",
        "rlhf-ray sft -c run.yaml --set sft.data=answers.jsonl --set sft.lora_rank=16",
        "rlhf-ray sft -c run.yaml --resume",
    )
)
def sft(
    config: ConfigOption,
    overrides: SetOption = None,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Train the policy to write given responses, by default the preferred ones: policy/, metrics.jsonl."""
    with _reported():
        run, console = _begin(config, overrides)
        _check_either(resume, overwrite)
        with _claimed(run, "sft", overwrite=overwrite, resume=resume):
            from rlhf_ray.demo import run_report, run_sft

            run_sft(run, console, resume=resume)
            run_report(run, console)


@app.command(
    epilog=_examples(
        "rlhf-ray dpo -c run.yaml",
        "rlhf-ray dpo -c run.yaml --set dpo.data=judgements.csv --set dpo.beta=0.2",
        "rlhf-ray dpo -c run.yaml --set name=second --set model.path=runs/first/policy",
        "rlhf-ray dpo -c run.yaml --resume",
    )
)
def dpo(
    config: ConfigOption,
    overrides: SetOption = None,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Train the policy on preferences.jsonl directly, without a reward model: policy/, metrics.jsonl."""
    with _reported():
        run, console = _begin(config, overrides)
        _check_either(resume, overwrite)
        with _claimed(run, "dpo", overwrite=overwrite, resume=resume):
            from rlhf_ray.demo import run_dpo, run_report

            run_dpo(run, console, resume=resume)
            run_report(run, console)


@app.command(
    epilog=_examples(
        "rlhf-ray serve -c run.yaml",
        "rlhf-ray serve --model runs/demo/reward --set serve.port=9000",
        "rlhf-ray serve --model toxic-bert --set serve.label=toxic --set serve.prompt_format=response",
    )
)
def serve(
    config: Annotated[
        str | None,
        typer.Option("--config", "-c", metavar="FILE|recipe:NAME", help="Serve the reward model of this run."),
    ] = None,
    model: Annotated[
        Path | None, typer.Option("--model", metavar="DIR", help="Serve this one, which needs no configuration.")
    ] = None,
    overrides: SetOption = None,
) -> None:
    """Serve a reward model, or any Hugging Face classifier, over HTTP until Ctrl-C."""
    with _reported():
        run = load_config(config, overrides or ()) if config is not None else None
        section = run.serve if run is not None else load_serve_config(overrides or ())
        console = _console()
        from rlhf_ray.stages.ppo import reward_model_folder
        from rlhf_ray.stages.serve import serve_forever

        if model is not None:
            folder = model.expanduser()
        elif run is not None:
            folder = reward_model_folder(run)
        else:
            raise ConfigError("name the reward model's folder with --model DIR, or a run's file with --config FILE")
        serve_forever(section, folder, device=run.device if run is not None else "auto", announce=console.say)


@app.command(
    epilog=_examples(
        "rlhf-ray ppo -c run.yaml --set learner.lr=1e-6",
        "rlhf-ray ppo -c run.yaml --resume",
        "ray job submit --working-dir . -- rlhf-ray ppo -c recipe:multi_gpu --set output_dir=/shared/runs",
    )
)
def ppo(
    config: ConfigOption,
    overrides: SetOption = None,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Improve the policy against the served reward model, asynchronously: policy/, metrics.jsonl, checkpoints/."""
    with _reported():
        run, console = _begin(config, overrides)
        _check_either(resume, overwrite)
        with _claimed(run, "ppo", overwrite=overwrite, resume=resume):
            from rlhf_ray.demo import run_ppo, run_report

            summary = run_ppo(run, console, resume=resume)
            if summary.steps:
                run_report(run, console)
        _exit_if_interrupted(summary.status)


@app.command(
    epilog=_examples(
        "rlhf-ray evaluate -c run.yaml",
        "rlhf-ray evaluate -c run.yaml --set evaluate.max_prompts=16",
        "rlhf-ray evaluate -c run.yaml --policy runs/second/policy --baseline runs/first/policy",
        "rlhf-ray evaluate -c run.yaml --policy Qwen/Qwen2.5-0.5B-Instruct --prompts questions.jsonl",
        "rlhf-ray evaluate -c run.yaml --judge my_judge:helpful --output first_try.json",
    )
)
def evaluate(
    config: ConfigOption,
    policy: Annotated[
        str | None, typer.Option("--policy", metavar="MODEL", help="Judge this one (evaluate.policy), not the run's.")
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option("--baseline", metavar="MODEL", help="Against this one (evaluate.baseline), not model.path."),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option("--prompts", metavar="FILE", help="On these (evaluate.prompts), not prompts.eval_path."),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            "--judge", metavar="vader|MODULE:NAME|SCORER", help="Who decides (evaluate.judge): vader by default."
        ),
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", metavar="FILE.json", help="Where the result goes (evaluate.output).")
    ] = None,
    overrides: SetOption = None,
) -> None:
    """Compare two policies on the same prompts, by default the run's with its base on held-out ones: evaluation.json.

    A MODEL is whatever model.path takes, and shares its tokenizer. The KL of both policies is to model.path.

    Any other comparison than the run's own goes into comparisons/, and leaves evaluation.json and report.html alone.
    """
    with _reported():
        named = {"policy": policy, "baseline": baseline, "prompts": prompts, "judge": judge, "output": output}
        flags = [f"evaluate.{key}={json.dumps(value)}" for key, value in named.items() if value is not None]
        run, console = _begin(config, [*(overrides or ()), *flags])
        with _claimed(run):
            from rlhf_ray.demo import run_comparison_page, run_evaluate, run_report

            found = run_evaluate(run, console)
            if run.evaluate.of_the_run:
                run_report(run, console)
            else:
                run_comparison_page(run, console, found)


@app.command(epilog=_examples("rlhf-ray report -c run.yaml", "rlhf-ray report -c run.yaml --set report.samples=40"))
def report(config: ConfigOption, overrides: SetOption = None) -> None:
    """Write the run's folder as one self-contained HTML page: report.html."""
    with _reported():
        run, console = _begin(config, overrides)
        from rlhf_ray.demo import run_report

        run_report(run, console)


@app.command(epilog=_examples("rlhf-ray status runs/first", "rlhf-ray status runs/first --json"))
def status(
    run: RunArgument,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as one JSON object.")] = False,
) -> None:
    """Show how a PPO run stands: its workers, their versions, the queue, staleness, and which stages are busy."""
    with _reported():
        from rlhf_ray.stages.live import status as status_of

        _print_status(run, status_of(run), as_json=as_json)


@app.command(
    epilog=_examples("rlhf-ray scale runs/first --generators 4", "rlhf-ray scale runs/first --references 2 --json")
)
def scale(
    run: RunArgument,
    generators: Annotated[int | None, typer.Option("--generators", metavar="N", help="Generators to have.")] = None,
    references: Annotated[int | None, typer.Option("--references", metavar="M", help="References to have.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the run's status as one JSON object.")] = False,
) -> None:
    """Change the number of workers of a PPO run under way; returns once the run has taken the wish."""
    with _reported():
        from rlhf_ray.stages.live import scale as scale_run

        _print_status(run, scale_run(run, generators=generators, references=references), as_json=as_json)


def _print_status(run: Path, now: dict[str, Any], *, as_json: bool) -> None:
    from rlhf_ray.report.status_table import status_lines

    typer.echo(json.dumps(now, indent=2) if as_json else "\n".join(status_lines(run, now)))


@data_app.command(
    "check",
    epilog=_examples(
        "rlhf-ray data check judgements.csv",
        "rlhf-ray data check judgements.csv --on-bad-row skip --rejects bad.jsonl",
        "rlhf-ray data check Anthropic/hh-rlhf:test --json",
    ),
)
def data_check(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="JSONL, JSON, CSV, TSV, Parquet, a saved data set, or a hub's name.")
    ],
    on_bad_row: Annotated[
        Literal["fail", "skip"],
        typer.Option("--on-bad-row", help="skip: set bad rows aside, with their reasons."),
    ] = "fail",
    rejects: Annotated[
        Path, typer.Option("--rejects", help="Where skipped rows are written, one JSON object a line.")
    ] = Path("rejects.jsonl"),
    holdout: Annotated[
        float, typer.Option("--holdout", min=0.001, max=0.999, help="Share of the prompts that the split holds out.")
    ] = 0.1,
    seed: Annotated[int, typer.Option("--seed", help="Of the split.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as one JSON object.")] = False,
) -> None:
    """Look through a file of comparisons: counts, lengths, duplicates, contradictions, agreement, a split by prompt."""
    with _reported():
        from rlhf_ray.report.data_check import check_lines
        from rlhf_ray.stages.data_check import check_data

        check = check_data(file, skip_bad_rows=on_bad_row == "skip", rejects_path=rejects, holdout=holdout, seed=seed)
        if as_json:
            typer.echo(json.dumps(asdict(check), default=str, indent=2))
        else:
            for line in check_lines(check):
                typer.echo(line)


@app.command("config", epilog=_examples("rlhf-ray config | less", "rlhf-ray config --recipe demo > run.yaml"))
def show_config(recipe: RecipeOption = None) -> None:
    """List every key of the configuration with its type, default and effect."""
    with _reported():
        if recipe is not None:
            typer.echo(recipe_text(recipe), nl=False)
            return
        for key, field in config_keys(RunConfig):
            default = "required" if field.is_required() else f"default {_as_written(field.default)}"
            kind = _kind(field.annotation)
            typer.echo(f"{typer.style(key, bold=True)}  ({kind}, {default})\n    {field.description}")


def _check_either(resume: bool, overwrite: bool) -> None:
    if resume and overwrite:
        raise ConfigError("--resume goes on from what is there and --overwrite deletes it; give one of them")


def _begin(config: str, overrides: Sequence[str] | None) -> tuple[RunConfig, Console]:
    """Check the configuration first: nothing heavy is imported for a wrong key."""
    run = load_config(config, overrides or ())
    return run, _console()


def _console() -> Console:
    """What a person watches, with the libraries' own talk turned down."""
    from rlhf_ray.report.console import Console
    from rlhf_ray.report.quiet import quiet_libraries

    quiet_libraries()
    console = Console()
    console.show_logs()
    return console


@contextmanager
def _claimed(run: RunConfig, *stages: str, overwrite: bool = False, resume: bool = False) -> Iterator[None]:
    """Hold the run's folder for this process, and refuse to mix new results with those of an earlier run.

    The lock ends with the process, however that ends. Raises ``ConfigError``, with everything left as it was.
    """
    folder = run.run_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise ConfigError(
            f"the run's folder {folder} cannot be made ({error.strerror}); set output_dir to another place"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"another rlhf-ray command is at work in {folder}; wait for it, or choose another with --set name=..."
            ) from error
        products = dict.fromkeys(name for stage in stages for name in PRODUCTS[stage])
        used = [name for name in products if _holds_something(folder / name)]
        if used and not (overwrite or resume):
            resumable = stages == ("ppo",) or (
                len(stages) == 1 and f"{stages[0]}.checkpoints" in used and not {"reward", "policy"} & set(used)
            )
            ways = "--resume to go on, " if resumable else ""
            raise ConfigError(
                f"{folder} already holds {', '.join(used)} of an earlier run; choose another folder with "
                f"--set name=..., {ways}or --overwrite to delete {'it' if len(used) == 1 else 'them'}"
            )
        with _set_aside(folder, stages) if overwrite else nullcontext():
            yield


@contextmanager
def _set_aside(folder: Path, stages: Sequence[str]) -> Iterator[None]:
    """The stages' old products out of the way: back in place if the new input is refused, and else deleted."""
    names = dict.fromkeys(name for stage in stages for name in (*PRODUCTS[stage], *DERIVED.get(stage, ())))
    with tempfile.TemporaryDirectory(prefix=".replaced-", dir=folder) as aside:
        moved = [name for name in names if os.path.lexists(folder / name)]
        for name in moved:
            (folder / name).rename(Path(aside) / name)
        if "summary.json" in moved and "reward" not in stages:
            _keep_reward_figures(Path(aside), folder)
        try:
            yield
        except Exception as error:
            if isinstance(_deliberate(error), InputError):
                for name in moved:
                    _delete(folder / name)
                    (Path(aside) / name).rename(folder / name)
            raise


def _keep_reward_figures(old: Path, new: Path) -> None:
    """The reward model stays, and so does what the summary says of it."""
    from rlhf_ray.metrics import read_summary, write_summary

    kept = {key: value for key, value in read_summary(old).items() if key.startswith("reward_")}
    if kept:
        write_summary(new, kept)


def _holds_something(path: Path) -> bool:
    """True unless missing or empty: a run that was refused early leaves nothing worth guarding."""
    if path.is_dir():
        return any(path.iterdir())
    return path.exists() and path.stat().st_size > 0


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _reported() -> Iterator[None]:
    """Turn deliberate errors into a line on stderr and an exit code; any other is a bug and keeps its traceback."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        raise typer.Exit(130) from None
    except Exception as error:
        deliberate = _deliberate(error)
        if deliberate is None:
            raise
        for line in str(deliberate).splitlines():
            typer.echo(f"{typer.style('error:', fg='red', bold=True)} {line}", err=True)
        raise typer.Exit(2 if isinstance(deliberate, InputError) else 1) from None


def _deliberate(error: BaseException) -> RlhfRayError | None:
    """The error of ours inside: a remote one comes wrapped by Ray (``cause``), one of several tasks in a group. A full
    disk is told as one of ours, whoever found it.
    """
    if isinstance(error, BaseExceptionGroup):
        return next((found for inner in error.exceptions if (found := _deliberate(inner))), None)
    cause = getattr(error, "cause", None)
    if isinstance(cause, Exception):
        return _deliberate(cause)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" at {error.filename}" if error.filename else ""
        return RlhfRayError(
            f"the disk is full{where}; make room and run it again, with --resume where the command has it"
        )
    return error if isinstance(error, RlhfRayError) else None


def _exit_if_interrupted(status: str | None) -> None:
    if status == "interrupted":
        raise typer.Exit(130)


def _kind(annotation: object) -> str:
    """What a person may write for a key: ``whole number``, ``text or null``, ``one of a, b``."""
    arguments = typing.get_args(annotation)
    match typing.get_origin(annotation):
        case typing.Literal:
            return f"one of {', '.join(str(choice) for choice in arguments)}"
        case types.UnionType | typing.Union:
            return " or ".join(_kind(choice) for choice in arguments)
        case builtins.tuple:
            return "list" if Ellipsis in arguments else f"list of {len(arguments)}"
        case builtins.dict:
            return "names with sections"
    words = {int: "whole number", float: "number", bool: "true or false", str: "text", Path: "path", NoneType: "null"}
    return words[typing.cast(type, annotation)]


def _as_written(default: object) -> str:
    """A default as it would stand in the file."""
    if default is None or isinstance(default, bool):
        return "null" if default is None else str(default).lower()
    if isinstance(default, BaseModel):
        return f"{{{', '.join(f'{key}: {_as_written(value)}' for key, value in default)}}}"
    return f"[{', '.join(map(_as_written, default))}]" if isinstance(default, tuple) else str(default)
