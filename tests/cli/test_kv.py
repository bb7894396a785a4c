"""`run --kv`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Cli, refused

Models = Callable[..., Path]


@pytest.mark.parametrize("kind", ["int8", "int4", "kivi2", "kivi4;0=full"])
def test_a_text_goes_on_with_rounded_keys_and_values(cli: Cli, models: Models, kind: str) -> None:
    model = models("llama", head_dim=32)
    found = cli("run", model, "Once upon a time", "--max-new-tokens", 5, "--kv", kind, "--json")
    assert (found.code, found.document["tokens"]) == (0, 5)


def test_what_does_not_go_is_said_in_one_sentence(cli: Cli, models: Models) -> None:
    llama = models("llama")
    refused(
        cli("run", llama, "Once", "--kv", "int7"), "Unknown kind of key/value cache 'int7'", "Did you mean", "kivi2"
    )
    refused(cli("run", llama, "Once", "--kv", "kivi2"), "heads that are a multiple of 32 wide", "Use int8")
    refused(cli("run", llama, "Once", "--kv", "int8-static"), "come from calibration")
    refused(cli("run", models("bert"), "Once", "--kv", "int8"), "does not generate text")
    refused(cli("run", llama, "Once", "--kv-bits", "4"), "--kv int8, int4 or kivi2")
