"""Which packages an interpreter has: prints their versions as JSON. Knows nothing of arrondi.

python probe.py DISTRIBUTION=MODULE …
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec


def version_of(distribution: str, module: str) -> str | None:
    if find_spec(module) is None:
        return None
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""


if __name__ == "__main__":
    pairs = [argument.split("=") for argument in sys.argv[1:]]
    print(json.dumps({distribution: version_of(distribution, module) for distribution, module in pairs}))
