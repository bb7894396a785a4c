"""ONNX Runtime's static quantizer on a network, for benchmarks/vision.py. Run by a Python that has onnxruntime and onnx.

    python ort_networks.py FLOAT.onnx OUT.onnx CALIBRATION.npz SCHEME

Weights by output channel, activations int8, ranges by min-max: what its documentation advises for networks of convolutions.
"""

import json
import sys
import time

import numpy as np
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
    shape_inference,
)

TYPES = {"W8A8": QuantType.QInt8, "w=int4/channel,a=int8/token": QuantType.QInt4}
BATCH = 32


class Reader(CalibrationDataReader):
    def __init__(self, name: str, inputs: np.ndarray) -> None:
        self.batches = iter([{name: inputs[i : i + BATCH]} for i in range(0, len(inputs), BATCH)])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.batches, None)


def main() -> None:
    source, out, calibration, scheme = sys.argv[1:]
    if scheme not in TYPES:
        raise SystemExit(f"ONNX Runtime has no static {scheme}")
    import onnx

    name = onnx.load(source).graph.input[0].name
    inputs = np.load(calibration)["inputs"]
    began = time.process_time()
    prepared = f"{out}.prepared"
    shape_inference.quant_pre_process(source, prepared, skip_symbolic_shape=True)
    quantize_static(
        prepared, out, Reader(name, inputs), quant_format=QuantFormat.QDQ, per_channel=True, weight_type=TYPES[scheme],
        activation_type=QuantType.QInt8, calibrate_method=CalibrationMethod.MinMax,
    )  # fmt: skip
    print(json.dumps({"seconds": time.process_time() - began}))


if __name__ == "__main__":
    main()
