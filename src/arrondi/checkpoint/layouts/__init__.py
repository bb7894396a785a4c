"""Layouts: QTensors ↔ named tensors, one file each."""
