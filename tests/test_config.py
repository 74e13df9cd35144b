"""A configuration is right, or refused in one sentence that names the key, its place and the remedy."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
from pydantic import ValidationError

from rlhf_ray import config
from rlhf_ray.algorithms import advantages
from rlhf_ray.config import RunConfig, load_config, save_resolved
from rlhf_ray.config_file import config_keys, recipe_names, recipe_text
from rlhf_ray.errors import ConfigError

MINIMAL = """\
name: small
model: {path: some/model}
prompts:
  path: train.jsonl
  eval_path: held_out.jsonl
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "run.yaml"


def load(file: Path, more: str = "", *overrides: str) -> RunConfig:
    file.write_text(MINIMAL + more, "utf-8")
    return load_config(file, overrides)


def refusal(file: Path, more: str = "", *overrides: str) -> str:
    with pytest.raises(ConfigError) as refused:
        load(file, more, *overrides)
    return str(refused.value).replace(str(file), "run.yaml")


def test_what_is_not_written_has_its_default(file: Path) -> None:
    config = load(file)
    assert (config.name, config.model.path, config.ppo.batch_size) == ("small", "some/model", 32)
    assert config.run_dir == Path("runs/small")


def test_numbers_are_read_as_people_write_them(file: Path) -> None:
    config = load(file, "learner:\n  lr: 1e-6\n  betas: [0.9, 0.99]\nppo:\n  gamma: 1\n")
    assert (config.learner.lr, config.learner.betas, config.ppo.gamma) == (1e-6, (0.9, 0.99), 1.0)


def test_text_that_old_yaml_takes_for_something_else_stays_text(file: Path) -> None:
    config = load(file, "output_dir: 2026-01-31\nserve:\n  name: on\n")
    assert (config.output_dir, config.serve.name) == (Path("2026-01-31"), "on")


def test_an_override_wins_and_may_make_a_section(file: Path) -> None:
    config = load(file, "ppo:\n  steps: 3\n", "ppo.steps=7", "learner.lr=2e-5", "ppo.kl={coef: 0.2}", "name=other")
    assert (config.ppo.steps, config.learner.lr, config.ppo.kl.coef, config.name) == (7, 2e-5, 0.2, "other")


def test_an_override_mends_a_wrong_value_in_the_file(file: Path) -> None:
    assert load(file, "ppo:\n  steps: many\n", "ppo.steps=7").ppo.steps == 7


def test_a_configuration_cannot_be_changed(file: Path) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load(file).ppo.steps = 3  # type: ignore[misc]


def test_what_is_saved_loads_as_the_same(file: Path, tmp_path: Path) -> None:
    config = load(file, "", "learner.lr=1e-6", "ppo.score_clip=5", "learner.betas=[0.9, 0.999]", "serve.name='7'")
    saved = tmp_path / "new" / "config.resolved.yaml"
    save_resolved(config, saved)
    assert load_config(saved) == config


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ("learner:\n  leraning_rate: 1\n  epz: 1", "learner.epz (run.yaml:8) is not a key; did you mean learner.eps"),
        ("lerner:\n  lr: 1", "lerner (run.yaml:6) is not a key; did you mean learner"),
        (
            "serve:\n  models:\n    tox:\n      folder: a\n      foldr: b",
            "serve.models.tox.foldr (run.yaml:10) is not a key; did you mean serve.models.tox.folder",
        ),
        (
            "serve: {models: {folder: {foldr: b}}}",
            "serve.models.folder.foldr (run.yaml:6) is not a key; did you mean serve.models.folder.folder",
        ),
        (
            "serve:\n  models:\n    tox: {folder: a, zzz: 1}",
            "serve.models.tox.zzz (run.yaml:8) is not a key; the keys of serve.models.tox are folder, label, "
            "prompt_format",
        ),
        ("learner:\n  batch_size: 4", "learner.batch_size (run.yaml:7) is not a key; did you mean ppo.batch_size"),
        (
            "evaluate:\n  zzz: 4",
            "evaluate.zzz (run.yaml:7) is not a key; the keys of evaluate are samples_per_prompt, max_prompts, policy, "
            "baseline, prompts, judge, output",
        ),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_one(file: Path, more: str, sentence: str) -> None:
    assert sentence in refusal(file, more).splitlines()


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ("ppo:\n  steps: many", 'ppo.steps (run.yaml:7) must be a whole number, not "many"'),
        ('ppo:\n  steps: "32"', 'ppo.steps (run.yaml:7) must be a whole number, not "32"'),
        ("ppo:\n  steps: 3.0", "ppo.steps (run.yaml:7) must be a whole number, not 3.0"),
        ("ppo:\n  steps: true", "ppo.steps (run.yaml:7) must be a whole number, not true"),
        ("learner:\n  lr: fast", 'learner.lr (run.yaml:7) must be a number, not "fast"'),
        ("learner:\n  lr: 0", "learner.lr (run.yaml:7) must be above 0, not 0"),
        ("learner:\n  betas: 3", "learner.betas (run.yaml:7) must be a list, not 3"),
        ("learner:\n  betas:\n  - 0.9\n  - x", 'learner.betas.1 (run.yaml:7) must be a number, not "x"'),
        ("serve:\n  port: 70000", "serve.port (run.yaml:7) must be at most 65535, not 70000"),
        ("judge:\n  holdout: 1", "judge.holdout (run.yaml:7) must be below 1, not 1"),
        ("seed: -1", "seed (run.yaml:6) must be at least 0, not -1"),
        ("device: tpu", "device (run.yaml:6) must be one of 'auto', 'cpu' or 'cuda', not \"tpu\""),
        ("ppo:\n  kl:\n    loss: k9", "ppo.kl.loss (run.yaml:8) must be one of 'none', 'k2' or 'k3', not \"k9\""),
        ("learner: 3", "learner (run.yaml:6) must be a section of keys, not 3"),
        ("learner:", "learner (run.yaml:6) must be a section of keys, not nothing"),
        (
            "serve:\n  name: 7",
            "serve.name (run.yaml:7) must be text (in quotes, if it looks like a number), not 7",
        ),
        (
            "learner:\n  gradient_checkpointing: yes",
            'learner.gradient_checkpointing (run.yaml:7) must be true or false, not "yes"',
        ),
        ("learner:\n  lr: 1e999", 'learner.lr (run.yaml:7) is no number, text, list or section: "1e999"'),
        (
            "learner:\n  lr: !!python/name:os.x 1",
            "learner.lr (run.yaml:7) is no number, text, list or section: the tag tag:yaml.org,2002:python/name:os.x",
        ),
    ],
)
def test_a_wrong_value_is_refused_with_its_place_and_what_would_be_right(file: Path, more: str, sentence: str) -> None:
    assert refusal(file, more) == sentence


def test_a_name_that_would_leave_the_output_folder_is_refused(file: Path) -> None:
    message = refusal(file, "", "name=../elsewhere")
    assert message == (
        "name (--set) must be letters, digits, dots, dashes and underscores, beginning with a letter or digit, "
        'not "../elsewhere"'
    )


def test_every_problem_is_told_at_once(file: Path) -> None:
    message = refusal(file, "ppo:\n  steps: 0\n  epochs: none\n", "lerner.lr=1")
    assert message.splitlines() == [
        "ppo.steps (run.yaml:7) must be at least 1, not 0",
        'ppo.epochs (run.yaml:8) must be a whole number, not "none"',
        "lerner (--set) is not a key; did you mean learner",
    ]


def test_a_missing_key_is_named_with_what_it_is(file: Path) -> None:
    file.write_text("prompts: {path: a, eval_path: b}\n")
    with pytest.raises(ConfigError) as refused:
        load_config(file)
    assert str(refused.value).startswith(f"model.path is missing from {file}: Hugging Face hub id, local folder")


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ("name: again", "name is given twice, at run.yaml:1 and run.yaml:6"),
        ("ppo:\n  steps: 1\n  kl: {coef: 1}\n  steps: 2", "ppo.steps is given twice, at run.yaml:7 and run.yaml:9"),
        ("ppo: [1", "run.yaml:6 is not valid YAML: expected ',' or ']', but got '<stream end>'"),
        ("ppo: &here [*here]", "run.yaml is nested too deeply, or an alias in it refers to itself"),
    ],
)
def test_yaml_that_says_nothing_definite_is_refused(file: Path, more: str, sentence: str) -> None:
    assert refusal(file, more) == sentence


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("ppo.steps", "--set ppo.steps must have the form key=value, such as learner.lr=1e-6"),
        ("ppo..steps=1", "--set ppo..steps=1 must have the form key=value, such as learner.lr=1e-6"),
        ("name.first=x", "--set name.first=x cannot apply: name is a value, not a section"),
        ("ppo.kl={coef: 1, coef: 2}", "ppo.kl.coef is given twice, at --set and --set"),
        ("ppo.steps=[", "--set is not valid YAML: expected the node content, but found '<stream end>'"),
    ],
)
def test_an_override_that_cannot_apply_is_refused(file: Path, override: str, sentence: str) -> None:
    assert refusal(file, "", override) == sentence


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (
            "ppo:\n  batch_size: 32\n  minibatches: 5",
            "ppo.minibatches = 5 does not divide ppo.batch_size = 32; choose minibatches from [1, 2, 4, 8, 16, 32] "
            "(run.yaml:8, run.yaml:7)",
        ),
        (
            "ppo: {batch_size: 32, completions: 4, minibatches: 4}\nlearner:\n  ranks: 3",
            "learner.ranks = 3 does not divide an optimiser step's responses, of 32 responses (8 prompts x 4), 4 "
            "optimiser steps each (1 x 4 of 8); choose ranks from [1, 2, 4, 8] (run.yaml:8)",
        ),
        (
            "deterministic: true",
            "ppo.max_staleness = 1 lets timing decide which policy samples a token, and deterministic = true; set "
            "max_staleness to 0 (run.yaml:6)",
        ),
        (
            "deterministic: true\nppo: {max_staleness: 0}\nlearner: {ranks: 2}",
            "learner.ranks = 2 adds up in an order that is not ours, and deterministic = true; set ranks to 1 "
            "(run.yaml:8, run.yaml:6)",
        ),
        (
            "deterministic: true\nppo: {max_staleness: 0}\nreference: {num_gpus: 1}",
            "reference.num_gpus = 1 brings kernels whose sums depend on timing, and deterministic = true; use CPUs "
            "(run.yaml:8, run.yaml:6)",
        ),
        (
            "deterministic: true\nppo: {max_staleness: 0}\n"
            "scorers:\n- {kind: remote, name: far, urls: ['http://far:1']}",
            "scorers.0.kind = remote is a service that batches as it likes, and deterministic = true; use kind: served "
            "(run.yaml:9, run.yaml:6)",
        ),
        (
            "reference:\n  count: 0",
            "reference.count = 0 makes the learner its own reference, which it can be under LoRA only; set "
            "learner.lora_rank, such as 16, or reference.count to 1 or more (run.yaml:7)",
        ),
        (
            "learner: {ranks: 2, num_gpus: 0.5}",
            "learner.num_gpus = 0.5 and learner.ranks = 2: each of several has one GPU to itself, or none; set "
            "num_gpus to 1 or 0 (run.yaml:6)",
        ),
        (
            "ppo:\n  kl:\n    loss: k3",
            "ppo.kl.loss = k3 contradicts ppo.kl.loss_coef = 0; set both or neither (run.yaml:8)",
        ),
        (
            "ppo:\n  kl: {controller: adaptive, coef: 0}",
            "ppo.kl.coef = 0 stays 0 under ppo.kl.controller = adaptive, which scales it; start above 0, such as 0.05 "
            "(run.yaml:7)",
        ),
        (
            "device: cpu\nlearner: {num_gpus: 1}",
            "device = cpu, but learner.num_gpus = 1; use device = auto, or ask for no GPUs (run.yaml:6, run.yaml:7)",
        ),
        (
            "device: cuda",
            "device = cuda, but generator.num_gpus = 0; give it a GPU or part of one, or use device = auto "
            "(run.yaml:6)",
        ),
        (
            "generator: {tensor_parallel_size: 2, num_gpus: 1}",
            "generator.tensor_parallel_size = 2 needs as many GPUs for each engine, but generator.num_gpus = 1 "
            "(run.yaml:6)",
        ),
        (
            "reward: {max_length: 500}",
            "reward.max_length = 500 is shorter than prompts.max_tokens = 512, sampling.max_new_tokens = 64 "
            "and EOS together; raise it to 577 or more (run.yaml:6)",
        ),
        (
            "ppo:\n  kl:\n    loss_coef: 0.1",
            "ppo.kl.loss = none contradicts ppo.kl.loss_coef = 0.1; set both or neither (run.yaml:8)",
        ),
        (
            "ppo: {batch_size: 64, minibatches: 1, kl: {controller: adaptive, horizon: 12}}",
            "ppo.kl.horizon = 12 is too short for ppo.batch_size = 64: one step could turn the coefficient negative; "
            "raise it above a fifth of the batch, such as 10000 (run.yaml:6)",
        ),
        (
            "learner: {num_gpus: 1.5}",
            "learner.num_gpus = 1.5 is no whole number; above 1 Ray gives out whole GPUs only (run.yaml:6)",
        ),
        (
            "reward:\n  batch_size: 12\n  num_workers: 5",
            "reward.num_workers = 5 does not divide reward.batch_size = 12; choose num_workers from "
            "[1, 2, 3, 4, 6, 12] (run.yaml:8, run.yaml:7)",
        ),
        (
            "ppo: {estimator: rloo}",
            "ppo.estimator = rloo compares the responses to one prompt, but ppo.completions = 1; set it to 2 or more, "
            "such as 4 (run.yaml:6)",
        ),
        (
            "ppo: {estimator: reinforce_pp}\nlearner:\n  critic: model",
            "learner.critic = model is of a critic, and ppo.estimator = reinforce_pp has none; drop it, or use gae "
            "(run.yaml:8, run.yaml:6)",
        ),
        (
            "learner: {lora_targets: [q_proj]}",
            "learner.lora_targets = ['q_proj'] is read for a learner.lora_rank above 0 only; set that, such as 16, or "
            "drop the targets (run.yaml:6)",
        ),
        (
            "learner: {critic_path: runs/a/reward}",
            "learner.critic_path = runs/a/reward is read for learner.critic = model only; set that, or drop the path "
            "(run.yaml:6)",
        ),
        (
            "dpo: {batch_size: 4, num_workers: 3}",
            "dpo.num_workers = 3 does not divide dpo.batch_size = 4; choose num_workers from [1, 2, 4] (run.yaml:6)",
        ),
        (
            "device: cpu\nsft: {num_gpus: 1}",
            "device = cpu, but sft.num_gpus = 1; use device = auto, or ask for no GPUs (run.yaml:6, run.yaml:7)",
        ),
        (
            "ppo: {batch_size: 8, completions: 3}",
            "ppo.completions = 3 does not divide ppo.batch_size = 8; choose completions from [1, 2, 4, 8] (run.yaml:6)",
        ),
        (
            "generator: {count: 2, min: 3}",
            "generator.min = 3 is above generator.count = 2; lower it, or raise the count (run.yaml:6)",
        ),
        (
            "reference: {count: 4, max: 3}",
            "reference.max = 3 is below reference.count = 4; raise it, or lower the count (run.yaml:6)",
        ),
        (
            "learner: {betas: [0.9, 1.0]}",
            "learner.betas = [0.9, 1.0] must each be at least 0 and below 1 (run.yaml:6)",
        ),
    ],
)
def test_values_that_cannot_work_together_are_refused(file: Path, more: str, sentence: str) -> None:
    assert refusal(file, more) == sentence


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (
            "judge=helpful",
            "evaluate.judge = helpful is neither vader, nor module:name of a Python function, nor one of the run's "
            "scorers (reward) (--set)",
        ),
        (
            "judge=my judge:helpful",
            'evaluate.judge (--set) must be a module and a name in it, such as rewards:brevity, not "my judge:helpful"',
        ),
        (
            "output=runs/x/evaluation.json",
            "evaluate.output (--set) must be a file that ends with .json, and not evaluation.json, which is a run's "
            'own, not "runs/x/evaluation.json"',
        ),
        (
            "output=table.csv",
            "evaluate.output (--set) must be a file that ends with .json, and not evaluation.json, which is a run's "
            'own, not "table.csv"',
        ),
    ],
)
def test_a_judge_or_a_file_that_evaluation_cannot_use_is_refused(file: Path, override: str, sentence: str) -> None:
    assert refusal(file, "", f"evaluate.{override}") == sentence


@pytest.mark.parametrize("judge", ["vader", "reward", "my.judges:helpful"])
def test_a_judge_is_vader_a_scorer_or_a_function(file: Path, judge: str) -> None:
    assert load(file, "", f"evaluate.judge={judge}").evaluate.judge == judge


def test_evaluating_on_the_training_prompts_is_refused(file: Path) -> None:
    message = refusal(file, "", "prompts.eval_path=train.jsonl")
    assert message == "prompts.eval_path = train.jsonl is the training file; evaluation needs other prompts (--set)"


def test_files_that_cannot_be_read_are_refused(tmp_path: Path, file: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere.yaml cannot be read \(No such file or directory\).*recipe:demo"):
        load_config(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match="there is no recipe 'dmeo'; the recipes are demo, multi_gpu"):
        load_config("recipe:dmeo")
    file.write_bytes(b"name: \xff\xfe")
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        load_config(file)
    file.write_text("- 1\n- 2\n")
    with pytest.raises(ConfigError, match=r"must hold keys with values, such as name: demo; it holds \[1, 2\]"):
        load_config(file)


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_a_configuration(name: str) -> None:
    assert load_config(f"recipe:{name}").name
    assert recipe_text(name).startswith("# ")


def test_the_demo_cuts_its_responses_without_a_penalty() -> None:
    demo = load_config("recipe:demo")
    assert (demo.sampling.max_new_tokens, demo.ppo.missing_eos_penalty, demo.ppo.batch_size) == (24, 0, 32)


def test_every_key_says_what_it_does() -> None:
    keys = dict(config_keys(RunConfig))
    assert {"name", "ppo.kl.coef", "serve.port"} <= keys.keys()
    assert [key for key, field in keys.items() if not (field.description or "").rstrip().endswith(".")] == []


REMOTE = "- {kind: remote, name: far, urls: ['http://far:1/']}"


def test_scorers_are_a_list_whose_entries_have_the_keys_of_their_kind(file: Path, tmp_path: Path) -> None:
    assert [(s.kind, s.name, s.weight) for s in load(file).scorers] == [("served", "reward", 1.0)]
    config = load(file, f"scorers:\n{REMOTE}\n- {{kind: function, name: brief, weight: -2, function: 'a.b:c'}}\n")
    far, brief = config.scorers
    assert (far.kind, far.urls, far.tries) == ("remote", ("http://far:1",), 8)  # type: ignore[union-attr]
    assert (brief.kind, brief.weight, brief.function) == ("function", -2.0, "a.b:c")  # type: ignore[union-attr]
    assert (load(file).serves_reward, config.serves_reward) == (True, False)
    save_resolved(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ("{kind: remote, name: a}", "scorers.0.urls is missing from run.yaml"),
        ("{name: a}", "scorers.0.kind is missing from run.yaml"),
        (
            "{kind: web, name: a}",
            "scorers.0.kind (run.yaml:7) must be one of 'served', 'remote', 'function', not \"web\"",
        ),
        ("3", "scorers.0 (run.yaml:6) must be a section of keys, not 3"),
        (
            "{kind: function, name: a, function: 'm:f', wait: 2}",
            "scorers.0.wait (run.yaml:7) is not a key; did you mean scorers.0.weight",
        ),
        (
            "{kind: function, name: a b, function: 'm:f'}",
            "scorers.0.name (run.yaml:7) must be letters, digits, dots, dashes and underscores, beginning with a "
            'letter or digit, not "a b"',
        ),
        (
            "{kind: served, name: a, weight: 0}",
            "scorers.0.weight (run.yaml:7) must be a number other than 0, not 0",
        ),
        (
            "{kind: function, name: a, function: m.f}",
            'scorers.0.function (run.yaml:7) must be a module and a name in it, such as rewards:brevity, not "m.f"',
        ),
        (
            "{kind: remote, name: a, urls: []}",
            "scorers.0.urls (run.yaml:7) must be a list of one or more, not []",
        ),
        (
            "{kind: remote, name: a, urls: ['https://fine', 'ftp://a']}",
            "scorers.0.urls.1 (run.yaml:7) must be a URL such as http://host:8000, without a user name, password or "
            'query, not "ftp://a"',
        ),
    ],
)
def test_a_scorer_that_cannot_be_is_refused(file: Path, entry: str, sentence: str) -> None:
    assert refusal(file, f"scorers:\n- {entry}\n") == sentence


@pytest.mark.parametrize("url", ["far:1", "http://", "http://a:b", "http://[::1", "http://me:pw@far", "http://a?k=1"])
def test_a_url_of_a_scorer_is_plain(file: Path, url: str) -> None:
    assert "must be a URL such as" in refusal(file, f"scorers:\n- {{kind: remote, name: a, urls: ['{url}']}}\n")


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ("scorers: []", "scorers (run.yaml:6) must be a list of one or more, not []"),
        (
            f"scorers:\n{REMOTE}\n- {{kind: served, name: far}}",
            "scorers.1.name = far is the name of scorers.0 too; choose another (run.yaml:8)",
        ),
        (
            f"scorers:\n- {{kind: served, name: a}}\n{REMOTE}\n- {{kind: served, name: b}}",
            "scorers.2.kind = served, and so is scorers.0; a run serves one reward model, so name another one by its "
            "URL, with kind: remote (run.yaml:9)",
        ),
    ],
)
def test_scorers_that_cannot_be_told_apart_are_refused(file: Path, more: str, sentence: str) -> None:
    assert refusal(file, more) == sentence


def test_the_keys_of_every_kind_of_scorer_are_listed_and_the_common_ones_once() -> None:
    keys = [key for key, _ in config_keys(RunConfig) if key.startswith("scorers")]
    assert keys == [
        "scorers",
        *(f"scorers.N.{key}" for key in ("kind", "name", "weight")),
        *(f"scorers.N.{key}" for key in ("kind", "max_restarts", "urls", "model", "api_key_env", "timeout_s", "tries")),
        *(f"scorers.N.{key}" for key in ("kind", "function")),
    ]


def test_the_estimators_of_the_configuration_are_those_that_there_are() -> None:
    assert get_args(config.Estimator) == get_args(advantages.EstimatorName)
    assert set(config.GROUP_ESTIMATORS) == advantages.NEED_GROUPS
