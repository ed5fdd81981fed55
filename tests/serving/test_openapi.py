"""The schema at ``/openapi.json`` is what the server does: schemathesis asks it whatever the schema allows, and not."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.serving.served import Served

OPERATIONS = [
    ("POST", "/v1/chat/completions"), ("GET", "/v1/models"), ("GET", "/v1/models/{name}"), ("GET", "/healthz"),
    ("GET", "/readyz"), ("GET", "/metrics"), ("GET", "/samples"), ("GET", "/samples/{version}/{name}"),
]  # fmt: skip
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
POSITIVE, NEGATIVE = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE
NUM_EXAMPLES = 40


@pytest.fixture(scope="session")
def server(shared_server: Served) -> Served:
    return shared_server


@pytest.fixture(scope="module")
def published(server: Served) -> dict[str, Any]:
    return dict(server.get("/openapi.json").json())


def test_every_operation_is_published_with_its_errors_as_they_are(published: dict[str, Any]) -> None:
    found = [(method.upper(), path) for path, methods in published["paths"].items() for method in methods]
    assert sorted(found) == sorted(OPERATIONS)
    for path, methods in published["paths"].items():
        for operation in methods.values():
            assert operation["description"], path
            assert "422" not in operation["responses"], f"FastAPI's own refusal, which is never given: {path}"
            refused = operation["responses"]["400"]["content"]["application/json"]["schema"]
            assert refused == {"$ref": "#/components/schemas/ErrorObject"}


def test_the_answer_is_published_as_an_object_and_as_events(published: dict[str, Any]) -> None:
    content = published["paths"]["/v1/chat/completions"]["post"]["responses"]["200"]["content"]
    assert content["application/json"]["schema"] == {"$ref": "#/components/schemas/Completion"}
    assert set(content) == {"application/json", "text/event-stream"}


@pytest.mark.parametrize(
    ("method", "path", "mode"),
    [(method, path, POSITIVE) for method, path in OPERATIONS]
    + [(method, path, NEGATIVE) for method, path in OPERATIONS if method == "POST" or "{" in path],
)
def test_whatever_is_asked_is_answered_as_it_is_published(
    server: Served, method: str, path: str, mode: schemathesis.GenerationMode
) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    has_inputs = method == "POST" or "{" in path

    @settings(
        max_examples=NUM_EXAMPLES if has_inputs else 2, deadline=None, database=None, derandomize=True,
        phases=[Phase.generate], suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=schema[path][method].as_strategy(generation_mode=mode))
    def ask(case: schemathesis.Case) -> None:
        case.call_and_validate(checks=CHECKS, timeout=60)

    ask()
