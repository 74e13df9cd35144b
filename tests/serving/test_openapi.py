"""Whatever the OpenAPI description allows, and what it does not, gets an answer that it names, and never a 5xx."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import schemathesis
import uvicorn
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from rlhf_ray.roles.scorer import RewardScorer
from rlhf_ray.serving.args import RewardServiceArgs
from rlhf_ray.serving.http import http_app
from rlhf_ray.serving.reward_service import RewardService

KEY = "a-key-of-some-length"


@pytest.fixture(scope="module")
def api(tiny_reward_dir: Path) -> Iterator[schemathesis.BaseSchema]:
    scorer = RewardScorer(tiny_reward_dir, precision="float32", threads=1)
    service = RewardService(RewardServiceArgs(model="given", batch_wait_ms=0, max_items=8), scorer)
    app = http_app(service, key_digests=[hashlib.sha256(KEY.encode()).hexdigest()])
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield schemathesis.openapi.from_url(f"http://127.0.0.1:{port}/openapi.json")
    finally:
        server.should_exit = True
        thread.join(30)


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_every_answer_is_one_that_the_description_names(api: schemathesis.BaseSchema, mode: GenerationMode) -> None:
    operations = [operation.ok() for operation in api.get_all_operations()]
    assert len(operations) == 8
    answered: set[tuple[str, int]] = set()
    for operation in operations:
        if mode is GenerationMode.NEGATIVE and operation.method == "get":
            continue  # nothing in it can be wrong

        @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy(generation_mode=mode))
        def answer(case: schemathesis.Case) -> None:
            headers = {"Authorization": f"Bearer {KEY}"}
            response = case.call(headers=headers)
            # The description cannot say that a text has too many tokens: what it allows may still be told 422.
            case.validate_response(response, headers=headers, excluded_checks=[positive_data_acceptance])
            assert response.status_code < 500, response.text
            answered.add((case.path, response.status_code))

        answer()
    expected = 200 if mode is GenerationMode.POSITIVE else 422
    for operation in operations:
        if operation.method == "post":
            assert (operation.path, expected) in answered
