"""Networks of integer operators by compiled kernels: `Executor`, `executor`."""

from arrondi.graph.compiled.plans import Executor, executor, is_integer

__all__ = ["Executor", "executor", "is_integer"]
