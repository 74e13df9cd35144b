"""The report's section about the reward model: its figures, and how well its certainty is earned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LEFT, RIGHT, TOP, BOTTOM = 44.0, 248.0, 10.0, 214.0
"""Of the reliability plot, in its own units: from 0.5 to 1 said across, from 0 to 1 observed upwards."""

LARGEST_DOT = 11.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Dot:
    """One calibration bin as it is drawn."""

    x: float
    y: float
    radius: float
    about: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardSection:
    """What the template shows."""

    figures: list[tuple[str, str]]
    groups: list[tuple[str, str]]
    """Accuracy of a source or of a quarter by certainty."""
    dots: list[Dot]


def reward_section(report: Mapping[str, Any] | None) -> RewardSection | None:
    """None where there is no report, or one of before it had these figures."""
    if report is None or "quality" not in report:
        return None
    found = report["quality"]
    figures = [
        ("Accuracy on held-out pairs", _accuracy(found["accuracy"])),
        ("Log-loss", f"{found['log_loss']:.3f} nats (0.693 knows nothing)"),
        ("Calibration error (ECE)", f"{found['calibration_error']:.3f}"),
        ("Correlation of score and length", f"{found['length_correlation']:+.2f}"),
        (
            "Prefers the longer candidate",
            f"{found['longer_preferred']:.0%} of pairs; people {found['longer_preferred_by_people']:.0%}",
        ),
        ("Same verdict in the other order", f"{report['order_agreement']:.1%}"),
    ]
    quarters = ("least certain quarter", "second quarter", "third quarter", "most certain quarter")
    groups = [
        *((f"source {source}", _accuracy(of)) for source, of in found["by_source"].items()),
        *((name, _accuracy(group["accuracy"])) for name, group in zip(quarters, found["by_margin"], strict=False)),
    ]
    return RewardSection(figures=figures, groups=groups, dots=_dots(found["calibration"]))


def _accuracy(found: Mapping[str, Any]) -> str:
    return f"{found['value']:.0%} ({found['low']:.0%} to {found['high']:.0%}) of {found['pairs']}"


def _dots(bins: list[Mapping[str, Any]]) -> list[Dot]:
    most = max((found["pairs"] for found in bins), default=1)
    return [
        Dot(
            x=round(LEFT + (found["predicted"] - 0.5) * 2 * (RIGHT - LEFT), 1),
            y=round(BOTTOM - found["observed"] * (BOTTOM - TOP), 1),
            radius=round(max(2.5, LARGEST_DOT * (found["pairs"] / most) ** 0.5), 1),
            about=f"said {found['predicted']:.0%}, observed {found['observed']:.0%} of {found['pairs']} pairs",
        )
        for found in bins
    ]
