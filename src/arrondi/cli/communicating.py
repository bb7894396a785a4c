"""The command about messages between machines: `traffic`. Registered in `arrondi.cli.commands`."""

from __future__ import annotations

from typing import Annotated

import typer

from arrondi.cli import options as opt
from arrondi.cli.answers import answer
from arrondi.errors import SchemeError


def traffic(
    parameters: Annotated[str, typer.Option(help="Numbers of the model: 7B, 350M, 1000000.", show_default=False)],
    nodes: Annotated[int, typer.Option(help="Machines.", min=1, max=1 << 20)] = 1,
    per_node: Annotated[int, typer.Option(help="Ranks (GPUs) on each machine.", min=1, max=1 << 20)] = 8,
    element_bytes: Annotated[int, typer.Option(help="Bytes of a number that is not compressed.", min=1, max=8)] = 2,
    weight_bits: Annotated[int, typer.Option(help="Of weights that are gathered: 2, 4 or 8.")] = 8,
    gradient_bits: Annotated[int, typer.Option(help="Of gradients that are reduced: 2, 4 or 8.")] = 4,
    block: Annotated[int, typer.Option(help="Numbers under one scale.", min=1, max=1 << 20)] = 256,
    json_: opt.Json = False,
) -> None:
    """Print the bytes that one training step moves inside machines and between them: plain, and with every compressed scheme."""
    from arrondi.distributed.topology import Topology
    from arrondi.distributed.traffic import parse_count
    from arrondi.distributed.traffic import traffic as count_bytes

    for name, bits in (("--weight-bits", weight_bits), ("--gradient-bits", gradient_bits)):
        if bits not in (2, 4, 8):
            raise SchemeError(f"{name} is 2, 4 or 8, got {bits}.")
    count = parse_count(parameters)
    document = count_bytes(
        count,
        Topology(nodes, per_node),
        element_bytes=element_bytes,
        weight_bits=weight_bits,
        gradient_bits=gradient_bits,
        block=block,
    )
    from arrondi.report.traffic import print_traffic

    answer(document, json_, print_traffic)
