"""Report: the run's folder as one self-contained HTML page."""

from __future__ import annotations

from pathlib import Path

from rlhf_ray.config import RunConfig
from rlhf_ray.report.page import write_comparison_page, write_report
from rlhf_ray.stages.evaluate import Evaluation, pairing


def write(config: RunConfig) -> Path:
    """Write ``report.html`` into the run's folder and return its path.

    Raises:
        DataError: the run has left nothing to report on yet.
    """
    return write_report(config.run_dir, samples=config.report.samples)


def write_comparison(config: RunConfig, evaluation: Evaluation) -> Path:
    """Write a comparison's page beside its JSON file and return its path."""
    path = pairing(config).output.with_suffix(".html")
    return write_comparison_page(path, evaluation, samples=config.report.samples)
