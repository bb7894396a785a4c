"""Tensors in few bits: `QTensor`, ranges, encoding, packing and storage."""
