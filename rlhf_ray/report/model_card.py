"""The reward model's card, ``README.md`` in its folder: what it learnt from, how far to trust it, how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from rlhf_ray.config import RunConfig
from rlhf_ray.report.reward_section import reward_section

MODEL_CARD_FILE = "README.md"

_NAMED_ANNOTATORS = 5


@dataclass(frozen=True, slots=True)
class _Source:
    """A model or a data set by a name that says nothing of this machine's folders."""

    name: str
    on_hub: bool


def write_model_card(folder: Path, config: RunConfig, report: Mapping[str, Any]) -> Path:
    """Write the card into the reward model's folder.

    Args:
        report: what ``reward_report.json`` holds.
    """
    section = reward_section(report)
    annotators = [str(name) for name in report["annotators"]]
    environment = Environment(  # a Markdown file: nothing is escaped
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    card = environment.get_template("model_card.md").render(
        base=_source(config.model.path),
        data=f"`{_source(config.reward.data).name}`" if config.reward.data else "responses of its base model",
        annotators=_named(annotators),
        simulated=[name for name in annotators if name.startswith("simulated:")],
        report=report,
        figures=section.figures if section else [],
        reward=config.reward,
        prompt_format=config.prompts.format,
        seed=config.seed,
    )
    path = folder / MODEL_CARD_FILE
    path.write_text(card + "\n", encoding="utf-8")
    return path


def _source(path: str) -> _Source:
    """The hub's name where it is one, else the last part of the path."""
    local = Path(path).expanduser()
    on_hub = path.count("/") == 1 and not local.is_absolute() and not local.parent.is_dir()
    return _Source(path if on_hub else local.name, on_hub)


def _named(annotators: list[str]) -> str:
    if len(annotators) > _NAMED_ANNOTATORS:
        return f"{len(annotators)} annotators"
    return ", ".join(f"`{name}`" for name in annotators)
