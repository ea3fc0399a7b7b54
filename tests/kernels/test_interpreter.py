"""The Triton bodies without a card: the conformance suite again, in a process where Triton interprets its kernels.

A process of its own, because TRITON_INTERPRET must stand before triton is imported, and then no kernel of that process
can be compiled any more (which the tests of inspection.py do). The interpreter cannot do inline assembly, and until
September 2026 multiplied bf16 as bit patterns: so fp16 runs here, with USE_ASM off; bf16 and assembly run on a card.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

OPS = ("quantize_rows", "matmul_w8a8", "matmul_w4a16", "matmul_w8a16", "matmul_w4a8")
SUITES = [Path(__file__).with_name(name) for name in ("test_conformance.py", "test_batch_invariant.py")]


@pytest.fixture(scope="module")
def results(
    tmp_path_factory: pytest.TempPathFactory, run_interpreted: Callable[..., str]
) -> Iterator[list[ElementTree.Element]]:
    """The test cases of the interpreted suite, with what failed in them."""
    report = tmp_path_factory.mktemp("interpreter") / "report.xml"
    said = run_interpreted(SUITES, "-k", "triton", f"--junitxml={report}", must_pass=False)
    assert report.exists(), said[-6000:]
    yield list(ElementTree.parse(report).getroot().iter("testcase"))


@pytest.mark.parametrize("op", OPS)
def test_triton_body_agrees_with_its_reference(results: list[ElementTree.Element], op: str) -> None:
    mine = [case for case in results if f"[{op}-triton" in case.get("name", "")]
    failed = [
        f"{case.get('name')}: {(fault.text or fault.get('message') or '')[-1500:]}"
        for case in mine
        for fault in (*case.findall("failure"), *case.findall("error"))
    ]
    assert not failed, "\n\n".join(failed)
    ran = [case for case in mine if case.find("skipped") is None]
    assert len(ran) >= 20, f"only {len(ran)} of {len(mine)} ran"
