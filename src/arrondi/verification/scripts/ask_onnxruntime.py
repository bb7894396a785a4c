"""Outputs of an ONNX file by ONNX Runtime on the CPU. Knows nothing of arrondi.

python ask_onnxruntime.py REQUEST.json
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import onnxruntime


def main(path: str) -> None:
    with open(path, encoding="utf-8") as file:
        request = json.load(file)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Else products with weights of few bits round what they read to eight bits.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnxruntime.InferenceSession(request["file"], options, providers=["CPUExecutionProvider"])
    made = session.run(None, dict(np.load(request["inputs"]).items()))
    found: dict[str, Any] = {f"output_{i}": np.asarray(value) for i, value in enumerate(made)}
    np.savez(request["out"], **found)
    with open(request["about"], "w", encoding="utf-8") as file:
        json.dump({}, file)


if __name__ == "__main__":
    main(sys.argv[1])
