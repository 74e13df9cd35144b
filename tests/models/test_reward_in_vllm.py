"""vLLM reads the folder that training leaves, and gives the raw scores that we do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_ray.cluster import WORKER_ENV
from rlhf_ray.roles.scorer import RewardScorer

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

PROGRAM = """
import json, sys
import torch
torch._dynamo.config.disable = True
from vllm import LLM, PoolingParams
folder, sequences = sys.argv[1], json.loads(sys.argv[2])
options = {"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 32 << 20, "max_model_len": 256}
llm = LLM(model=folder, runner="pooling", disable_log_stats=True, **options)
prompts = [{"prompt_token_ids": ids} for ids in sequences]
outputs = llm.classify(prompts, pooling_params=PoolingParams(use_activation=False), use_tqdm=False)
print(json.dumps([output.outputs.probs for output in outputs]))
"""
"""In a process of its own: vLLM changes threads, random state and memory binding of the whole process."""


def test_vllm_s_pooling_runner_gives_the_same_raw_scores(tiny_reward_dir: Path) -> None:
    sequences = [[7, 8, 33, 0], [5] * 40 + [0], [*range(10, 200), 0], [0]]
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tiny_reward_dir), json.dumps(sequences)],
        env=os.environ | dict(WORKER_ENV),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    theirs = [raw for (raw,) in json.loads(result.stdout.splitlines()[-1])]
    ours = [score.raw for score in RewardScorer(tiny_reward_dir, precision="float32").score_ids(sequences)]
    assert max(ours) - min(ours) > 0.1
    assert theirs == pytest.approx(ours, abs=1e-4)
