"""`damaged(file)`: consumers see another file than the one that is verified."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from arrondi.verification import verify


@pytest.fixture
def sees(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """From now on consumers open this file."""
    honest = verify.ask

    def other(path: Path) -> None:
        def asks(interpreter: Any, script: str, request: dict[str, Any], *more: Any) -> Any:
            place = {"file": str(path), "folder": str(path.parent if path.is_file() else path)}
            named = {"gguf": path.name} if request.get("gguf") else {}
            return honest(interpreter, script, {**request, **place, **named}, *more)

        monkeypatch.setattr(verify, "ask", asks)

    return other
