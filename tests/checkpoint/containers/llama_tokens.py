"""Numbers of tokens by llama.cpp; run by an interpreter that has llama-cpp-python.

    python llama_tokens.py FILE TEXTS.json OUT.json

Texts begin with the token that the file says they begin with; special tokens in them are those tokens.
"""

import json
import sys
from pathlib import Path

import llama_cpp

model = llama_cpp.Llama(sys.argv[1], vocab_only=True, verbose=False)
texts = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
found = [model.tokenize(text.encode(), add_bos=True, special=True) for text in texts]
Path(sys.argv[3]).write_text(json.dumps(found), encoding="utf-8")
