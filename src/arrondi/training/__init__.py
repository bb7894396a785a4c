"""Training in few bits: products of codes in forward and backward, in an ordinary PyTorch loop.

>>> import torch
>>> from arrondi.training import convert_to_lowbit_training, restore_training
>>> model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
>>> rows = convert_to_lowbit_training(model, "int8")
>>> model(torch.randn(8, 64)).square().mean().backward()
>>> restore_training(model)
"""

from arrondi.training.convert import (
    LayerReport,
    convert_to_lowbit_training,
    learned_state,
    load_learned_state,
    restore_training,
    training_report,
)
from arrondi.training.method import TrainingMethod
from arrondi.training.methods import PRODUCTS, TRAINING_METHODS
from arrondi.training.pace import follow_deviation

__all__ = [
    "PRODUCTS",
    "TRAINING_METHODS",
    "LayerReport",
    "TrainingMethod",
    "convert_to_lowbit_training",
    "follow_deviation",
    "learned_state",
    "load_learned_state",
    "restore_training",
    "training_report",
]
