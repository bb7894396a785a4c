"""Which parameters are read otherwise than by products of their own module.

Owns: `Bare`. A layer whose weight another module reads, or that computes with its weight's numbers, cannot hold packed codes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from operator import attrgetter
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from arrondi.model.flow_ops import PRODUCTS
from arrondi.model.flow_own import COPIES, Beside
from arrondi.model.flow_regions import Regions, storage_key
from arrondi.model.flow_routers import tensors_of

_T = torch.Tensor
# Facts about a tensor; packed weights have them too.
_FACTS = {
    *(_T.size, _T.dim, _T.ndimension, _T.stride, _T.numel, _T.nelement, _T.element_size, _T.is_contiguous),
    *(_T.storage_offset, _T.data_ptr, _T.untyped_storage, _T.get_device, _T.is_floating_point, _T.is_complex),
    *(_T.__len__, _T.__hash__, _T.__repr__, _T.requires_grad_, _T.is_inference, _T.is_shared, _T.is_pinned),
    *(torch.is_floating_point, torch.is_complex, torch.numel, torch.result_type, torch.is_inference),
    *(torch.empty_like, torch.zeros_like, torch.ones_like, torch.full_like, torch.rand_like, torch.randn_like),
    *(_T.new_empty, _T.new_zeros, _T.new_ones, _T.new_full, _T.new_tensor),
}
# What a packed stack of experts can do besides giving one matrix.
_OF_STACKS = COPIES | {torch.bmm, _T.bmm, torch.matmul, _T.matmul, _T.__matmul__, _T.__iter__}
_DATA = attrgetter("data.__get__")(_T)


class Bare:
    """Watches what else is done with parameters.

    Attributes:
        reasons: parameter → the first other use: the function, and the module that called it.
        beside: what layers with a program of their own compute beside their product.
    """

    def __init__(self, regions: Regions) -> None:
        self.reasons: dict[str, str] = {}
        self.beside = Beside()
        self._regions = regions
        self._running: list[nn.Module] = []
        self._paths: dict[int, str] = {}
        self._owners: dict[str, set[int]] = {}
        self._stacks: dict[int, str] = {}
        self._versions: list[tuple[torch.Tensor, int]] = []

    @contextlib.contextmanager
    def owners(self, model: nn.Module | None) -> Iterator[None]:
        """Within it, weights that are read while a module of `model` runs that does not own them are found."""
        if model is None:
            yield
            return
        self._paths = {id(m): path for path, m in model.named_modules()}
        for module in model.modules():
            if not _runs(module):
                continue
            for held in [module, *(m for m in module.children() if not _runs(m))]:
                for param in held.parameters(recurse=False):
                    if param.ndim == 3 and getattr(held, "num_experts", None) == param.shape[0]:
                        self._stacks |= dict.fromkeys([id(param)], next(iter(self._regions.names(param)), ""))
                    for name in self._regions.names(param):
                        self._owners.setdefault(name, set()).add(id(module))
        self.beside.look_at(model, self._regions.names)
        entered = register_module_forward_pre_hook(lambda module, args: self._running.append(module))
        left = register_module_forward_hook(lambda module, args, result: self._leave(module), always_call=True)
        try:
            yield
        finally:
            entered.remove()
            left.remove()

    def before(self, func: Any, args: Any, kwargs: Any) -> None:
        """A function is about to be called."""
        self._versions = [
            (t, t._version) for t in tensors_of((args, kwargs)) if t in self._regions and not t.is_inference()
        ]

    def after(self, func: Any, args: Any, kwargs: Any, result: Any, multiplied: set[str]) -> None:
        """A function was called; `multiplied` are the parameters that it was a product with."""
        if func in _FACTS:
            return
        if self._running:
            self.beside.called(self._running[-1], func, args, kwargs, list(tensors_of([result])), multiplied)
        name = getattr(func, "__name__", str(func))
        getter = name == "__get__"
        touched = [t for t in tensors_of((args, kwargs)) if t in self._regions]
        if not touched or (getter and not isinstance(result, torch.Tensor)):
            return
        name = f".{func.__self__.__name__}" if name in ("__get__", "__set__") else name
        results = list(tensors_of([result]))
        keys = {storage_key(t) for t in touched}
        view = func is _T.__iter__ or (bool(results) and all(storage_key(t) in keys for t in results) and func != _DATA)
        view = view and all(t._version == version for t, version in self._versions)
        if func in COPIES and len(results) == 1:
            self._regions.copied(touched[0], results[0])
        for tensor in touched:
            one = func is _T.__getitem__ and results and results[0].ndim == 2
            if id(tensor) in self._stacks and not one and func not in _OF_STACKS:
                self._note(self._stacks[id(tensor)], name)
            for param in self._regions.names(tensor):
                if not self._owned(param):
                    self._note(param, name)
                elif not view and param not in multiplied:
                    self._note(param, f"operand of {name}" if func in PRODUCTS else name)

    def _note(self, param: str, what: str) -> None:
        path = self._paths.get(id(self._running[-1])) if self._running else None
        where = "" if path is None else f" in {path or 'the model'}"
        self.reasons.setdefault(param, what + where)

    def _owned(self, param: str) -> bool:
        """Whether the module that runs is one that holds the parameter (unknown counts as yes)."""
        if param not in self._owners or not self._running:
            return True
        return id(self._running[-1]) in self._owners[param]

    def _leave(self, module: nn.Module) -> None:
        while self._running and self._running.pop() is not module:
            pass  # modules left by an error


def _runs(module: nn.Module) -> bool:
    """Whether a module has a forward of its own (lists of parameters have none)."""
    return type(module).forward is not nn.Module.forward
