"""The yardstick: textbook GPTQ and round-to-nearest on a Llama held in memory, measured by KL divergence.

Owns: a second, plain implementation to hold the library's own against; the protocol of the windows and of the mean KL
that the other benchmarks share.  Uses: torch and transformers, and on purpose nothing of the library.
Source: Frantar, Ashkboos, Hoefler and Alistarh, 2022, arXiv:2210.17323, algorithm 1.

Grid, for both methods: groups of 128 input columns with the largest magnitude a; step s = 2a/(2^b - 1), zero point
2^(b-1), codes 0 .. 2^b - 1 (at 4 bits a = 7.5 gives s = 1 and the values -8 .. 7). GPTQ: damping 0.01 of the mean
diagonal, the groups' steps taken from the uncompensated weights, columns visited by falling diagonal of H. A block's
linears are quantized in the order {q, k, v}, {o}, {gate, up}, {down}, each set on inputs that the sets before it,
already quantized, produce; the next block's inputs come from the quantized block. The head stays as it is.

Windows: the file encoded without special tokens, cut into pieces of 255 tokens, BOS in front of each: 256. Mean KL is
over all 256 positions of each window, KL(original || quantized) in nats.

    python benchmarks/yardstick.py MODEL --calibration TEXT --evaluation TEXT [--eval-skip N] [--bits 4 3 2]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

SETS: Final = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))

Quantizer = Callable[[Tensor, Tensor], Tensor]  # weight (out, in) and H (in, in) -> dequantized weight


# The method.


def column_steps(weight: Tensor, bits: int, group_size: int) -> Tensor:
    """(out, in) step of every weight's group, from the weights as they are; one where a group is all zero."""
    largest = torch.cat([g.abs().amax(1, keepdim=True).expand_as(g) for g in weight.split(group_size, dim=1)], dim=1)
    return torch.where(largest > 0, 2 * largest / (2**bits - 1), 1.0)


def to_grid(values: Tensor, step: Tensor, bits: int) -> Tensor:
    """The nearest grid value, ties to even; what lies outside goes to the end of the grid."""
    zero = 2 ** (bits - 1)
    return ((values / step).round().add(zero).clamp(0, 2**bits - 1) - zero) * step


def rtn(weight: Tensor, bits: int, group_size: int = 128) -> Tensor:
    """Round-to-nearest: every weight by itself."""
    return to_grid(weight, column_steps(weight, bits, group_size), bits)


def gptq(weight: Tensor, hessian: Tensor, bits: int, group_size: int = 128, damping: float = 0.01) -> Tensor:
    """One column after the other, the error of each pushed onto the columns still to come.

    With U the upper Cholesky factor of inv(H), the error e = (w - q) / U[c, c] of column c changes every column
    j > c by -e U[c, j].
    """
    weight, hessian = weight.clone(), hessian.clone()
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    weight[:, dead] = 0
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    step = column_steps(weight, bits, group_size)
    order = hessian.diagonal().argsort(descending=True, stable=True)
    weight, step, hessian = weight[:, order], step[:, order], hessian[order][:, order]
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    rounded = torch.empty_like(weight)
    for c in range(weight.shape[1]):
        rounded[:, c] = to_grid(weight[:, c], step[:, c], bits)
        error = (weight[:, c] - rounded[:, c]) / upper[c, c]
        weight[:, c + 1 :] -= error[:, None] * upper[c, c + 1 :]
    return rounded[:, order.argsort()]


# The model.


@torch.no_grad()
def quantize_model(model: nn.Module, windows: Tensor, quantizer: Quantizer) -> nn.Module:
    """A copy of a Llama with every linear of its blocks replaced, in the sequential order of the module docstring.

    Args:
        windows: (N, L) token ids to calibrate on.
        quantizer: called with the float64 weight and the float64 H = X^T X of its inputs.
    """
    model = deepcopy(model)
    first: dict[str, object] = {}

    def catch(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, object]) -> None:
        first.update(kwargs, hidden_states=args[0])

    with model.model.layers[0].register_forward_pre_hook(catch, with_kwargs=True):
        model.model(windows, use_cache=False)
    hidden, context = first.pop("hidden_states"), first
    for block in model.model.layers:
        linears = {name.split(".")[-1]: m for name, m in block.named_modules() if isinstance(m, nn.Linear)}
        for names in SETS:
            hessian = input_hessian(linears[names[0]], lambda block=block, hidden=hidden: block(hidden, **context))
            for name in names:
                weight = linears[name].weight
                weight.copy_(quantizer(weight.double(), hessian))
        hidden = block(hidden, **context)
    return model


def input_hessian(linear: nn.Linear, run: Callable[[], object]) -> Tensor:
    """X^T X over the inputs that `linear` sees during `run`, summed in float64."""
    total = torch.zeros(linear.in_features, linear.in_features, dtype=torch.float64)

    def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs = args[0].flatten(0, -2).double()
        total.addmm_(inputs.T, inputs)

    with linear.register_forward_pre_hook(add):
        run()
    return total


# The measure.


def token_windows(
    directory: Path, text: Path, count: int, *, length: int = 256, skip: int = 0, bos: bool = True
) -> Tensor:
    """(count, length) token ids of windows `skip` .. `skip + count - 1` of a text file.

    Raises:
        ValueError: the text is too short, or the tokenizer has no BOS token.
    """
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
    body = length - bos
    if len(ids) < (skip + count) * body:
        raise ValueError(f"{text} has {len(ids) // body} windows of {body} tokens, {skip} + {count} are needed.")
    windows = torch.tensor(ids[skip * body : (skip + count) * body]).view(count, body)
    if not bos:
        return windows
    if tokenizer.bos_token_id is None:
        raise ValueError(f"the tokenizer of {directory} has no BOS token. Use windows without one.")
    return torch.cat([torch.full((count, 1), tokenizer.bos_token_id), windows], dim=1)


@torch.no_grad()
def mean_kl(original: nn.Module, quantized: nn.Module, windows: Tensor) -> float:
    """Mean over all positions of KL(original || quantized), in nats: float32 log-probabilities, a float64 mean."""
    total = 0.0
    for window in windows.split(1):
        p, q = (m(window, use_cache=False).logits.float().log_softmax(-1) for m in (original, quantized))
        total += (p.exp() * (p - q)).sum(dtype=torch.float64).item()
    return total / windows.numel()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Textbook GPTQ and round-to-nearest, measured by mean KL.")
    parser.add_argument("model", type=Path, help="Llama checkpoint with its tokenizer")
    parser.add_argument("--calibration", type=Path, required=True, help="text file")
    parser.add_argument("--evaluation", type=Path, required=True, help="text file")
    parser.add_argument("--eval-skip", type=int, default=0, help="windows of the evaluation text to pass over")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--damping", type=float, default=0.01)
    parser.add_argument("--samples", type=int, default=32, help="calibration windows")
    parser.add_argument("--eval-samples", type=int, default=48, help="evaluation windows")
    parser.add_argument("--length", type=int, default=256, help="tokens in a window, BOS included")
    parser.add_argument("--no-bos", action="store_true", help="windows of text tokens only")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)

    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    form = {"length": options.length, "bos": not options.no_bos}
    calibration = token_windows(options.model, options.calibration, options.samples, **form)
    held = token_windows(options.model, options.evaluation, options.eval_samples, skip=options.eval_skip, **form)
    print(f"{'bits':>4}  {'method':<6}  {'mean KL / nats':>14}")
    for bits in options.bits:
        methods: dict[str, Quantizer] = {
            "rtn": lambda weight, hessian, b=bits: rtn(weight, b, options.group_size),
            "gptq": lambda weight, hessian, b=bits: gptq(weight, hessian, b, options.group_size, options.damping),
        }
        for name, quantizer in methods.items():
            quantized = quantize_model(model, calibration, quantizer)
            print(f"{bits:>4}  {name:<6}  {mean_kl(model, quantized, held):>14.5f}", flush=True)


if __name__ == "__main__":
    main()
