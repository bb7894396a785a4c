"""Which parameter multiplies what, seen while a model runs.

Owns: `watch`, which reports every product with a parameter before it is computed; `trace`, which runs a model once and
tells what its parameters are used for; and `Stage`, parameters that can be rounded together.

Calls of torch are watched, not modules: linears, GPT-2's Conv1D, stacks of experts and products written out are one thing
here. Only functions that hide their products (attention and recurrent layers of torch) are looked into, below Python;
recurrent layers run without their fused kernels meanwhile, so that the inputs of every step are seen. Scripted and compiled
functions (`torch.jit.script`, `torch.compile`) are not looked into.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch._ops import OpOverload, OpOverloadPacket
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from arrondi.model.flow_bare import Bare
from arrondi.model.flow_ops import ATEN, INSIDE, PRODUCTS, RECURRENT, Call
from arrondi.model.flow_own import changes_in_place
from arrondi.model.flow_regions import Reads, Regions
from arrondi.model.flow_routers import Experts, Routers, tensors_of
from arrondi.model.flow_uses import Use, uses_of

__all__ = ["Flow", "Stage", "Use", "find_stages", "trace", "watch"]


@dataclass
class Stage:
    """Parameters that can be rounded together: none depends on another's output.

    Attributes:
        leaders: parameter → the first parameter that reads the same inputs (itself, if it is the first).
        reduces_last: parameter → whether its last axis is the one summed over.
    """

    leaders: dict[str, str] = field(default_factory=dict)
    reduces_last: dict[str, bool] = field(default_factory=dict)


@dataclass(frozen=True)
class Flow:
    """What one run of a model has shown.

    Attributes:
        uses: every product with a parameter, in order, without the activations.
        stages: parameters in the order in which they are first used, grouped by what they read (embeddings are in none).
        readers: parameter → numbers of the activations that it multiplies.
        routers: parameters that choose experts.
        bare: parameter → how it is read otherwise than as a whole operand of a product of its own module: such a weight
            cannot be replaced by packed codes.
        beside: weight of a layer whose class has a program of its own → what that computes besides the product.
        reshaped: parameters of linear layers whose input does not come as (windows, tokens, n): two axes do not number its rows.
        stopped: why the run ended early (shapes alone did not tell how to go on), "" if it did not.
    """

    uses: tuple[Use, ...]
    stages: list[Stage]
    readers: dict[str, tuple[int, ...]]
    routers: frozenset[str]
    bare: dict[str, str]
    beside: Mapping[str, str] = field(default_factory=dict)
    reshaped: frozenset[str] = frozenset()
    stopped: str = ""

    @property
    def complete(self) -> bool:
        """Whether the run went to its end."""
        return not self.stopped


@contextlib.contextmanager
def watch(params: Mapping[str, torch.Tensor], report: Callable[[Use], None]) -> Iterator[None]:
    """Call `report` before every product with one of `params` inside the `with` block.

    Parameters that share storage are told apart by where they lie in it; where several contain an operand, the smallest is
    named, and of equal ones the first.
    """
    with _Watcher(Regions(params), report):
        yield


def trace(model: nn.Module | None, params: Mapping[str, torch.Tensor], run: Callable[[], object]) -> Flow:
    """Watch `run`, which runs `model`, and tell what `params` are used for.

    Args:
        model: whose modules are asked who owns a weight; None if that does not matter for `bare`.
        params: parameters by name. On the meta device the run ends where it needs values.
        run: takes the model through one or several batches. Matrices that no batch reaches (experts) are in no stage, and
            what a model does at its first run alone is only seen if this is its first.
    """
    uses: list[Use] = []
    reshaped: set[str] = set()
    regions = Regions(params)
    routers = Routers(Experts(params))

    def report(use: Use) -> None:
        routers.used(use, params[use.param])
        if use.kind == "linear" and use.source is not None and not rows_on_two_axes(use.source):
            reshaped.add(use.param)
        if use.kind in ("linear", "einsum") and not use.reduces_last:
            bare.beside.turned(use.param)
        uses.append(replace(use, source=None))

    bare = Bare(regions)
    watcher = _Watcher(regions, report, bare, routers)
    with bare.owners(model), watcher:
        try:
            run()
        except Exception as error:
            if not watcher.lacked_values(error):
                raise
    whole = {name: str(reason) for name, reason in bare.reasons.items()}
    readers: dict[str, list[int]] = {}
    for use in uses:
        readers.setdefault(use.param, []).append(use.reads)
        if (use.rows is not None or use.columns is not None) and use.kind != "convolution":
            whole.setdefault(use.param, f"a part of it ({use.kind})")
    numbers = {param: tuple(dict.fromkeys(reads)) for param, reads in readers.items()}
    chosen = routers.found(not watcher.stopped)
    return Flow(
        tuple(uses), _stages(uses), numbers, chosen, whole, bare.beside.reasons, frozenset(reshaped), watcher.stopped
    )


def rows_on_two_axes(x: torch.Tensor) -> bool:
    """Whether the first two axes of an input number its rows, as in (windows, tokens, n)."""
    return x.ndim > 2 and math.prod(x.shape[2:-1]) == 1


def find_stages(params: Mapping[str, torch.Tensor], run: Callable[[], object]) -> list[Stage]:
    """The stages of `run` in the order of use; parameters that it does not multiply by are in none."""
    uses: list[Use] = []
    with watch(params, lambda use: uses.append(replace(use, source=None))):
        run()
    return _stages(uses)


def _stages(uses: list[Use]) -> list[Stage]:
    """Parameters with the same inputs, use by use, share a stage."""
    inputs: dict[str, list[tuple[Any, ...]]] = {}
    last: dict[str, bool] = {}
    for use in uses:
        if use.kind != "embedding":
            inputs.setdefault(use.param, []).append((use.matrix, str(use.rows), str(use.columns), use.reads))
            last.setdefault(use.param, use.reduces_last)
    stages: dict[tuple[Any, ...], Stage] = {}
    for param, read in inputs.items():
        stage = stages.setdefault(tuple(read), Stage())
        stage.leaders[param] = next(iter(stage.leaders), param)
        stage.reduces_last[param] = last[param]
    return list(stages.values())


class _Watcher(TorchFunctionMode):
    """Reports products; with `bare` and `routers`, also what else happens to parameters and to their outputs."""

    def __init__(
        self, regions: Regions, report: Callable[[Use], None], bare: Bare | None = None, routers: Routers | None = None
    ) -> None:
        self._regions, self._report, self._bare, self._routers = regions, report, bare, routers
        self._reads, self._order = Reads(), 0
        self._failed: Exception | None = None
        self.stopped = ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        parse = PRODUCTS.get(func)
        seen: set[str] = set()
        if parse is not None:
            seen = {p for call in parse(args, kwargs) for p in self.see(call)}
        hidden = func in INSIDE or isinstance(func, OpOverload | OpOverloadPacket)
        if self._bare is None or self._routers is None:
            result = self._look_inside(func, args, kwargs) if hidden else func(*args, **kwargs)
        else:
            self._bare.before(func, args, kwargs)
            try:
                result = self._look_inside(func, args, kwargs) if hidden else func(*args, **kwargs)
            except (NotImplementedError, RuntimeError) as error:
                if any(t.is_meta for t in tensors_of((args, kwargs))):
                    self._failed = error
                    self.stopped = (
                        f"{getattr(func, '__name__', func)}: {str(error).splitlines()[0] if str(error) else ''}"
                    )
                raise
            self._bare.after(func, args, kwargs, result, seen)
            product = parse is not None or func in INSIDE
            self._routers.called(func, args, kwargs, list(tensors_of([result])), seen, product)
        written = [kwargs.get("out")]
        if changes_in_place(getattr(func, "__name__", "")) or kwargs.get("inplace"):
            written += args[:1]
        for tensor in tensors_of(written):
            self._reads.changed(tensor)
        return result

    def see(self, call: Call, kind: str | None = None) -> set[str]:
        """Report the uses in a product; the parameters that were used."""
        seen = set()
        for use in uses_of(call, self._regions, self._reads, self._count):
            self._report(use if kind is None else replace(use, kind=kind))
            seen.add(use.param)
        return seen

    def lacked_values(self, error: BaseException | None) -> bool:
        """Whether an error, or what it came from, is a function that failed on tensors without values."""
        while error is not None:
            if error is self._failed:
                return True
            error = error.__cause__ or error.__context__
        return False

    def _count(self) -> int:
        self._order += 1
        return self._order - 1

    def _look_inside(self, func: Any, args: Any, kwargs: Any) -> Any:
        kind = "recurrent" if func in RECURRENT else None
        with _unfused() if kind else contextlib.nullcontext(), _Inside(lambda call: self.see(call, kind)):
            return func(*args, **kwargs)


class _Inside(TorchDispatchMode):
    """Sees the products of one function below Python."""

    def __init__(self, see: Callable[[Call], object]) -> None:
        super().__init__()
        self._see = see

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        parse = ATEN.get(func.overloadpacket)
        for call in parse(args, kwargs) if parse is not None else ():
            self._see(call)
        if parse is None and torch.is_inference_mode_enabled() and func._can_decompose():
            with self:  # inference mode leaves functions whole that are made of others
                whole = func.decompose(*args, **kwargs)
            if whole is not NotImplemented:
                return whole
        return func(*args, **kwargs)


@contextlib.contextmanager
def _unfused() -> Iterator[None]:
    """Recurrent layers step by step."""
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        with torch.backends.cudnn.flags(enabled=False):
            yield
    finally:
        torch._C._set_mkldnn_enabled(before)
