"""The meaning of attention_decode, in plain torch: kernels/attention.py has it, decode and prefill mean the same."""

from __future__ import annotations

from typing import Any

from .. import attention
from ..attention import Attention, Outputs


def run(*flat: Any) -> Outputs:
    return attention.reference(Attention(*flat[:-1]))
