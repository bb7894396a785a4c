"""torchao's PT2E quantization on a network, for benchmarks/vision.py. Run by a Python that has torch and torchao.

    python pt2e_networks.py FLOAT.pt2 OUT.npz CALIBRATION.npz TEST.npz SCHEME

Inductor's quantizer for x86 with its defaults: weights int8 by output channel, activations uint8, ranges by histogram. Its result is no
ONNX file, so what the test samples give is written instead.
"""

import json
import sys
import time

import numpy as np
import torch
from torchao.quantization.pt2e import move_exported_model_to_eval
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

BATCH = 32


def main() -> None:
    source, out, calibration, test, scheme = sys.argv[1:]
    if scheme != "W8A8":
        raise SystemExit(f"torchao's PT2E has no static {scheme}")
    torch.set_num_threads(1)
    inputs, tested = (torch.from_numpy(np.load(path)["inputs"]) for path in (calibration, test))
    began = time.process_time()
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    with torch.no_grad():
        model = prepare_pt2e(torch.export.load(source).module(), quantizer)
        for part in inputs.split(BATCH):
            model(part)
        model = convert_pt2e(model)
        seconds = time.process_time() - began
        move_exported_model_to_eval(model)
        outputs = torch.cat([model(part) for part in tested.split(BATCH)])
    np.savez(out, outputs=outputs.numpy())
    print(json.dumps({"seconds": seconds}))


if __name__ == "__main__":
    main()
