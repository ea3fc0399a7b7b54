"""CUDA graphs of the decode loop: one replay instead of thousands of launches, as serving stacks do it.

A loop that always starts at the same depth has fixed shapes, so the whole of it fits one graph. On a CPU a function
stays a function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def capture(function: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """`function` as one replay of a CUDA graph, or itself on a CPU.

    It must read its inputs from tensors that stay in place and take nothing from the host meanwhile. RuntimeError
    (torch's) when something in it cannot be captured.
    """
    if device.type != "cuda":
        return function
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # compiles kernels and makes library workspaces before the capture
        function()
        function()
    torch.cuda.current_stream(device).wait_stream(stream)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        function()
    return graph.replay
