"""What `quantize` would make of a network of ONNX operators, without data: `plan_network`."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from arrondi.graph import Program, describe, held_bits, hold_codes, places, product_places, read_graph, tidy
from arrondi.graph.refuse import check_rounded
from arrondi.pipeline.flowing import flowing_scheme, which_values
from arrondi.pipeline.module import round_module
from arrondi.pipeline.network import of_weights, with_ends
from arrondi.pipeline.recipe import Recipe
from arrondi.pipeline.steps import STEPS


def plan_network(model: Any, recipe: Recipe, *, ends: int | None = 8, rounded: str | None = None) -> dict[str, Any]:
    """The layers, their schemes and what they take.

    Weights are rounded to nearest for it and put into a graph, so that what a file cannot hold is refused as `quantize` does, and bytes are
    counted and not estimated. Ranges of what flows are found on data, and no data is read here.

    Args:
        model, recipe: see `arrondi.pipeline.network.quantize_network`.
        ends, rounded: see `arrondi.pipeline.network.NetworkData`.

    Returns:
        `layers`: of each its name, shape, `status` (quantized, kept), scheme or `reason`, method, `bits_per_weight` and `bytes`; `bits_per_weight`,
        `bytes` and `float_bytes` of all of them; `activations`; how many values would be rounded on how many grids, and which operators stay in
        floating point; `needs_samples`; `notes`.

    Raises:
        ArrondiError: what `quantize` would say.
    """
    graph, notes = tidy(read_graph(model)), list[str]()
    check_rounded(graph)
    flowing = flowing_scheme(recipe)
    found = (product_places if which_values(graph, rounded, flowing) == "products" else places)(graph)
    program = Program(graph)
    recipe = with_ends(of_weights(recipe, program), graph, program, ends, notes)
    nearest = replace(recipe, rules=tuple(replace(r, method="rtn", options={}, fallback="") for r in recipe.rules if r.scheme is not None or STEPS[r.method].kind == "round"))  # fmt: skip
    before = {node: program.get_parameter(f"{path}.weight").shape for node, path in program.layers.items()}
    _, plan, values = round_module(program, nearest, keep_misfits=True, layout="arrondi")
    weights = {n: values[f"{p}.weight"].weight for n, p in program.layers.items() if f"{p}.weight" in values}
    hold_codes(graph, weights)  # which refuses what a file cannot hold
    planned = {t.name: t for t in plan.tensors}
    rows: list[dict[str, Any]] = []
    for node, path in program.layers.items():
        q, tensor, count = weights.get(node), planned.get(f"{path}.weight"), math.prod(before[node])
        bits = 32 * count if q is None else held_bits(q)
        rows.append({
            "layer": node, "shape": list(before[node]), "status": "kept" if q is None else "quantized", "scheme": None if q is None else str(q.scheme),
            "reason": "" if tensor is None or q is not None else tensor.reason, "bits_per_weight": bits / count, "bytes": math.ceil(bits / 8),
        })  # fmt: skip
    bits = sum(r["bits_per_weight"] * math.prod(r["shape"]) for r in rows)
    count = sum(math.prod(r["shape"]) for r in rows)
    static = flowing is not None and not flowing.dynamic
    return {
        "model": str(model), "layers": rows, "methods": list(dict.fromkeys(rule.method for rule in recipe.rules)), "bits_per_weight": bits / max(count, 1),
        "bytes": sum(r["bytes"] for r in rows), "float_bytes": 4 * count, "activations": None if flowing is None else str(flowing), **describe(found),
        "needs_samples": static or any(STEPS[rule.method].needs for rule in recipe.rules), "notes": notes,
    }  # fmt: skip
