"""schemathesis over the server's own OpenAPI document: whatever comes, it is answered or refused, and never fails."""

import pytest

hypothesis = pytest.importorskip("hypothesis")
schemathesis = pytest.importorskip("schemathesis")


def fuzz(address, examples):
    """schemathesis: bodies that the server's own description allows, and bodies that it does not."""
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
    schema.config.generation.update(modes=list(schemathesis.GenerationMode))
    seen = 0
    for result in schema.get_all_operations():
        operation = result.ok()

        @hypothesis.given(case=operation.as_strategy())
        @hypothesis.settings(
            max_examples=examples,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        def answers(case):
            nonlocal seen
            seen += 1
            reply = case.call(timeout=30)
            assert reply.status_code < 500, (case.body, reply.text)

        answers()
    assert seen > examples


def test_anything_the_description_allows(address):
    fuzz(address, 8)


@pytest.mark.slow
def test_anything_the_description_allows_for_long(address):
    fuzz(address, 400)
