"""The floor plan holds: rooms import only from rooms below them, and the light rooms stay light."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINT_IMPORTS = [str(Path(sys.executable).with_name("lint-imports")), "--no-logo", "--no-cache"]
HEAVY = ("ray", "vllm", "transformers", "trl", "datasets")


def lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    wide = os.environ | {"COLUMNS": "200"}  # a narrow terminal would wrap the names of contracts
    return subprocess.run(LINT_IMPORTS, cwd=root, env=wide, capture_output=True, text=True, check=False)


def copy_of_the_house(folder: Path) -> Path:
    shutil.copy(ROOT / "pyproject.toml", folder)
    shutil.copytree(ROOT / "rlhf_ray", folder / "rlhf_ray", ignore=shutil.ignore_patterns("__pycache__", "*.jsonl"))
    return folder


def test_every_import_contract_is_kept() -> None:
    result = lint_imports(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


TRESPASSES = [
    ("rlhf_ray.data.batching", "rlhf_ray.stages"),
    ("rlhf_ray.data.batching", "rlhf_ray.models"),
    ("rlhf_ray.config", "rlhf_ray.algorithms"),
    ("rlhf_ray.roles.judge", "rlhf_ray.actors"),
    ("rlhf_ray.actors.generator", "vllm"),
    ("rlhf_ray.roles.judge", "ray"),
    ("rlhf_ray.data.preferences", "ray"),
    ("rlhf_ray.ppo_trainer.trainer", "ray"),
    ("rlhf_ray.ppo_trainer.trainer", "rlhf_ray.cli"),
    ("rlhf_ray.pipeline.buffer", "transformers"),
    ("rlhf_ray.config", "torch"),
]


@pytest.fixture(scope="module")
def report_on_trespasses(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the contracts say of a copy in which each of ``TRESPASSES`` is imported."""
    house = copy_of_the_house(tmp_path_factory.mktemp("house"))
    for module, target in TRESPASSES:
        with (house / module.replace(".", "/")).with_suffix(".py").open("a") as source:
            source.write(f"\n\ndef _trespass() -> None:\n    import {target}\n")
    result = lint_imports(house)
    assert result.returncode == 1
    return result.stdout


@pytest.mark.parametrize(("module", "target"), TRESPASSES)
def test_a_forbidden_import_is_reported(report_on_trespasses: str, module: str, target: str) -> None:
    assert f"{module} -> {target} (l." in report_on_trespasses


def test_every_contract_can_be_broken(report_on_trespasses: str) -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        contracts = tomllib.load(file)["tool"]["importlinter"]["contracts"]
    for contract in contracts:
        assert f"{contract['name']} BROKEN" in report_on_trespasses


def test_a_module_without_a_room_is_refused(tmp_path: Path) -> None:
    house = copy_of_the_house(tmp_path)
    (house / "rlhf_ray" / "utils.py").write_text("")
    result = lint_imports(house)
    assert result.returncode == 1
    assert "utils" in result.stdout


def modules_of(room: str) -> list[str]:
    """Dotted names of a module, or of a package and all modules in it."""
    folder = ROOT / "rlhf_ray" / room
    files = sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]
    return [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files]


@pytest.mark.parametrize(
    ("room", "unwanted"),
    [
        ("config", (*HEAVY, "torch")),
        ("config_file", (*HEAVY, "torch")),
        ("errors", (*HEAVY, "torch")),
        ("types", HEAVY),
        ("interfaces", HEAVY),
        ("algorithms", HEAVY),
        ("pipeline", HEAVY),
    ],
)
def test_a_light_room_imports_no_heavy_library(room: str, unwanted: tuple[str, ...]) -> None:
    """In a fresh interpreter: the contracts read source, and see neither a parent's ``__init__`` nor importlib."""
    modules = modules_of(room)
    lines = [
        "import importlib, sys",
        *(f"importlib.import_module({name!r})" for name in modules),
        f"print(*sorted(set({unwanted!r}) & set(sys.modules)))",
    ]
    program = "\n".join(lines)
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert modules
    assert result.stdout.split() == []


def test_the_readme_says_what_every_file_is_for() -> None:
    readme = (ROOT / "README.md").read_text()
    modules = [str(file.relative_to(ROOT / "rlhf_ray")) for file in (ROOT / "rlhf_ray").rglob("*.py")]
    unnamed = [name for name in sorted(modules) if not name.endswith("/__init__.py") and f"`{name}`" not in readme]
    assert unnamed == []
