"""How threads wait for work.

Owns: `wait_passively`. It loads nothing, for it must come before PyTorch.
"""

from __future__ import annotations

import os
import sys


def wait_passively() -> None:
    """Let OpenMP's threads sleep while they wait for PyTorch's next operator, unless `OMP_WAIT_POLICY` says otherwise.

    They spin by default, on cores that the kernels or a neighbour need: measured on two cores with one busy neighbour, a
    prompt takes eight times as long. OpenMP reads this when torch is imported; after that the call changes nothing.
    """
    if "torch" not in sys.modules:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
