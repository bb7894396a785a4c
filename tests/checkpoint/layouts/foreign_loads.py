"""What transformers makes of checkpoints. A script for an environment with the packages that it needs; knows nothing of arrondi.

    python foreign_loads.py LOGITS.safetensors DIR …

Loads each directory in float32 and keeps its logits on fixed ids, by the directory's name; NAME/plain are those with weights turned back.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

IDS = torch.randint(0, 2000, (2, 24), generator=torch.Generator().manual_seed(0))


def main(out: str, folders: list[str]) -> None:
    found = {}
    for folder in folders:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            found[Path(folder).name] = model(IDS).logits.float()
        # Loaded again: to run has packed its weights in another way.
        if '"bitsandbytes"' in (Path(folder) / "config.json").read_text():
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).dequantize().eval()
            with torch.no_grad():
                found[f"{Path(folder).name}/plain"] = model(IDS).logits.float()
    save_file(found, out)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
