"""What rounding costs networks that say no class: a super-resolution network in dB, a voice detector in decisions that stay.

    python benchmarks/signals.py --data DIR [--schemes 'W8A8;w=int4/channel'] [--methods rtn,gptq]

VDSR calibrates on patches of other pictures and is measured as its authors do: PSNR of the luminance, two border pixels left out. Silero calibrates on
the steps of the first ten seconds and goes through the whole minute, its state handed from step to step; decisions (a probability above one half) are
counted after those ten seconds.
"""

from __future__ import annotations

import argparse
import io
import math
import tempfile
import time
import wave
import zipfile
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import arrondi
from arrondi.graph import Program, read_graph, write_graph

SET5: Final = ("bird", "butterfly", "head", "woman")
STEP, BEFORE = 512, 64
"""New samples of a step, and those of the step before that it sees again."""
SEEN = 312
"""Steps that calibrate."""


class VDSR(nn.Module):
    """Twenty convolutions that say what a blown-up picture lacks."""

    def __init__(self) -> None:
        super().__init__()
        self.input, self.output = nn.Conv2d(1, 64, 3, padding=1, bias=False), nn.Conv2d(64, 1, 3, padding=1, bias=False)
        for k in range(1, 19):
            setattr(self, f"conv{k}", nn.Conv2d(64, 64, 3, padding=1, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.input(x))
        for k in range(1, 19):
            y = F.relu(getattr(self, f"conv{k}")(y))
        return x + self.output(y)


class Silero(nn.Module):
    """One step of the detector: 576 samples and the state → probability and the next state."""

    def __init__(self) -> None:
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 258, 256, 128, bias=False)
        sizes = ((129, 128, 1), (128, 64, 2), (64, 64, 2), (64, 128, 1))
        for k, (inside, outside, stride) in enumerate(sizes, 1):
            setattr(self, f"conv{k}", nn.Conv1d(inside, outside, 3, stride, 1))
        self.lstm_cell, self.final_conv = nn.LSTMCell(128, 128), nn.Conv1d(128, 1, 1)

    def forward(self, x: torch.Tensor, h: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = self.stft_conv(F.pad(x[:, None], (0, 64), "reflect"))
        y = torch.sqrt(y[:, :129].square() + y[:, 129:].square())
        for k in range(1, 5):
            y = F.relu(getattr(self, f"conv{k}")(y))
        h, c = self.lstm_cell(y.squeeze(-1), (h, c))
        return torch.sigmoid(self.final_conv(F.relu(h)[..., None])).mean((1, 2)), h, c


def luminance(data: Path, count: int, size: int = 96) -> np.ndarray:
    """Patches of ImageNet pictures, shrunk by two and blown up again: (count, 1, size, size) in [0, 1]."""
    from PIL import Image

    found = []
    with zipfile.ZipFile(data / "imagenet" / "imagenet_samples_256.zip") as held:
        names = sorted(n for n in held.namelist() if n.lower().endswith((".jpg", ".jpeg")))
        for name in names[:: len(names) // count][:count]:
            image = (
                Image.open(io.BytesIO(held.read(name))).convert("YCbCr").split()[0].crop((80, 80, 80 + size, 80 + size))
            )
            small = image.resize((size // 2, size // 2), Image.Resampling.BICUBIC)
            found.append(np.asarray(small.resize((size, size), Image.Resampling.BICUBIC), np.float32) / 255)
    return np.stack(found)[:, None]


def psnr(run: Any, data: Path) -> float:
    """Mean PSNR in dB over the pictures of Set5 that are there."""
    held = np.load(data / "vdsr" / "set5_y_x2.npz")
    found = []
    for name in SET5:
        wanted, given = held[f"{name}_x2_gt"], held[f"{name}_x2_bicubic"]
        output = run(torch.from_numpy(given / 255)[None, None].float())[0, 0].numpy() * 255
        error = (output.clip(0, 255) - wanted)[2:-2, 2:-2]
        found.append(10 * math.log10(255**2 / float(np.mean(error.astype(np.float64) ** 2))))
    return float(np.mean(found))


def speech(data: Path) -> torch.Tensor:
    """(steps, 576): every step's new samples behind the last ones of the step before."""
    with wave.open(str(data / "silero_vad" / "speech_60s_16k.wav")) as held:
        samples = np.frombuffer(held.readframes(held.getnframes()), np.int16).astype(np.float32) / 32768
    padded = np.concatenate([np.zeros(BEFORE, np.float32), samples])
    count = len(samples) // STEP
    return torch.from_numpy(np.stack([padded[i * STEP : i * STEP + STEP + BEFORE] for i in range(count)]))


def through(run: Any, steps: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The probability of every step, and the states that entered them: (steps, 128) twice."""
    h = c = torch.zeros(1, 128)
    found, states = [], ([], [])
    for x in steps:
        states[0].append(h)
        states[1].append(c)
        p, h, c = run(x[None], h, c)
        found.append(p)
    return torch.cat(found), [torch.cat(s) for s in states]


def vdsr(data: Path, folder: Path) -> tuple[Path, Any, Any]:
    """The file, what to calibrate on, and how a program is measured."""
    module = VDSR().eval()
    module.load_state_dict(load_file(data / "vdsr" / "vdsr.safetensors"))
    patches = luminance(data, 64)
    write_graph(read_graph(module, torch.from_numpy(patches[:2]), varying=(0, 2, 3)), folder / "vdsr.onnx")
    return folder / "vdsr.onnx", patches, lambda program: f"{psnr(program, data):.3f} dB"


def silero(data: Path, folder: Path) -> tuple[Path, Any, Any]:
    module = Silero().eval()
    module.load_state_dict(load_file(data / "silero_vad" / "silero_vad_16k.safetensors"))
    steps, wanted = speech(data), np.load(data / "silero_vad" / "fp32_speech_prob.npy")
    write_graph(read_graph(module, (steps[:2], torch.zeros(2, 128), torch.zeros(2, 128))), folder / "silero.onnx")
    _, states = through(module, steps[:SEEN])

    def kept(program: Any) -> str:
        found, given = through(program, steps)[0].numpy()[SEEN:], wanted[SEEN:]
        same = float(((found > 0.5) == (given > 0.5)).mean())
        return (
            f"{100 * same:.2f} % of {len(given):,} decisions, mean difference {float(np.abs(found - given).mean()):.4f}"
        )

    return folder / "silero.onnx", (steps[:SEEN], *states), kept


NETWORKS: Final = {"vdsr": vdsr, "silero": silero}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--schemes", default="W8A8;w=int4/channel")
    parser.add_argument("--methods", default="rtn,gptq")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        for name in args.networks.split(","):
            source, calibration, measured = NETWORKS[name](args.data, Path(scratch))
            print(f"{name} float32: {measured(Program(read_graph(source)))}", flush=True)
            for scheme in args.schemes.split(";"):
                for method in args.methods.split(","):
                    out, began = Path(scratch) / "out.onnx", time.process_time()
                    arrondi.quantize(
                        source,
                        scheme,
                        method=method,
                        calibration=calibration,
                        out=out,
                        evaluate=False,
                        overwrite=True,
                        samples=512,
                    )
                    seconds, program = time.process_time() - began, Program(read_graph(out))
                    print(
                        f"{name} {scheme} {method}: {measured(program)}, {out.stat().st_size:,} bytes, {seconds:.1f} CPU s",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
