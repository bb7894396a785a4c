"""Logits of a GGUF file by llama.cpp. Knows nothing of arrondi.

    python ask_llama_cpp.py REQUEST.json

Run on the CPU, keys and values in float32. Weights are multiplied as they lie: forms that llama.cpp repacks for some CPUs fail on others.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp import llama_cpp as library


def plain_params(made: Any = library.llama_model_default_params) -> Any:
    params = made()
    if hasattr(params, "use_extra_bufts"):
        params.use_extra_bufts = False
    return params


def main(path: str) -> None:
    with open(path, encoding="utf-8") as file:
        request = json.load(file)
    library.llama_model_default_params = plain_params
    ids = np.load(request["inputs"])["input_ids"]
    options = {"n_gpu_layers": 0, "op_offload": False, "type_k": 0, "type_v": 0, "flash_attn": False}
    model = llama_cpp.Llama(request["file"], n_ctx=ids.shape[1] + 8, logits_all=True, verbose=False, **options)
    found = []
    for row in ids:
        model.reset()
        model.eval(row.tolist())
        found.append(np.array(model.scores[: len(row)]))
    np.savez(request["out"], logits=np.stack(found))
    about = {}
    if request["text"]:
        about["tokens"] = list(model.tokenize(request["text"].encode(), add_bos=True, special=False))
    with open(request["about"], "w", encoding="utf-8") as file:
        json.dump(about, file)


if __name__ == "__main__":
    main(sys.argv[1])
