"""Quantized models at run time: load, fused blocks, decoding, generation."""

from arrondi.waiting import wait_passively

wait_passively()  # before anything here loads PyTorch
