"""Networks as graphs of ONNX operators: read, run, rounded and written.

A graph is plain data (`ir`); files and PyTorch's exporter are read by `read`, written by `write`. `Program` is a graph as a module whose layers
are PyTorch's own, so the steps of the pipeline work on it; `rules` says which values are rounded.
"""

from arrondi.graph.compiled import Executor, executor
from arrondi.graph.dynamic import check_dynamic, integer_products, round_dynamically
from arrondi.graph.insert import held_bits, hold_biases, hold_codes, round_values
from arrondi.graph.integer import Lowered, lower
from arrondi.graph.ir import Graph, Node, Value
from arrondi.graph.observe import observe
from arrondi.graph.program import Part, Program, Use
from arrondi.graph.read import is_graph_file, read_graph
from arrondi.graph.rounder import Rounder
from arrondi.graph.rules import Places, describe, has_attention, places, product_places
from arrondi.graph.tidy import tidy
from arrondi.graph.write import to_onnx, write_graph

__all__ = [
    "Executor",
    "Graph",
    "Lowered",
    "Node",
    "Part",
    "Places",
    "Program",
    "Rounder",
    "Use",
    "Value",
    "check_dynamic",
    "describe",
    "executor",
    "has_attention",
    "held_bits",
    "hold_biases",
    "hold_codes",
    "integer_products",
    "is_graph_file",
    "lower",
    "observe",
    "places",
    "product_places",
    "read_graph",
    "round_dynamically",
    "round_values",
    "tidy",
    "to_onnx",
    "write_graph",
]
