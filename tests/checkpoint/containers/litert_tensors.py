"""What LiteRT's interpreter says of the tensors of a file. A script for an environment with ai-edge-litert; knows nothing of arrondi.

    python litert_tensors.py MODEL.tflite RESULT.npz

Of each constant: `NAME` its numbers (narrow codes one a byte), `NAME|scale`, `NAME|zero` and `NAME|axis`.
"""

from __future__ import annotations

import sys

import numpy as np
from ai_edge_litert.interpreter import Interpreter


def main() -> None:
    interpreter = Interpreter(model_path=sys.argv[1])
    found = {}
    for detail in interpreter.get_tensor_details():
        grid = detail["quantization_parameters"]
        name = detail["name"].replace("/", "\\")
        found[f"{name}|scale"], found[f"{name}|zero"] = grid["scales"], grid["zero_points"]
        found[f"{name}|axis"] = np.array(grid["quantized_dimension"])
        found[f"{name}|shape"] = np.array(detail["shape"])
    np.savez(sys.argv[2], **found)


if __name__ == "__main__":
    main()
