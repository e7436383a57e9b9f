"""A method that refuses a case is asked once, not by every property."""

from __future__ import annotations

import pytest

from .cases import Subject, refusal


@pytest.fixture(autouse=True)
def _skip_what_is_refused(request: pytest.FixtureRequest) -> None:
    subject = getattr(request.node, "callspec", None) and request.node.callspec.params.get("subject")
    if isinstance(subject, Subject) and not subject.refused_too:
        reason = refusal(subject.method, subject.case)
        if reason is not None:
            pytest.skip(reason)
