"""What a model gives by our own dequantization, and what it gives if a consumer rounds on the way: `predict`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from arrondi.checkpoint import Placed
from arrondi.model import OnDisk
from arrondi.nn import QEmbedding
from arrondi.runtime.load import load
from arrondi.verification.prompt import Prompt
from arrondi.verification.roundings import Rounding

Rounds = Callable[["Stored"], Rounding]

_WANTED: Final = ("logits", "last_hidden_state")
"""Of what a model gives, the first that is there is compared."""
_LINEAR: Final = torch.nn.functional.linear
_PRODUCTS: Final[Mapping[Any, tuple[int, int]]] = {
    _LINEAR: (0, 1), torch.matmul: (0, 1), torch.Tensor.matmul: (0, 1), torch.Tensor.__matmul__: (0, 1), torch.bmm: (0, 1),
    torch.addmm: (1, 2),
}  # fmt: skip
"""Function → which of its arguments is the input, and which the weight."""


class Stored(NamedTuple):
    """How a file holds a weight.

    Attributes:
        dtype: element type as its container calls it; of a GGUF file the type of its blocks.
        placed: the quantized layer, None where it is ordinary numbers.
    """

    dtype: str
    placed: Placed | None


class Predicted(NamedTuple):
    """What a consumer should give.

    Attributes:
        exact: outputs by name, as the files mean them.
        likely: the same with what the consumer rounds, as far as that can be computed.
        moved: the same rounded in another way of the same kind: from `exact` to it is what such rounding costs this model.
    """

    exact: dict[str, np.ndarray]
    likely: dict[str, np.ndarray]
    moved: dict[str, np.ndarray]


@torch.no_grad()
def predict(source: OnDisk, prompt: Prompt, several: Mapping[str, Rounds]) -> dict[str, Predicted]:
    """What every consumer should give.

    Args:
        source: the model.
        prompt: what it is asked.
        several: consumer → how it rounds the inputs and outputs of the products with a weight.

    Returns:
        for each consumer what the files mean, and the same with what it rounds.
    """
    model = load(source.where, fuse=False)
    exact = _outputs(model, prompt)
    rounded = {name: _rounded(model, source, prompt, rounds) or exact for name, rounds in several.items()}
    return {name: Predicted(exact, outputs, outputs) for name, outputs in rounded.items()}


def _outputs(model: Any, prompt: Prompt) -> dict[str, np.ndarray]:
    given = model(**prompt.tensors)
    name = next((n for n in _WANTED if n in given), next(iter(given)))
    return {name: given[name].float().numpy()}


def _rounded(model: Any, source: OnDisk, prompt: Prompt, rounds: Rounds) -> dict[str, np.ndarray] | None:
    """The same run, with every product rounded as it is stored; None where none is."""
    layers: dict[str, Rounding] = {}
    stacks: dict[int, Rounding] = {}
    for site in source.sites:
        if site.kind == "embedding" and len(site.modules) == 1:
            continue
        entry = source.checkpoint.folder.entries.get(site.tensor)
        placed = source.checkpoint.placed.get(site.tensor)
        how = rounds(Stored("" if entry is None else entry.dtype, placed))
        if site.param_index is not None:
            stacks[site.matrix_shape[1]] = how
        layers |= {path: layers.get(path, how) for path in site.modules}
    if not any(how.inputs or how.outputs for how in (*layers.values(), *stacks.values())):
        return None
    with _Products(stacks) as products:
        for path, module in model.named_modules():
            if path in layers and not isinstance(module, torch.nn.Embedding | QEmbedding):
                products.put(module, layers[path])
        try:
            return _outputs(model, prompt)
        finally:
            products.take_away()


class _Products(TorchFunctionMode):
    """Rounds at modules that multiply, and at the products with matrices of fused experts, which are no modules.

    Args:
        stacks: width of an expert's matrix → how its products round.
    """

    def __init__(self, stacks: Mapping[int, Rounding]) -> None:
        super().__init__()
        self._stacks, self._inside, self._handles = stacks, 0, list[Any]()

    def put(self, module: torch.nn.Module, how: Rounding) -> None:
        """Round at a module."""

        def before(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            self._inside += 1
            return args if how.inputs is None else (how.inputs(args[0]), *args[1:])

        def after(module: torch.nn.Module, args: tuple[Any, ...], given: torch.Tensor) -> torch.Tensor:
            self._inside -= 1
            return given if how.outputs is None else how.outputs(given)

        self._handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]

    def take_away(self) -> None:
        """Leave every module as it was."""
        for handle in self._handles:
            handle.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._stacks and not self._inside and func in _PRODUCTS and len(args) > max(_PRODUCTS[func]):
            x, weight = (args[i] for i in _PRODUCTS[func])
            how = self._stacks.get(weight.shape[-1 if func is _LINEAR else -2]) if _expert(x, weight) else None
            if how is not None and how.inputs is not None:
                args = tuple(how.inputs(a) if i == _PRODUCTS[func][0] else a for i, a in enumerate(args))
            given = func(*args, **kwargs)
            return given if how is None or how.outputs is None else how.outputs(given)
        return func(*args, **kwargs)


def _expert(x: Any, weight: Any) -> bool:
    """Whether it looks like tokens by one expert's matrix, or by those of all; products of attention have four axes."""
    return isinstance(x, torch.Tensor) and isinstance(weight, torch.Tensor) and x.ndim == weight.ndim and x.ndim < 4
