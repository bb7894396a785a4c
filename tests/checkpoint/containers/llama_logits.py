"""Logits of a GGUF file by llama.cpp; run by an interpreter that has llama-cpp-python.

    python llama_logits.py FILE OUT.npy TOKEN TOKEN …

Weights are multiplied as they lie: their repacked forms crash on some virtual machines.
"""

import sys

import llama_cpp
import numpy as np

default = llama_cpp.llama_cpp.llama_model_default_params


def params():
    made = default()
    made.use_extra_bufts = False
    return made


llama_cpp.llama_cpp.llama_model_default_params = params
ids = [int(token) for token in sys.argv[3:]]
model = llama_cpp.Llama(sys.argv[1], logits_all=True, n_ctx=64, verbose=False)
model.eval(ids)
np.save(sys.argv[2], np.array(model.scores[: len(ids)]))
