"""`arrondi bench` on small shapes."""

from __future__ import annotations

import pytest

from tests.cli.conftest import Cli

SMALL = ("bench", "--shapes", "64x128", "--m", "1,3", "--schemes", "W4A16,w=int8,a=int8,hadamard")


def test_table(cli: Cli) -> None:
    result = cli(*SMALL)
    assert result.code == 0, result.err
    for word in ("GB/s", "float32", "bfloat16", "W4A16", "w=int8,a=int8", "hadamard", "64 × 128", "m = 3", "%"):
        assert word in result.out


def test_json_is_one_document_on_stdout(cli: Cli) -> None:
    document = cli(*SMALL, "--json").document
    assert {row["operator"] for row in document["rows"]} == {"W4A16", "w=int8,a=int8", "hadamard"}
    assert {row["m"] for row in document["rows"]} == {1, 3}
    assert document["machine"]["bandwidth_gb_s"] > 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--shapes", "4096"), "4096x4096"),
        (("--shapes", "64x0"), "positive"),
        (("--m", "1;2"), "--m takes"),
        (("--shapes", "64x64", "--schemes", "W4A15"), "W4A15"),
        (("--shapes", "64x92", "--m", "1", "--schemes", "hadamard"), "88 and 96"),
    ],
)
def test_bad_input(cli: Cli, options: tuple[str, ...], said: str) -> None:
    result = cli("bench", *options)
    assert result.code == 2
    assert said in result.err
    assert "Traceback" not in result.err
