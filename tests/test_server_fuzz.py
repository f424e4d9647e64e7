"""Requests that schemathesis derives from the server's own OpenAPI schema: no 5xx, and replies are as documented."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from zlib import crc32

import httpx
import pytest
import schemathesis
from hypothesis import Phase, given, settings
from schemathesis import GenerationMode, checks
from schemathesis.config import SchemathesisConfig
from server import MODEL, Served, serving

from knn_ssd.server.app import ServeSettings
from knn_ssd.server.scheduler import Limits

MOST_TOKENS = 3  # of an answer, so that a case is quick
checks.load_all_checks()
CHECKS = checks.CHECKS.get_by_names(
    [
        "not_a_server_error",
        "status_code_conformance",
        "content_type_conformance",
        "response_headers_conformance",
        "response_schema_conformance",
    ]
)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    yield from serving(ServeSettings(MODEL, limits=Limits(running=4, waiting=50), body_sec=2.0))


@pytest.fixture
def api(served: Served) -> Any:
    return schemathesis.openapi.from_url(f"{served.url}/openapi.json", config=SchemathesisConfig(seed=0))


OPERATIONS = [
    "POST /v1/chat/completions",
    "POST /v1/completions",
    "GET /v1/models",
    "GET /v1/models/{model}",
    "GET /atlas",
    "GET /health",
    "GET /ready",
    "GET /metrics",
]


def test_every_operation_is_tried(api: Any) -> None:
    assert {operation.ok().label for operation in api.get_all_operations()} == set(OPERATIONS)


@pytest.mark.parametrize(
    ("operation", "mode"),
    [
        *((operation, GenerationMode.POSITIVE) for operation in OPERATIONS),
        *(
            (operation, GenerationMode.NEGATIVE) for operation in OPERATIONS if operation.startswith("POST")
        ),  # others take nothing
    ],
)
def test_no_request_makes_an_error_of_the_server_and_every_reply_is_as_documented(
    api: Any, operation: str, mode: GenerationMode
) -> None:
    method, path = operation.split()
    operation = api[path][method]

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(max_examples=100 if method == "POST" else 2, phases=[Phase.explicit, Phase.generate, Phase.shrink])
    def holds(case: Any) -> None:
        tame(case.body)
        case.call_and_validate(checks=CHECKS, timeout=20)

    holds()


def tame(body: Any) -> None:
    """Three in four requests ask for the model that is served; none asks for many tokens."""
    if isinstance(body, dict):
        if crc32(json.dumps(body, sort_keys=True, default=str).encode()) % 4:
            body["model"] = MODEL
        limits = [name for name in ("max_tokens", "max_completion_tokens") if isinstance(body.get(name), int)]
        for name in limits or ["max_tokens"]:
            asked = body.get(name)
            body[name] = min(asked, MOST_TOKENS) if isinstance(asked, int) else MOST_TOKENS


def test_the_schema_names_every_refusal(served: Served) -> None:
    paths = httpx.get(f"{served.url}/openapi.json").json()["paths"]
    for path in ("/v1/chat/completions", "/v1/completions"):
        responses = paths[path]["post"]["responses"]
        assert set(responses) >= {"200", "400", "401", "404", "408", "413", "429", "503", "504"}
        assert "422" not in responses
        assert set(responses["200"]["content"]) == {"application/json", "text/event-stream"}
        for status, response in responses.items():
            if status != "200":
                assert response["content"]["application/json"]["schema"]["$ref"].endswith("/ErrorBody")
