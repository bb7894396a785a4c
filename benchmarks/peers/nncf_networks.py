"""NNCF's post-training quantization on a network, for benchmarks/vision.py. Run by a Python that has nncf and onnx.

    python nncf_networks.py FLOAT.onnx OUT.onnx CALIBRATION.npz SCHEME

Its own defaults for ONNX: weights by output channel, fast bias correction.
"""

import json
import sys
import time

import nncf
import numpy as np
import onnx


def main() -> None:
    source, out, calibration, scheme = sys.argv[1:]
    if scheme != "W8A8":
        raise SystemExit(f"NNCF has no static {scheme}")
    model = onnx.load(source)
    name = model.graph.input[0].name
    inputs = np.load(calibration)["inputs"]
    began = time.process_time()
    data = nncf.Dataset([inputs[i : i + 1] for i in range(len(inputs))], lambda x: {name: x})
    onnx.save(nncf.quantize(model, data, subset_size=len(inputs)), out)
    print(json.dumps({"seconds": time.process_time() - began}))


if __name__ == "__main__":
    main()
