"""What waits for the backward pass in few bits: `compress_saved_activations`.

The forward pass is exact. What autograd would keep of it is kept as codes with a step and a lowest number for every 256 features of a sample,
rounded stochastically, so that gradients of weights are right on average; gradients of inputs do not read activations of linear
layers and stay exact. Works around any model and loop, on PyTorch's own hooks for saved tensors.

Source: Chen et al. 2021, arXiv:2104.14129 (ActNN).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from arrondi.errors import DataError, SchemeError
from arrondi.tensor.blocks import Bits, BlockCodec
from arrondi.tensor.packing import pack, unpack
from arrondi.training.saved_exactly import exactly

_LEAST_BYTES: Final = 1024
_PASSED_ON: Final = (
    "ToCopyBackward0",
    "TBackward0",
    "TransposeBackward0",
    "ViewBackward0",
    "PermuteBackward0",
    "UnsqueezeBackward0",
)
"""Nodes through which a weight reaches a product as it is, perhaps in another type."""
_ROOM: Final = 4096
"""Storages that are known before those that are gone are looked for."""

_PRODUCTS: Final = (torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__)
_PLAIN: Final = (torch.Tensor, nn.Parameter)
_INPLACE: Final = (torch.relu_, torch.Tensor.relu_, nn.functional.relu_)
_RELUS: Final = (torch.relu, torch.Tensor.relu, nn.functional.relu, *_INPLACE)


class _Kept:
    """One saved tensor, in codes or as it is. Everybody who saved it holds this."""

    def __init__(self, rows: tuple[int, int], dtype: torch.dtype) -> None:
        self.rows, self.dtype = rows, dtype
        self.message: torch.Tensor | None = None
        self.codec: BlockCodec | None = None
        self.whole: _Whole | None = None

    def values(self) -> torch.Tensor:
        """In the order of memory."""
        if self.whole is not None:
            return self.whole.decoded()
        assert self.codec is not None and self.message is not None
        return self.codec.decode(self.message, self.rows[1], self.dtype)


class _Whole:
    """A tensor as it is, with PyTorch's own check that nothing changed it in place, which hooks on saved tensors switch off.

    It holds no graph: a result that holds what made it, which holds the result, would never be freed unless somebody goes back.
    """

    def __init__(self, x: torch.Tensor) -> None:
        self.x, self.version = x.detach(), x._version

    def decoded(self) -> torch.Tensor:
        if self.x._version != self.version:
            raise DataError(
                f"A tensor of shape {tuple(self.x.shape)} that waits for the backward pass was changed in place. Go backward first, or change a copy."
            )
        return self.x


@dataclass(frozen=True)
class _Handle:
    """What autograd holds instead of a tensor."""

    kept: _Kept
    shape: torch.Size
    stride: tuple[int, ...] | None
    """None: in the order of its memory. Compiled graphs rely on it."""

    def decoded(self) -> torch.Tensor:
        whole = self.kept.whole
        if whole is not None and whole.x.shape == self.shape and whole.x.stride() == self.stride:
            return whole.decoded()
        values = self.kept.values().reshape(self.shape)
        if self.stride is None:
            return values
        return torch.empty_strided(self.shape, self.stride, dtype=values.dtype, device=values.device).copy_(values)


class compress_saved_activations(TorchFunctionMode):
    """While this lasts, floating-point tensors that autograd saves take `bits` bits each.

    Args:
        bits: 2, 4 or 8; or of each tensor its own, in the order in which they are saved since the context was entered, as
            `bits_by_sensitivity` gives them: 32 keeps one as it is, and tensors after the end of the list take its last bits.
        group: features of a sample under one step; a sample is one place of the first axis.
        generator: of the stochastic rounding, on the device of the activations; None: one seeded with 0, for each device its own.
        model: whose frozen parameters are not taken for activations where autocast casts them; nothing else is read of it.

    Attributes:
        sizes: numbers of each tensor that was encoded; one that several products save is there once.
        plain_bytes, kept_bytes: of what was saved of floating-point activations, and of what it became; what is too small (1 KiB) to be encoded is in
            both, parameters are in neither.

    Left as they are: parameters, integers, masks, tensors below 1 KiB, one number a token and statistics of norms, constants that
    activations are multiplied by, and what a gradient takes the exponential of, divides by or looks for (logarithms of probabilities; queries, keys and
    values of attention; denominators; largest values). ReLU keeps one bit an element. A block with NaN or infinity reads
    back as NaN, so that gradients say it. Compiled graphs do not say for which function they save: ReLU, constants and exponentials are
    nothing special in them. Of a checkpointed part only the input is
    saved, and the part is computed again from what that reads back as. Gradients of
    gradients are those of the decoded values.

    >>> layer = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 4))
    >>> with compress_saved_activations(bits=2) as saved:
    ...     loss = layer(torch.randn(64, 256)).square().mean()
    >>> loss.backward()
    >>> saved.plain_bytes, saved.kept_bytes
    (197632, 17220)

    Raises:
        SchemeError: bits are none of these.
        DataError: on the way back, something that was kept as it is was changed in place.
    """

    def __init__(
        self,
        bits: Bits | Sequence[Bits] = 2,
        *,
        group: int = 256,
        generator: torch.Generator | None = None,
        model: nn.Module | None = None,
    ) -> None:
        super().__init__()
        each = tuple(bits) if isinstance(bits, Sequence) else (bits,)
        for one in each or (bits,):
            if one not in (2, 4, 8) and (one != 32 or not isinstance(bits, Sequence)):
                raise SchemeError(f"Activations are kept in 2, 4 or 8 bits, got {one!r}.")
        self._codecs = [
            BlockCodec(one, group, symmetric=False, rounding="stochastic", side="bfloat16", propagate=True)
            for one in each
        ]
        self.sizes: list[int] = []
        self.plain_bytes = self.kept_bytes = 0
        self._generators = {} if generator is None else {generator.device: generator}
        self._shapes = set() if model is None else {frozenset(p.shape) for p in model.parameters()}
        self._alive: dict[tuple[Any, ...], weakref.ref[_Kept]] = {}
        self._counted: set[tuple[Any, ...]] = set()
        self._constants: set[int] = set()
        self._exact: Callable[[torch.Tensor], bool] | None = None
        self._first = 0
        self._room = _ROOM
        self._storages: dict[int, StorageWeakRef] = {}
        self._hooks: list[torch.autograd.graph.saved_tensors_hooks] = []

    @property
    def tensors(self) -> int:
        """How many were encoded so far."""
        return len(self.sizes)

    def __enter__(self) -> compress_saved_activations:
        hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)
        hooks.__enter__()
        self._first = self._first if self._hooks else len(self.sizes)
        self._hooks.append(hooks)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._hooks.pop().__exit__(*error)
        self._alive.clear()
        self._counted.clear()
        self._constants.clear()
        self._storages.clear()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """ReLU with one bit an element; everything else as it is."""
        if torch.compiler.is_compiling():
            return func(*args, **(kwargs or {}))
        x = args[0] if args and func in _RELUS else None
        recorded = isinstance(x, torch.Tensor) and type(x) in _PLAIN and x.requires_grad and torch.is_grad_enabled()
        if recorded and isinstance(x, torch.Tensor) and self._innermost():
            inplace = func in _INPLACE or bool(
                dict(zip(("inplace",), args[1:], strict=False), **(kwargs or {})).get("inplace")
            )
            y = _ReLU.apply(x, inplace)
            self._count(self._key(y), y.nbytes)  # PyTorch's own keeps its result, which the next product may keep too
            self.kept_bytes += -(-x.numel() // 8)
            return y
        if func in _PRODUCTS:
            self._constants |= {_storage(a) for a in args if isinstance(a, torch.Tensor) and not a.requires_grad}
        before, self._exact = self._exact, exactly(func, args, kwargs or {})
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self._exact = before

    def _innermost(self) -> bool:
        """Whether what is saved now comes here: inside a checkpointed part it does not, and the part is computed again without this."""
        top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignore: None)(True)
        return top is not None and top[0] == self._pack

    @torch.compiler.disable(reason="codes are made by compiled kernels that cannot be traced")
    def _pack(self, x: torch.Tensor) -> Any:
        if type(x) not in _PLAIN or not x.is_floating_point() or x.layout is not torch.strided:
            return x
        if self._is_parameter(x):
            return _Whole(x)
        key = self._key(x)
        constant = x.grad_fn is None and key[0] in self._constants
        exact = constant or x.shape[-1:] == (1,) or (self._exact is not None and self._exact(x))
        exact = exact or x.nbytes < _LEAST_BYTES or x.dtype.itemsize < 2
        known = self._alive.get(key)
        kept = None if known is None else known()
        if kept is None:
            new = self._count(key, x.nbytes)
            kept = _Kept(self._rows(x), x.dtype)
            self._alive[key] = weakref.ref(kept)
            if exact:
                kept.whole = _Whole(x)
                self.kept_bytes += x.nbytes if new else 0
            else:
                self._encode(x, kept)
        elif exact and kept.whole is None:  # who needs it as it is keeps it so for everybody
            assert kept.message is not None
            self.kept_bytes += x.nbytes - kept.message.nbytes
            kept.whole, kept.message = _Whole(x), None
        return _Handle(kept, x.shape, None if x.is_contiguous() or 0 in x.stride() else x.stride())

    def _count(self, key: tuple[Any, ...], nbytes: int) -> bool:
        """Add to what would have been kept, once for each tensor; whether it was new."""
        new = key not in self._counted
        self._counted.add(key)
        self.plain_bytes += nbytes if new else 0
        return new

    def _rows(self, x: torch.Tensor) -> tuple[int, int]:
        """A sample is a row, if it fills a group."""
        sample = x.numel() // max(x.shape[0], 1) if x.ndim > 1 else x.numel()
        return (x.shape[0], sample) if sample >= self._codecs[0].block and x.ndim > 1 else (1, x.numel())

    def _encode(self, x: torch.Tensor, kept: _Kept) -> None:
        with torch.no_grad():
            kept.codec = self._codecs[min(len(self.sizes) - self._first, len(self._codecs) - 1)]
            if x.device not in self._generators:
                self._generators[x.device] = torch.Generator(x.device).manual_seed(0)
            kept.message = kept.codec.encode(x.detach().reshape(kept.rows), self._generators[x.device])
        self.sizes.append(x.numel())
        self.kept_bytes += kept.message.nbytes

    def _key(self, x: torch.Tensor) -> tuple[Any, ...]:
        """Equal for tensors of the same numbers in the same order. A storage that is gone cannot be taken for a new one at its place:
        what is known of it is kept for as long."""
        reference = StorageWeakRef(x.untyped_storage())
        self._storages.setdefault(reference.cdata, reference)
        if len(self._storages) > self._room:
            self._forget()
        order = x.numel() if x.is_contiguous() else (tuple(x.shape), x.stride())
        return reference.cdata, x.storage_offset(), order, x.dtype, x._version

    def _forget(self) -> None:
        """Leave out what is known of storages that are gone, so that a whole training may stand under one context."""
        gone = {cdata for cdata, reference in self._storages.items() if reference.expired()}
        self._storages = {c: r for c, r in self._storages.items() if c not in gone}
        self._alive = {key: kept for key, kept in self._alive.items() if key[0] not in gone}
        self._counted = {key for key in self._counted if key[0] not in gone}
        self._constants -= gone
        self._room = max(_ROOM, 2 * len(self._storages))

    def _is_parameter(self, x: torch.Tensor) -> bool:
        base = x if x._base is None else x._base
        if isinstance(base, nn.Parameter) or (base.is_leaf and base.requires_grad):
            return True
        if frozenset(x.shape) in self._shapes and x.grad_fn is None:
            return True
        node = x.grad_fn
        while node is not None and node.name() in _PASSED_ON:
            node = node.next_functions[0][0]
        return node is not None and node.name() == "torch::autograd::AccumulateGrad" and x.grad_fn is not None


def _storage(x: torch.Tensor) -> int:
    return StorageWeakRef(x.untyped_storage()).cdata if x.layout is torch.strided else 0


@torch.compiler.disable(reason="codes are made by compiled kernels that cannot be traced")
def _unpack(saved: Any) -> torch.Tensor:
    return saved.decoded() if isinstance(saved, _Handle | _Whole) else saved


class _ReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, inplace: bool) -> torch.Tensor:
        ctx.shape = x.shape
        ctx.mask = pack((x > 0).view(torch.uint8).reshape(-1), 1)
        if inplace:
            ctx.mark_dirty(x)
            return x.clamp_min_(0)
        return x.clamp_min(0)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (grad,) = gradients
        mask = unpack(ctx.mask, 1, ctx.shape.numel()).view(ctx.shape)
        return grad * mask, None
