"""What torch's operators do to bases: `RULES`.

A rule gets the arguments of an operator and says in which bases its result is written. What has no rule fixes the bases of all that
it reads (`otherwise`). The rules are those of the operators below Python, of which there are few.
"""

from __future__ import annotations

from typing import Final

from arrondi.model import bases_numbers as numbers
from arrondi.model import bases_views as views
from arrondi.model.bases_follow import Rule

RULES: Final[dict[str, Rule]] = {
    **dict.fromkeys(["clone", "_to_copy", "detach", "alias", "contiguous", "lift_fresh", "lift", "positive", "dropout", "native_dropout", "zero_", "_conj"], views.same),
    **dict.fromkeys(["view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "flatten", "unflatten", "_reshape_alias"], views.view),
    "neg": views.negative, "convolution": numbers.convolution,
    "permute": views.permute, "transpose": views.transpose, "t": views.flip_axes, "numpy_T": views.flip_axes, "expand": views.expand, "repeat": views.repeat,
    "slice": views.cut_out, "select": views.select, "unbind": views.unbind, "cat": views.cat, "embedding": views.embedding,
    **dict.fromkeys(["split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "chunk", "unsafe_chunk"], views.split),
    "index": views.index, "index_select": views.index_select,
    **dict.fromkeys(["add", "add_", "sub", "sub_"], numbers.add), **dict.fromkeys(["mul", "mul_", "div", "div_"], numbers.multiply),
    "pow": numbers.power, "square": lambda follow, name, result, x: numbers.power(follow, name, result, x, 2),
    **dict.fromkeys(["mean", "sum"], numbers.mean), **dict.fromkeys(["linalg_vector_norm", "norm"], numbers.length),
    "native_layer_norm": numbers.layer_norm, **dict.fromkeys(["_fused_rms_norm", "rms_norm"], numbers.rms_norm),
    **dict.fromkeys(["mm", "bmm"], numbers.mm), **dict.fromkeys(["addmm", "baddbmm"], numbers.addmm), **dict.fromkeys(["mv", "dot"], numbers.mv),
    **dict.fromkeys(["zeros", "zeros_like", "new_zeros", "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"], views.zeros),
    **dict.fromkeys(["index_add", "index_add_"], numbers.index_add), "copy_": numbers.copy,
}  # fmt: skip
"""Name of an operator → its rule."""
