"""The report's section about the reward model."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from rlhf_ray.metrics import write_json
from rlhf_ray.report.page import write_report
from rlhf_ray.report.reward_section import BOTTOM, LEFT, RIGHT, TOP, reward_section
from rlhf_ray.stages.reward_quality import ScoredPair, quality


def a_report(*margins: float, source: str = "survey") -> dict[str, object]:
    pairs = [
        ScoredPair(chosen=m, rejected=0.0, probability=1.0, chosen_tokens=4, rejected_tokens=2, source=source)
        for m in margins
    ]
    return {"accuracy": 0.5, "pairs": len(pairs), "order_agreement": 1.0, "quality": asdict(quality(pairs))}


def test_a_report_without_the_figures_has_no_section() -> None:
    assert reward_section(None) is None
    assert reward_section({"accuracy": 0.7}) is None


def test_a_dot_stands_where_its_bin_says() -> None:
    section = reward_section(a_report(50.0, 50.0, 50.0, 50.0, -50.0))
    assert section is not None
    (dot,) = section.dots  # said 100 %, observed 80 %
    assert dot.x == RIGHT
    assert dot.y == round(BOTTOM - 0.8 * (BOTTOM - TOP), 1)
    assert dot.about == "said 100%, observed 80% of 5 pairs"
    unsure = reward_section(a_report(0.0))
    assert unsure is not None
    assert (unsure.dots[0].x, unsure.dots[0].y) == (LEFT, TOP)


def test_the_page_shows_the_figures_and_escapes_what_a_file_brought(tmp_path: Path, hostile: str) -> None:
    (tmp_path / "reward").mkdir()
    write_json(tmp_path / "reward" / "reward_report.json", a_report(1.0, -1.0, 2.0, 3.0, source=hostile))
    page = write_report(tmp_path).read_text()
    assert "<h2>Reward model</h2>" in page
    assert "75% (30% to 95%) of 4" in page
    assert "most certain quarter" in page
    assert "<script>alert" not in page
