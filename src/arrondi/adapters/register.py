"""peft learns of packed layers: `when_imported`, and the five places of peft where they are told.

peft asks a table in each `LoraConfig` for layers that it does not know (`_register_custom_module`), takes "all-linear" by class,
copies `modules_to_save` to train them, and saves and loads an adapter without what it was trained on. All five are functions that get one of ours around them when peft is imported: nobody who
does not use adapters pays for an import.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, Final

_NAME: Final = "peft"
_DONE: Final = "_arrondi_layers"


def when_imported() -> None:
    """Let peft take packed layers, now if it is imported, else as soon as it is."""
    if _NAME in sys.modules:
        _register(sys.modules[_NAME])
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Stands in front of Python's own finders until peft was looked for."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """peft's own spec, whose loader also registers."""
        if fullname != _NAME:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(_NAME)
        if spec is None or spec.loader is None:
            sys.meta_path.insert(0, self)  # it may be installed later
            return spec
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            _register(module)

        vars(spec.loader)["exec_module"] = exec_module
        return spec


def _register(peft: Any) -> None:
    """Tell peft, once. What a peft without these places cannot be told is a warning, not the end of its import."""
    if getattr(peft, _DONE, False) or not hasattr(peft, "PeftModel"):
        return
    try:
        from peft.tuners import tuners_utils
        from peft.utils import ModulesToSaveWrapper

        from arrondi.adapters.layers import LAYERS, all_linear, refuse_copies
        from arrondi.adapters.origin import check_origin, note_origin

        def custom(config: Any, *args: Any, **kwargs: Any) -> None:
            config._register_custom_module(dict(LAYERS))

        def saved(model: Any, directory: Any, *args: Any, **kwargs: Any) -> None:
            note_origin(model, directory)

        def loads(model: Any, directory: Any, *args: Any, subfolder: Any = None, **kwargs: Any) -> None:
            check_origin(model, directory, subfolder)

        peft.LoraConfig.__post_init__ = _followed(peft.LoraConfig.__post_init__, custom)
        peft.PeftModel.save_pretrained = _followed(peft.PeftModel.save_pretrained, saved)
        peft.PeftModel.load_adapter = _preceded(peft.PeftModel.load_adapter, loads)
        ModulesToSaveWrapper.check_module = _followed(ModulesToSaveWrapper.check_module, refuse_copies)
        tuners_utils._maybe_include_all_linear_layers = all_linear(tuners_utils._maybe_include_all_linear_layers)
    except (ImportError, AttributeError) as error:
        warnings.warn(
            f"peft {getattr(peft, '__version__', '')} has changed and cannot be told of packed layers ({error}). Use peft 0.21.",
            stacklevel=2,
        )
        return
    setattr(peft, _DONE, True)


def _followed(function: Callable[..., Any], then: Callable[..., None]) -> Callable[..., Any]:
    """`function`, and then another one with the same arguments."""

    @functools.wraps(function)
    def both(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        then(*args, **kwargs)
        return result

    return both


def _preceded(function: Callable[..., Any], first: Callable[..., None]) -> Callable[..., Any]:
    """Another function with the same arguments, and then `function`."""

    @functools.wraps(function)
    def both(*args: Any, **kwargs: Any) -> Any:
        first(*args, **kwargs)
        return function(*args, **kwargs)

    return both
