"""The commands that continue a text: `run` and `demo`. Registered in `arrondi.cli.commands`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from arrondi.cli import options as opt
from arrondi.cli.answers import answer, print_json, useless
from arrondi.errors import SchemeError


def run(
    context: typer.Context,
    model: opt.Model,
    prompt: Annotated[str, typer.Argument(help="Text to continue.", show_default=False)],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.", min=1)] = 60,
    temperature: Annotated[float, typer.Option(help="0: the likeliest token every time.", min=0.0)] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed when temperature is above 0.", min=0, max=2**63 - 1)] = 0,
    dtype: Annotated[str, typer.Option(help="Type of activations: float32, bfloat16, float16, or auto.")] = "auto",
    activations: opt.Activations = None,
    kv: opt.KV = None,
    device: opt.Device = "cpu",
    json_: opt.Json = False,
) -> None:
    """Continue a prompt on this machine, printing as it goes."""
    if not temperature < float("inf"):
        raise SchemeError(f"--temperature takes a number such as 0.8, got {temperature}.")
    if temperature == 0:
        useless(context, "--temperature above 0", "seed")
    from arrondi.runtime.generate import generate

    result = generate(
        model,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        dtype=dtype,
        activations=activations,
        kv=kv,
        device=device,
        stream=None if json_ else sys.stdout,
    )
    if json_:
        print_json(result)


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory for the results.")] = Path("arrondi-demo"),
    json_: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Quantize the sample model that ships with arrondi, compare methods, write the files and generate a few words."""
    from arrondi.pipeline.demo import run_demo
    from arrondi.report import print_demo, progress_bar

    with progress_bar("demo", quiet) as progress:
        result = run_demo(output, progress)
    answer(result, json_, print_demo)
