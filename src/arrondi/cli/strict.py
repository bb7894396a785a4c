"""Commands that take no option twice and no option without a value.

Owns: `Strict`, the class of every command. The framework keeps the last of two values in silence, and takes an empty word for the
current directory.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, Final

from typer.core import TyperCommand

from arrondi.errors import SchemeError

_MAY_BE_EMPTY: Final = ("ignore",)
"""Options to which an empty word says something."""


class Strict(TyperCommand):
    """A command whose every option is given once, with a value."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As the framework parses them.

        Raises:
            SchemeError: an option stands there twice, or with an empty word.
        """
        values, _, order = self.make_parser(ctx).parse_args(args=list(args))
        times = Counter(param.name for param in order)
        for param in order:
            option = max(param.opts, key=len)
            if param.param_type_name != "option" or getattr(param, "is_flag", False):
                continue
            if times[param.name] > 1 and not param.multiple:
                raise SchemeError(f"{option} is there {_times(times[param.name])}. Leave all but one out.")
            value = values.get(param.name)
            if param.name not in _MAY_BE_EMPTY and "" in (value if isinstance(value, list) else [value]):
                raise SchemeError(f"{option} needs a value, got an empty word. See {ctx.command_path} --help.")
        return super().parse_args(ctx, args)


def _times(count: int) -> str:
    return "twice" if count == 2 else f"{count} times"
