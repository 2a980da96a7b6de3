"""schemathesis makes requests out of our own OpenAPI: no route answers with a 500, or in a form
that it does not promise."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from tests.service.api.conftest import Running

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    schemathesis: Any = pytest.importorskip("schemathesis")

from hypothesis import HealthCheck, Phase, settings  # noqa: E402


@pytest.fixture(scope="module")
def api(mini: Running) -> Any:
    return schemathesis.openapi.from_url(f"{mini.url}/openapi.json")


def operations(api: Any) -> list[Any]:
    return [found.ok() for found in api.get_all_operations()]


def test_every_operation_holds_its_promises(api: Any, mini: Running) -> None:
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

    checks = [
        not_a_server_error,
        status_code_conformance,
        content_type_conformance,
        response_schema_conformance,
    ]
    asked = 0
    for operation in operations(api):

        @settings(
            max_examples=15,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.explicit, Phase.generate],
        )
        @schemathesis_given(operation)
        def ask(case: Any) -> None:
            nonlocal asked
            asked += 1
            response = case.call(base_url=mini.url)
            case.validate_response(response, checks=checks)

        ask()
    assert asked > 200


def schemathesis_given(operation: Any) -> Any:
    from hypothesis import given

    return given(case=operation.as_strategy())
