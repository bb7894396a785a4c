"""AIMET on a network, for benchmarks/vision.py. Run by a Python that has aimet-onnx.

    python aimet_networks.py FLOAT.onnx OUT.onnx CALIBRATION.npz SCHEME

What its documentation advises: ranges of weights and activations by its default scheme ("min_max" is minimum and maximum), and AdaRound for weights
of at most four bits. Weights by output channel as its default configuration says. Values that flow in floating point are 16-bit codes.
"""

import json
import re
import sys
import time

import aimet_onnx
import numpy as np
import onnx
from aimet_onnx.quantsim import QuantizationSimModel

BATCH = 32
ITERATIONS = 2_000  # its own default, 10,000, takes an hour on two cores for these networks
SCHEME = re.compile(r"W(\d)A(\d)|w=int(\d)/channel(?:,a=int(\d)/token)?")


def main() -> None:
    source, out, calibration, scheme = sys.argv[1:]
    found = SCHEME.fullmatch(scheme)
    weights, flowing = ((found[1] or found[3]), (found[2] or found[4] or "16")) if found else ("", "")
    types = {"2": aimet_onnx.int2, "4": aimet_onnx.int4, "8": aimet_onnx.int8, "16": aimet_onnx.int16}
    if weights not in types or flowing not in types:
        raise SystemExit(f"AIMET has no {scheme}")
    model = onnx.load(source)
    name = model.graph.input[0].name
    inputs = np.load(calibration)["inputs"]
    batches = [{name: inputs[i : i + BATCH]} for i in range(0, len(inputs), BATCH)]
    began = time.process_time()
    sim = QuantizationSimModel(model, param_type=types[weights], activation_type=types[flowing])
    if int(weights) <= 4:
        aimet_onnx.apply_adaround(sim, batches, ITERATIONS)
    sim.compute_encodings(batches)
    onnx.save(sim.to_onnx_qdq(), out)
    print(json.dumps({"seconds": time.process_time() - began}))


if __name__ == "__main__":
    main()
