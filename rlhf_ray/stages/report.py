"""Report: the run's folder as one self-contained HTML page."""

from __future__ import annotations

from pathlib import Path

from rlhf_ray.config import RunConfig
from rlhf_ray.report.page import write_report


def write(config: RunConfig) -> Path:
    """Write ``report.html`` into the run's folder and return its path.

    Raises:
        DataError: the run has left nothing to report on yet.
    """
    return write_report(config.run_dir, samples=config.report.samples)
