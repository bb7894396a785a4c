"""Decoders of other tools' layouts, written down plainly from their descriptions, in NumPy and with nothing of the package.

`decoded(config, tensors)` gives every quantized weight (out, in) by its path; a file that makes no sense raises whatever it raises.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

Tensors = Mapping[str, torch.Tensor]


def decoded(config: Mapping[str, Any], tensors: Tensors) -> dict[str, np.ndarray]:
    """The plain weights of a checkpoint, float32."""
    said = config["quantization_config"]
    unnamed = "mlx" if {"group_size", "bits"} <= said.keys() else "bitsandbytes"
    return READERS[said.get("quant_method") or unnamed](said, tensors)


def bits_of(rows: np.ndarray, width: int, count: int) -> np.ndarray:
    """Codes of a little-endian bit stream in each row of int32 words: bit by bit."""
    stream = np.unpackbits(np.ascontiguousarray(rows).view(np.uint8), axis=-1, bitorder="little")
    codes = stream[:, : count * width].reshape(len(rows), count, width)
    return (codes * 2 ** np.arange(width)).sum(-1)


def gptq(said: Mapping[str, Any], tensors: Tensors) -> dict[str, np.ndarray]:
    found = {}
    for name in tensors:
        if not name.endswith(".qweight"):
            continue
        path = name.removesuffix(".qweight")
        own = dict(said)
        for pattern, change in (said.get("dynamic") or {}).items():
            if re.match(pattern[2:] if pattern[:2] in ("+:", "-:") else pattern, path):
                assert not pattern.startswith("-:")
                own |= change
                break
        bits = own["bits"]
        index, scales = tensors[f"{path}.g_idx"].numpy(), tensors[f"{path}.scales"].float().numpy()
        codes = bits_of(tensors[name].numpy().T, bits, len(index))
        packed = tensors[f"{path}.qzeros"].numpy()
        if said.get("checkpoint_format", said.get("format", "gptq")) == "gptq_v2":
            zeros = bits_of(packed, bits, scales.shape[1])
        elif bits == 3:
            zeros = (bits_of(packed, bits, scales.shape[1]) + 1) % 8
        else:
            one = sum(1 << (bits * i) for i in range(32 // bits))
            zeros = bits_of(((packed.astype(np.int64) + one) % 2**32).astype(np.uint32), bits, scales.shape[1])
        found[path] = (codes - zeros.T[:, index]).astype(np.float32) * scales.T[:, index]
    return found


def awq(said: Mapping[str, Any], tensors: Tensors) -> dict[str, np.ndarray]:
    found = {}
    for name in tensors:
        if not name.endswith(".qweight"):
            continue
        path = name.removesuffix(".qweight")
        scales = tensors[f"{path}.scales"].float().numpy()

        def nibbles(packed: np.ndarray) -> np.ndarray:
            out = np.zeros((packed.shape[0], packed.shape[1] * 8), dtype=np.int64)
            for place, column in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
                out[:, column::8] = (packed >> (4 * place)) & 15
            return out

        codes, zeros = nibbles(tensors[name].numpy()), nibbles(tensors[f"{path}.qzeros"].numpy())
        size = len(codes) if said["group_size"] == -1 else said["group_size"]
        group = np.arange(len(codes)) // size
        found[path] = ((codes - zeros[group]).astype(np.float32) * scales[group]).T
    return found


def bitsandbytes(said: Mapping[str, Any], tensors: Tensors) -> dict[str, np.ndarray]:
    found = {}
    for name, value in tensors.items():
        if name.endswith(".SCB"):
            path = name.removesuffix(".SCB")
            scale = (value.double() / 127).float().numpy()
            found[path] = tensors[f"{path}.weight"].numpy().astype(np.float32) * scale[:, None]
        if ".weight.quant_state." in name:
            path = name.partition(".weight.quant_state.")[0]
            note = json.loads(bytes(value.tolist()))
            packed = tensors[f"{path}.weight"].contiguous().view(torch.uint8).numpy().reshape(-1)
            codes = np.stack([packed // 16, packed % 16], 1).reshape(-1)[: int(np.prod(note["shape"]))]
            scale = tensors[f"{path}.weight.absmax"].numpy()
            if note.get("nested_blocksize"):
                levels = tensors[f"{path}.weight.nested_quant_map"].numpy()[scale]
                inner = np.repeat(tensors[f"{path}.weight.nested_absmax"].numpy(), note["nested_blocksize"])[
                    : len(scale)
                ]
                scale = levels * inner + np.float32(note["nested_offset"])
            values = tensors[f"{path}.weight.quant_map"].numpy()[codes]
            scale = np.repeat(scale, note["blocksize"])[: len(values)]
            found[path] = (values * scale).reshape(note["shape"])
    return found


def fp8(said: Mapping[str, Any], tensors: Tensors) -> dict[str, np.ndarray]:
    found = {}
    for name, value in tensors.items():
        if value.dtype != torch.float8_e4m3fn:
            continue
        path = name.removesuffix(".weight")
        ending = next(e for e in (".weight_scale_inv", ".weight_scale", "_scale_inv") if path + e in tensors)
        scale, codes = tensors[path + ending].float().numpy(), value.float().numpy()
        if said.get("weight_block_size"):
            for axis, size in ((-2, said["weight_block_size"][0]), (-1, said["weight_block_size"][1])):
                scale = np.repeat(scale, size, axis=axis).take(np.arange(codes.shape[axis]), axis=axis)
        found[path] = codes * scale
    return found


def mxfp4(said: Mapping[str, Any], tensors: Tensors) -> dict[str, np.ndarray]:
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=np.float32)
    values, found = np.concatenate([values, -values]), {}
    for name, value in tensors.items():
        if name.endswith("_blocks"):
            path, blocks = name.removesuffix("_blocks"), value.numpy()
            pairs = np.stack([values[blocks % 16], values[blocks // 16]], -1).reshape(*blocks.shape[:3], 32)
            scale = np.exp2(tensors[f"{path}_scales"].numpy().astype(np.float64) - 127).astype(np.float32)
            found[path] = (pairs * scale[..., None]).reshape(*blocks.shape[:2], -1).transpose(0, 2, 1)
    return found


def exl3(said: Mapping[str, Any], tensors: Tensors) -> dict[str, np.ndarray]:
    """States one after another along each tile, values in float16 as the formulas say, Hadamard matrices from SciPy."""
    from scipy.linalg import hadamard

    turn = hadamard(128) / np.sqrt(128)
    found = {}
    for name in tensors:
        if not name.endswith(".trellis"):
            continue
        path = name.removesuffix(".trellis")
        words = tensors[name].numpy().view(np.uint16)
        down, across, width = words.shape
        bits = width // 16
        stream = words.reshape(-1, width // 2, 2)[:, :, ::-1].astype(">u2").reshape(-1, width).view(np.uint8)
        line = np.unpackbits(np.ascontiguousarray(stream).reshape(len(stream), -1), axis=1)
        twice = np.concatenate([line, line], axis=1)
        inner = np.zeros((down * 16, across * 16), np.float32)
        for place in range(256):
            end = (place + 1) * bits + line.shape[1]
            state = (twice[:, end - 16 : end].astype(np.int64) * 2 ** np.arange(15, -1, -1)).sum(1)
            thread, j = place // 8, place % 8
            row, column = 2 * (thread % 4) + (0, 1, 8, 9)[j % 4], thread // 4 + 8 * (j // 4)
            values = _of_states(state, f"{path}.mcg" in tensors, f"{path}.mul1" in tensors)
            inner[row::16, column::16] = values.reshape(down, across)
        if f"{path}.suh" in tensors:
            left, right = tensors[f"{path}.suh"].float().numpy(), tensors[f"{path}.svh"].float().numpy()
        else:
            left, right = (
                1.0 - 2.0 * bits_of(tensors[f"{path}.{s}"].numpy()[None], 1, 16 * len(tensors[f"{path}.{s}"]))[0]
                for s in ("su", "sv")
            )
        for marks in ("mcg", "mul1"):
            if f"{path}.{marks}" in tensors:
                assert int(tensors[f"{path}.{marks}"]) % 2**32 == {"mcg": 0xCBAC1FED, "mul1": 0x83DCD12D}[marks]
        whole = (
            np.einsum("ab,xbc->xac", turn, inner.reshape(-1, 128, inner.shape[1])).reshape(inner.shape) * left[:, None]
        )
        whole = (whole.reshape(len(whole), -1, 128) @ turn).reshape(inner.shape) * right
        found[path] = whole.T.astype(np.float32)
    return found


def _of_states(state: np.ndarray, mcg: bool, mul1: bool) -> np.ndarray:
    if mul1:
        total = (state * 0x83DCD12D % 2**32).astype("<u4").view(np.uint8).reshape(len(state), 4).sum(1, dtype=np.int64)
        factor, addend = (float(np.uint16(b).view(np.float16)) for b in (0x1EEE, 0xC931))
        return ((1024 + total) * factor + addend).astype(np.float16).astype(np.float32)
    product = state * 0xCBAC1FED if mcg else state * 89226354 + 64248484
    halves = ((product % 2**32 & 0x8FFF8FFF) ^ 0x3B603B60).astype("<u4").view(np.float16).reshape(len(state), 2)
    return (halves[:, 0] + halves[:, 1]).astype(np.float32)


def auto_round(said: Mapping[str, Any], tensors: Tensors) -> dict[str, np.ndarray]:
    packing = said["packing_format"].lower()
    if packing == "auto_round:auto_awq":
        return awq(said, tensors)
    format = "gptq" if packing == "auto_round:auto_gptq" else "gptq_v2"
    rules = {f"+:^{re.escape(k)}$": v for k, v in (said.get("extra_config") or {}).items() if v.get("bits") != 16}
    rules |= {f"+:.*?(?:{k})": v for k, v in (said.get("extra_config") or {}).items() if v.get("bits") != 16}
    found: dict[str, np.ndarray] = {}
    for name in tensors:
        if name.endswith(".qweight"):  # an index of groups, which these files lack
            path = name.removesuffix(".qweight")
            own = dict(said) | next((v for p, v in rules.items() if re.match(p[2:], path)), {})
            columns = tensors[name].shape[0] * 32 // own["bits"]
            size = columns if own["group_size"] == -1 else own["group_size"]
            index = torch.arange(columns, dtype=torch.int32) // size
            whole = {f"{path}.{k}": tensors[f"{path}.{k}"] for k in ("qweight", "qzeros", "scales")}
            found |= gptq(own | {"checkpoint_format": format, "dynamic": None}, whole | {f"{path}.g_idx": index})
    return found


def hqq(said: Mapping[str, Any], tensors: Tensors) -> dict[str, np.ndarray]:
    found = {}
    for name in tensors:
        if not name.endswith(".W_q"):
            continue
        path = name.removesuffix(".W_q")
        words = tensors[name].numpy()
        bits, size, axis = (tensors[f"{path}.{k}"].item() for k in ("nbits", "group_size", "axis"))
        shape = tuple(tensors[f"{path}.shape"].tolist())
        width = {8: 8, 6: 8, 5: 8, 4: 4, 3: 3, 2: 2, 1: 1}[bits]
        count = 10 if width == 3 else 8 // width
        folded = (shape[0] * shape[1] // size, size) if axis == 1 else (size, shape[0] * shape[1] // size)
        parts = [(words.astype(np.int64) >> (width * (count - 1 - i))) % 2**width for i in range(count)]
        codes = np.concatenate(parts)[: folded[0]].astype(np.float64)
        scale, zero = (tensors[f"{path}.{k}"].double().numpy() for k in ("scale", "zero"))
        found[path] = ((codes - zero) * scale).reshape(shape).astype(np.float32)
    return found


def torchao(said: Mapping[str, Any], tensors: Tensors) -> dict[str, np.ndarray]:
    """Blocks are as large as the shape of the scales says."""
    found = {}
    for name, value in tensors.items():
        if name.endswith("._weight_qdata"):
            path = name.removesuffix("._weight_qdata")
            codes = value.double()
            grid = [
                tensors[f"{path}._weight_{p}"].double()
                for p in ("zero_point", "scale")
                if f"{path}._weight_{p}" in tensors
            ]
            for i, size in enumerate(codes.shape):
                grid = [part.repeat_interleave(size // part.shape[i], i) for part in grid]
            found[path] = ((codes - (grid[0] if len(grid) == 2 else 0)) * grid[-1]).float().numpy()
    return found


def mlx(said: Mapping[str, Any], tensors: Tensors) -> dict[str, np.ndarray]:
    found = {}
    for name, value in tensors.items():
        if not name.endswith(".scales"):
            continue
        path = name.removesuffix(".scales")
        own = said.get(path, said)
        own = said if own is True else own
        mode = (own.get("mode") or "affine").lower()
        bits, size = ({"mxfp8": 8}.get(mode, 4), 32) if mode != "affine" else (own["bits"], own["group_size"])
        words = tensors[f"{path}.weight"].numpy()
        columns = words.shape[1] * 32 // bits
        codes = bits_of(words, bits, columns)
        grid = [value] if mode != "affine" else [value, tensors[f"{path}.biases"]]
        if len(grid) == 1:
            half = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
            bytes8 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()
            codes = (np.concatenate([half, -half]) if bits == 4 else bytes8)[codes]
            grid = [torch.exp2(value.double() - 127)]
        wide = [part.float().numpy().repeat(size, axis=1) for part in grid]
        found[path] = codes.astype(np.float32) * wide[0]
        if len(wide) == 2:
            found[path] = found[path] + wide[1]
    return found


def modelopt(said: Mapping[str, Any], tensors: Tensors) -> dict[str, np.ndarray]:
    """What is stored tells codes and scales apart: bytes of float8, of integers, of pairs of rows or of columns."""
    found = {}
    half = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    for name in [n for n in tensors if n.endswith(".weight_scale")]:
        path = name.removesuffix(".weight_scale")
        own = (said.get("quantized_layers") or {}).get(path, said)["quant_algo"].lower()
        codes, scale = tensors[f"{path}.weight"], tensors[name].double()
        numbers = codes.double().numpy()
        if own == "w4a16_awq":
            numbers = np.stack([codes.numpy() % 16, codes.numpy() // 16], 1).reshape(-1, codes.shape[1]).astype(float)
            numbers = numbers - 16 * (numbers > 7)
        elif codes.dtype == torch.uint8:
            numbers = np.stack([codes.numpy() % 16, codes.numpy() // 16], -1).reshape(len(codes), -1)
            numbers = np.concatenate([half, -half])[numbers]
        if tensors[name].dtype == torch.uint8:
            scale = torch.exp2(scale - 127)
        scale = (
            (scale * tensors[f"{path}.weight_scale_2"].double()).float()
            if f"{path}.weight_scale_2" in tensors
            else scale
        )
        grid = scale.double().numpy()
        grid = grid[:, None] if grid.ndim == 1 else grid[:, 0, :, 0] if grid.ndim == 4 else grid
        if grid.ndim:
            high, wide = (128, 128) if own == "fp8_pb_wo" else (1, -(-numbers.shape[1] // grid.shape[1]))
            grid = grid.repeat(high, 0).repeat(wide, 1)[: numbers.shape[0], : numbers.shape[1]]
        found[path] = (numbers * grid).astype(np.float32)
    return found


READERS = {
    "modelopt": modelopt,
    "exl3": exl3,
    "mlx": mlx,
    "hqq": hqq,
    "torchao": torchao,
    "auto-round": auto_round,
    "intel/auto-round": auto_round,
    "gptq": gptq,
    "awq": awq,
    "bitsandbytes": bitsandbytes,
    "fp8": fp8,
    "mxfp4": mxfp4,
}
