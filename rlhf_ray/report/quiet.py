"""Keeps the libraries' bars, banners and warnings off the screen: a person sees the run, not its plumbing."""

from __future__ import annotations

import logging
import os
import warnings

# The user's own setting of any of these wins. HF_HUB_OFFLINE is not among them: a hub id is a lawful ``model.path``.
ENVIRONMENT = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",  # forked workers otherwise warn, once each
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",  # Serve's own log files keep everything
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # the coming default; unset, every worker without a GPU warns
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "PYTHONWARNINGS": "ignore",  # for worker processes, which take over our environment
}
LOGGERS = (
    "transformers",
    "datasets",
    "trl",
    "accelerate",
    "vllm",
    "ray",
    "torch",
    "httpx",
    "httpcore",
    "huggingface_hub",
)


def quiet_libraries() -> None:
    """Ask every library for errors only. Call it before any of them is imported: most read their settings then."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    warnings.filterwarnings("default", module=r"rlhf_ray(\.|$)")
