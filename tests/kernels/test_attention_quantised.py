"""attention_decode over int8 and 4-bit pages, and its options over every kind: bodies against the reference, and what must hold.

Triton's body runs on a card, or in its interpreter: test_in_the_interpreter starts this file again in a process of its own.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

from percard.kernels.attention_decode import cases
from percard.kernels.conformance import faults

from .conftest import only, unserved

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def refused(body: Any, args: tuple[Any, ...]) -> bool:
    """Whether a body says that it does not take these pages."""
    return body.op.body(body.name).takes(*body.op.contract.unwrap(*args)) is not None


@only("attention_decode")
def test_forms_of_pages_and_options(body: Any, seed: int, subtests: pytest.Subtests) -> None:
    for case in cases.FORMS:
        if not unserved(body, case.dtype):
            with subtests.test(case.name):
                args = cases.inputs(case, seed, body.where)
                if body.name != "triton" or not refused(body, args):
                    assert faults(body.op, body.name, args) == [], f"{case.name}, seed {seed}"
