"""Any two policies on a real cluster: vLLM samples both, the run's scorers score them, a judge of choice decides."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from typer.testing import CliRunner

from rlhf_ray.cli import app
from rlhf_ray.config import load_config
from rlhf_ray.errors import ModelError
from rlhf_ray.stages.evaluate import read_evaluation
from rlhf_ray.stages.evaluate_run import run_evaluate

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def cluster(ray_temp_dir: Path) -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=str(ray_temp_dir))
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def shifted(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with other weights, as another run would have left it."""
    folder = tmp_path_factory.mktemp("shifted") / "policy"
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return saved(model, tiny_model_dir, folder)


@pytest.fixture(scope="module")
def shallow(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of another architecture, one layer, with the tiny model's tokenizer."""
    config = AutoModelForCausalLM.from_pretrained(tiny_model_dir).config
    config.num_hidden_layers = 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return saved(LlamaForCausalLM(config), tiny_model_dir, tmp_path_factory.mktemp("models") / "shallow")


def saved(model: Any, tokenizer: Path, folder: Path) -> Path:
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def run_file(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that has trained nothing, scored by a function of the current folder."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "pair_judges", raising=False)
    (tmp_path / "pair_judges.py").write_text(
        "def brevity(completion_ids, **kwargs):\n"
        "    return [-len(ids) / 10 for ids in completion_ids]\n"
        "def characters(prompts, completions, **kwargs):\n"
        "    assert len(set(prompts)) == 2\n"
        "    return [len(completion) for completion in completions]\n"
    )
    for name, count in (("train", 2), ("held_out", 3), ("asked", 2)):
        lines = [json.dumps({"prompt": f"The {name} bridge {i}"}) for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    data = {
        "name": "mine",
        "model": {"path": str(tiny_model_dir)},
        "prompts": {"path": "train.jsonl", "eval_path": "held_out.jsonl", "max_tokens": 64},
        "sampling": {"max_new_tokens": 12},
        "scorers": [{"kind": "function", "name": "brevity", "function": "pair_judges:brevity", "weight": 2.0}],
        "generator": {"num_cpus": 0.5, "kv_cache_gb": 0.02, "max_num_seqs": 4, "threads": 1, "dtype": "float32"},
        "reference": {"num_cpus": 0.5, "threads": 1, "precision": "float32"},
        "evaluate": {"samples_per_prompt": 2},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def test_policies_of_two_architectures_are_compared_by_a_function_on_other_prompts(
    cluster: None, run_file: Path, shifted: Path, shallow: Path
) -> None:
    named = {"policy": shifted, "baseline": shallow, "prompts": "asked.jsonl", "judge": "pair_judges:characters"}
    config = load_config(run_file, [f"evaluate.{key}={value}" for key, value in named.items()])
    found = run_evaluate(config)

    assert (found.prompts, found.samples_per_prompt, found.judge) == (2, 2, "pair_judges:characters")
    assert {sample.prompt for sample in found.samples} == {"The asked bridge 0", "The asked bridge 1"}
    for sample in found.samples:
        assert (sample.base_gold, sample.trained_gold) == (len(sample.base), len(sample.trained))
    for side in (found.base, found.trained):
        assert side.score == pytest.approx(-2 * side.tokens / 10)
        assert abs(side.kl) > 1e-2, "neither of them is the reference"
    assert any(sample.base != sample.trained for sample in found.samples)
    assert (found.trained_name, found.base_name) == (shifted.parent.name, "shallow")

    folder = Path("runs/mine")
    name = f"{shifted.parent.name}-over-shallow-on-asked.json"
    assert [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()] == [Path("comparisons") / name]
    assert read_evaluation(folder / "comparisons" / name) == found


def test_the_command_compares_a_named_policy_with_the_base_by_a_scorer(
    cluster: None, run_file: Path, shifted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf_ray.report.quiet.quiet_libraries", lambda: None)
    monkeypatch.setattr("rlhf_ray.report.console.Console.show_logs", lambda self: None)
    flags = ["--policy", str(shifted), "--judge", "brevity", "--output", "out/result.json"]
    result = CliRunner().invoke(app, ["evaluate", "-c", str(run_file), *flags])
    assert result.exit_code == 0, result.output
    found = read_evaluation(Path("out/result.json"))

    assert (found.prompts, found.judge) == (3, "scorer brevity")
    assert found.base.gold == found.base.score == pytest.approx(-found.base.tokens / 5)
    assert found.trained.gold == pytest.approx(-found.trained.tokens / 5)
    assert found.base.kl == pytest.approx(0, abs=1e-3), "the baseline is the reference"
    assert abs(found.trained.kl) > 1e-2
    assert f"wins {found.win_rate.value:.1%}" in result.output
    assert f"judged by {found.judge}" in result.output
    assert "> The held_out bridge 2" in result.output
    assert f"{shifted.parent.name} over {found.base_name}" in Path("out/result.html").read_text()
    left = [path.name for path in Path("runs/mine").iterdir()]
    assert left == [".lock"], "the run has no evaluation, summary or report of this"


def test_a_run_without_a_policy_must_name_one(run_file: Path) -> None:
    with pytest.raises(ModelError, match=r"there is no trained policy at .*; run .* or name another .* \(--policy\)"):
        run_evaluate(load_config(run_file))


def test_a_scorer_that_judges_must_be_there(run_file: Path, shifted: Path) -> None:
    own = 'scorers=[{"kind": "served", "name": "own"}]'
    config = load_config(run_file, [own, f"evaluate.policy={shifted}", "evaluate.judge=own"])
    with pytest.raises(ModelError, match="there is no reward model in"):
        run_evaluate(config)
