"""The server under a fuzzer that reads its OpenAPI description."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from pellucid.data import load_data
from pellucid.glass.answers import Answers, Subject, sample_inputs
from pellucid.glass.guard import Guard
from pellucid.glass.opening import open_target
from pellucid.glass.server import DESCRIPTION
from pellucid.glass.shelf import Shelf
from pellucid.models import create_model

schemathesis = pytest.importorskip("schemathesis")
GenerationMode = schemathesis.GenerationMode
positive_data_acceptance = pytest.importorskip("schemathesis.specs.openapi.checks").positive_data_acceptance
pytestmark = pytest.mark.slow

Serving = Callable[[Answers], AbstractContextManager[Guard]]


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory, serving: Serving) -> Iterator[Guard]:
    root = tmp_path_factory.mktemp("runs")
    (root / "one").mkdir()
    (root / "one" / "config.yaml").write_text("model: crate_digits\n")
    outside: Path = root.parent / "outside"
    outside.mkdir(exist_ok=True)
    (outside / "config.yaml").write_text("model: OUTSIDE\n")
    torch.manual_seed(0)
    digits = load_data("digits")
    subject = Subject(create_model("crate_digits", depth=1).eval(), "crate_digits", digits)
    answers = Answers(
        "t", [subject], sample_inputs(digits, 2), shelf=Shelf(root), takes_inputs=True, audit_limit=4
    )
    with serving(answers) as guard:
        yield guard


@pytest.fixture(scope="module")
def reading(text_run: Path, serving: Serving) -> Iterator[Guard]:
    """The same with a model that reads text."""
    answers = open_target(str(text_run))
    assert isinstance(answers, Answers)
    answers.audit_limit = 2
    with serving(answers) as guard:
        yield guard


OPERATIONS = [found.ok() for found in schemathesis.openapi.from_dict(DESCRIPTION).get_all_operations()]


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.label)
@pytest.mark.parametrize(
    "mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["as told", "against it"]
)
@pytest.mark.parametrize("place", ["guard", "reading"])
def test_no_fault_and_nothing_from_outside(operation, mode: GenerationMode, place: str, request) -> None:
    guard = request.getfixturevalue(place)
    headers = {"Authorization": f"Bearer {guard.token}"}
    base = f"http://127.0.0.1:{guard.port}"

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    def ask(case) -> None:
        response = case.call(base_url=base, headers=headers)
        assert response.status_code < 500
        assert b"OUTSIDE" not in response.content
        if mode is GenerationMode.POSITIVE:  # numbers of things that are not there are as told, and refused
            case.validate_response(response, excluded_checks=[positive_data_acceptance])

    ask()


def test_every_address_is_described(guard: Guard) -> None:
    described = {path.replace("{", "").replace("}", "") for path in DESCRIPTION["paths"]}
    routes = {
        route.path.replace(":int", "").replace("{", "").replace("}", "")
        for route in guard.app.routes
        if route.path.startswith("/api/")
    }
    assert routes == described
