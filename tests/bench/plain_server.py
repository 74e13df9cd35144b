"""The peer of ``reward_service.py``: a reward model behind FastAPI in one process, with a blocking forward per request.

    python tests/bench/plain_server.py FOLDER PORT [--dtype float32]

It is what one writes first, and the shape of OpenRLHF's server: same route and reply, ``async def`` handler, EOS put to
the end of every query, one padded forward for the queries of a request. Nothing is slower than it need be: a fast
tokenizer, sdpa, inference mode, no key-value cache, every core.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer


class Queries(BaseModel):
    query: list[str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("port", type=int)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    arguments = parser.parse_args()
    app = server(arguments.folder, getattr(torch, arguments.dtype))
    uvicorn.run(app, host="127.0.0.1", port=arguments.port, log_level="warning", access_log=False)


def server(folder: str, dtype: torch.dtype) -> FastAPI:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").eval()
    app = FastAPI()

    @torch.inference_mode()
    def rewards(texts: list[str]) -> list[float]:
        whole = [text.removesuffix(tokenizer.eos_token) + tokenizer.eos_token for text in texts]
        inputs = tokenizer(whole, return_tensors="pt", padding=True)
        logits = model(**inputs, use_cache=False).logits
        scores: list[float] = logits.float().squeeze(-1).tolist()
        return scores

    @app.post("/get_reward")
    async def get_reward(queries: Queries) -> dict[str, Any]:
        scores = rewards(queries.query)
        return {"rewards": scores, "scores": scores, "extra_logs": {}}

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    return app


if __name__ == "__main__":
    main()
