"""Commands that open a model.

Owns: `opens`, which gives each of them `--allow-torch-load`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, Final

import typer

_OPTION: Final = inspect.Parameter(
    "allow_torch_load",
    inspect.Parameter.KEYWORD_ONLY,
    default=False,
    annotation=Annotated[
        bool,
        typer.Option(
            "--allow-torch-load",
            help="Read .bin and .pt weights, by PyTorch's loader that makes tensors and runs nothing.",
        ),
    ],
)


def opens(command: Callable[..., None]) -> Callable[..., None]:
    """The same command, whose models may be files of torch.save if the user says so."""
    signature = inspect.signature(command, eval_str=True)

    @functools.wraps(command)
    def wrapped(*args: Any, allow_torch_load: bool, **kwargs: Any) -> None:
        if not allow_torch_load:
            return command(*args, **kwargs)
        from arrondi.checkpoint.containers.torch_file import allow_torch_load as allowed

        with allowed():
            return command(*args, **kwargs)

    wrapped.__signature__ = signature.replace(parameters=[*signature.parameters.values(), _OPTION])  # type: ignore[attr-defined]
    return wrapped
