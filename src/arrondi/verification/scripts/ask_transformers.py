"""Outputs of a model directory or a GGUF file by transformers. Knows nothing of arrondi.

python ask_transformers.py REQUEST.json
"""

from __future__ import annotations

import json
import sys

import numpy as np
import torch
import transformers


def main(path: str) -> None:
    with open(path, encoding="utf-8") as file:
        request = json.load(file)
    folder, gguf = request["file"], {}
    if request["gguf"]:
        folder, gguf = request["folder"], {"gguf_file": request["gguf"]}
    kind = getattr(transformers, request["class"])
    model = kind.from_pretrained(folder, dtype=getattr(torch, request["dtype"]), local_files_only=True, **gguf).eval()
    inputs = {name: torch.from_numpy(value) for name, value in np.load(request["inputs"]).items()}
    with torch.no_grad():
        given = model(**{n: v.to(model.dtype) if v.is_floating_point() else v for n, v in inputs.items()})
    np.savez(request["out"], **{request["wanted"]: given[request["wanted"]].float().numpy()})
    with open(request["about"], "w", encoding="utf-8") as file:
        json.dump({}, file)


if __name__ == "__main__":
    main(sys.argv[1])
