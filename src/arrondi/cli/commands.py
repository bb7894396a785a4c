"""The application: every command in the order of its help. Each is options in, one call of the library, a table or JSON out."""

from __future__ import annotations

from typing import Annotated

import typer

from arrondi.cli.adapting import adapt
from arrondi.cli.communicating import traffic
from arrondi.cli.converting import convert, diff
from arrondi.cli.measuring import bench, evaluate
from arrondi.cli.opening import opens
from arrondi.cli.quantizing import plan, quantize
from arrondi.cli.reading import dequantize, imatrix, inspect
from arrondi.cli.running import demo, run
from arrondi.cli.searching import compare, methods
from arrondi.cli.strict import Strict
from arrondi.cli.verifying import verify

app = typer.Typer(
    name="arrondi",
    help="Quantize a trained neural network, measure what it cost, and run it in few bits.",
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["--help", "-h"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from arrondi import __version__

        typer.echo(f"arrondi {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...


app.command(cls=Strict)(opens(plan))
app.command(cls=Strict)(opens(quantize))
app.command(cls=Strict)(opens(compare))
app.command(cls=Strict)(methods)
app.command("eval", cls=Strict)(opens(evaluate))
app.command(cls=Strict)(opens(inspect))
app.command(cls=Strict)(opens(dequantize))
app.command(cls=Strict)(opens(convert))
app.command(cls=Strict)(opens(diff))
app.command(cls=Strict)(opens(verify))
app.command(cls=Strict)(opens(imatrix))
app.command(cls=Strict)(opens(run))
app.command(cls=Strict)(demo)
app.command(cls=Strict)(bench)
app.add_typer(adapt)
app.command(cls=Strict)(traffic)
