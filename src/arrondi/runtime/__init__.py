"""Quantized models at run time: load, fused blocks, decoding, generation."""
