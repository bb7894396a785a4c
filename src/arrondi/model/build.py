"""The transformers model of a config, its parameters empty: `build_model`.

Parameters lie on the meta device and take no memory; computed buffers are real. Caches are off in the config and in every
config inside it, and experts are called one by one, so that every product can be seen.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from arrondi.checkpoint.containers.config import QUANTIZATION
from arrondi.errors import FileFormatError


class _EmptyOnMeta(TorchFunctionMode):
    """While a model is built, `torch.empty` (parameters) allocates nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def build_model(config: dict[str, Any], folder: object, dtype: torch.dtype = torch.float32) -> Any:
    """The transformers model of a config.json, in eval mode, its parameters on the meta device.

    Args:
        config: config.json as a dictionary; a `quantization_config` in it is ignored.
        folder: for messages.

    Raises:
        FileFormatError: transformers does not know the architecture, or it needs code from the checkpoint.
    """
    import transformers

    import arrondi.model.bi_attention  # noqa: F401 (a config may name it)

    plain = {k: v for k, v in config.items() if k not in QUANTIZATION}
    names = plain.get("architectures") or []
    kind = plain.get("model_type")
    if not isinstance(kind, str) and str(folder).endswith(".onnx"):
        raise FileFormatError(
            f"{folder}: no config.json with a model_type lies beside it, so nothing says which model of transformers it is. Put that model's config.json "
            "and tokenizer there, or give the file as a network, with --data instead of a text."
        )
    if not isinstance(kind, str):
        raise FileFormatError(
            f"{folder}: config.json has no model_type. Only models of transformers are read: give a directory that save_pretrained wrote."
        )
    if plain.get("auto_map") and kind not in transformers.CONFIG_MAPPING:
        raise FileFormatError(
            f"{folder}: this model needs code that comes with it, which is not run here. Use a model that transformers itself knows."
        )
    if kind not in transformers.CONFIG_MAPPING:
        raise FileFormatError(
            f"{folder}: transformers {transformers.__version__} does not know model_type {kind!r}. Update transformers, or check config.json."
        )
    try:
        parsed = transformers.CONFIG_MAPPING[kind](**plain)
        found = [getattr(transformers, n, None) for n in names]
        cls = next((c for c in found if c is not None), None)
        if cls is None:
            cls = transformers.MODEL_MAPPING[type(parsed)]
        own = getattr(cls, "config_class", None)
        if own is not None and not isinstance(parsed, own) and isinstance(parsed.get_text_config(), own):
            parsed = parsed.get_text_config()  # the language model of a larger one, stored with the config of the whole
        for part in configs_in(parsed):
            part.use_cache = False
            part._experts_implementation = "eager"
        with _quiet_transformers(), torch.random.fork_rng(devices=[]), _EmptyOnMeta(), _default_dtype(dtype):
            model = cls._from_config(parsed, dtype=dtype)
    except Exception as error:  # whatever a class of transformers raises, it is the config that is wrong
        raise FileFormatError(
            f"{folder}: config.json does not give a {names or kind} model: {type(error).__name__}: {error}"
        ) from error
    _empty_parameters(model)
    return model.eval()


def starts_without(model: Any, modules: Iterable[str]) -> bool:
    """Whether a model of transformers gets through its own initialisation while these modules have no `weight`.

    Args:
        model: on the meta device; it is changed.
    """
    for module in {m for n, m in model.named_modules() if n in set(modules)}:
        module._parameters.pop("weight", None)
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            _initialise(model, model)
    except AttributeError:
        return False
    return True


def _initialise(module: Any, model: Any) -> None:
    """What transformers does to the weights that a file lacks: every module is initialised by the innermost model around it."""
    from transformers import PreTrainedModel

    for child in module.children():
        _initialise(child, child if isinstance(child, PreTrainedModel) else model)
    model._init_weights(module)


def computed_parameter(model: Any, param: str) -> torch.Tensor | None:
    """A parameter that no file holds because the class computes it (tables of sines); None where it would be random.

    Args:
        model: of transformers, its parameters on the meta device; it is not changed.
    """
    path, _, leaf = param.rpartition(".")
    drawn = []
    for seed in range(2):
        module = copy.deepcopy(model.get_submodule(path))
        for name, value in module._parameters.items():
            if value is not None:
                module._parameters[name] = torch.nn.Parameter(torch.zeros(value.shape), requires_grad=False)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            _innermost(model, path)._init_weights(module)
        drawn.append(module._parameters[leaf])
    first, second = drawn
    return None if first is None or second is None or not torch.equal(first, second) else first.detach()


def _innermost(model: Any, path: str) -> Any:
    """The innermost model of transformers around a module."""
    from transformers import PreTrainedModel

    parts = path.split(".")
    around = [model.get_submodule(".".join(parts[:n])) for n in range(len(parts))]
    return next(m for m in reversed(around) if isinstance(m, PreTrainedModel))


def configs_in(config: Any) -> list[Any]:
    """A config of transformers and every config inside it."""
    from transformers import PreTrainedConfig

    inside = [v for v in vars(config).values() if isinstance(v, PreTrainedConfig)]
    return [config, *(c for part in inside for c in configs_in(part))]


def _empty_parameters(model: torch.nn.Module) -> None:
    """Put the parameters that were made with values (norms, zero biases) on the meta device too; ties stay ties."""
    made: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None and parameter.device.type != "meta":
                made.setdefault(id(parameter), torch.nn.Parameter(parameter.detach().to("meta"), requires_grad=False))
                module._parameters[leaf] = made[id(parameter)]


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    old = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(old)


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
