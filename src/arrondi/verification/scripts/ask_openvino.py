"""Outputs of an ONNX file by OpenVINO on the CPU, in float32, inputs not rounded on the way. Knows nothing of arrondi.

python ask_openvino.py REQUEST.json
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import openvino


def main(path: str) -> None:
    with open(path, encoding="utf-8") as file:
        request = json.load(file)
    core = openvino.Core()
    hints = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    compiled = core.compile_model(core.read_model(request["file"]), "CPU", hints)
    made = compiled(dict(np.load(request["inputs"]).items()))
    found: dict[str, Any] = {f"output_{i}": np.asarray(made[output]) for i, output in enumerate(compiled.outputs)}
    np.savez(request["out"], **found)
    with open(request["about"], "w", encoding="utf-8") as file:
        json.dump({}, file)


if __name__ == "__main__":
    main(sys.argv[1])
