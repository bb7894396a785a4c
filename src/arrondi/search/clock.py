"""How long graphs take on this machine: `Clock`, ONNX Runtime where it is installed, else our compiled executor."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import torch

from arrondi.errors import MissingExtraError, SchemeError
from arrondi.graph import Graph, executor, lower, to_onnx
from arrondi.native import native, threads

Call = Callable[[], Any]

_WARM: Final = 3
_LEAST: Final = 7
_MOST: Final = 60
_SECONDS: Final = 0.3
"""Calls of a graph that are not counted; that are at least, and at most; and after how much time no further one follows."""


class Clock:
    """What runs graphs, and for how long.

    Attributes:
        runtime: its name, for people.
        threads: that it has.

    Raises:
        MissingExtraError: nothing runs integers here.
    """

    def __init__(self) -> None:
        self.threads = threads()
        try:
            import onnxruntime
        except ImportError as error:
            if native is None or native.path() == "portable":
                raise MissingExtraError(
                    "A budget of time is measured in ONNX Runtime or by the compiled kernels, and neither is here: pip install onnxruntime."
                ) from error
            self.runtime, self._runs = "Arrondi's executor", _by_us
            return
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = self.threads, 4
        self.runtime = f"ONNX Runtime {onnxruntime.__version__}"

        def by_runtime(graph: Graph, given: Sequence[torch.Tensor]) -> Call:
            try:
                made = to_onnx(graph).SerializeToString()
                session = onnxruntime.InferenceSession(made, options, providers=["CPUExecutionProvider"])
            except Exception as error:  # the runtime has many
                line = str(error).strip().partition("\n")[0][:200]
                raise SchemeError(
                    f"ONNX Runtime does not run {graph.name}, so its time cannot be measured ({line}). Give a budget of bits."
                ) from error
            names = [v.name for v in session.get_inputs()]
            arrays = {
                v.name: np.asarray(x.numpy()) for v, x in zip(graph.inputs, given, strict=True) if v.name in names
            }
            return lambda: session.run(None, arrays)

        self._runs = by_runtime

    def times(self, graphs: Sequence[Graph], inputs: Sequence[Sequence[torch.Tensor]]) -> list[float]:
        """Microseconds of one call of each: medians. They take turns, so that other work on the machine slows all alike."""
        calls = [self._runs(graph, given) for graph, given in zip(graphs, inputs, strict=True)]
        for call in calls * _WARM:
            call()
        found: list[list[float]] = [[] for _ in calls]
        began = time.perf_counter()
        while len(found[0]) < _LEAST or (len(found[0]) < _MOST and time.perf_counter() - began < _SECONDS * len(calls)):
            for times, call in zip(found, calls, strict=True):
                start = time.perf_counter()
                call()
                times.append(time.perf_counter() - start)
        return [1e6 * statistics.median(times) for times in found]


def _by_us(graph: Graph, given: Sequence[torch.Tensor]) -> Call:
    run = executor(lower(graph).graph)

    @torch.no_grad()
    def call() -> Any:
        return run(*given)

    return call
