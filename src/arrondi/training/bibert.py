"""BiBERT: an encoder whose weights, word embeddings, activations and attention have one bit. Owns: `binarize_bert`, `blocks_of`.

Source: Qin et al. 2022, arXiv:2203.06390. Modules are found by structure, so any encoder of transformers whose attention is chosen by its
config is taken.
"""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from arrondi.errors import SchemeError
from arrondi.model.bi_attention import HALF, NAME
from arrondi.training.models import make_latent

Model = TypeVar("Model", bound=nn.Module)


def binarize_bert(model: Model, *, half: bool = False, embeddings: bool = True) -> Model:
    """Train an encoder in one bit: bi-attention, and latent layers of method `bibert` in its blocks and its table of words.

    Norms, biases, position and type embeddings, a pooler and a head stay float, as in the paper.

    Args:
        model: of transformers; changed in place. `arrondi.training.models.pack` and `arrondi.save` make a checkpoint of it that
            `arrondi.load` runs.
        half: attention weights are exactly half ones in every row (BiBERT₅₀%), instead of ones where a score is not negative.
        embeddings: binarize the table of words, too.

    Raises:
        SchemeError: the model has no blocks of attention that its config chooses, or they look back only.
    """
    known: Any = model
    config = getattr(model, "config", None)
    if not hasattr(config, "_attn_implementation") or getattr(config, "is_decoder", False):
        raise SchemeError(
            f"BiBERT is made of an encoder of transformers whose attention its config chooses, got {type(model).__name__}."
        )
    inside = blocks_of(model)
    targets = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith(f"{inside}.")]
    words = known.get_input_embeddings() if embeddings else None
    targets += [n for n, m in model.named_modules() if m is words]
    make_latent(model, "bibert", targets=targets, ignore=())
    assert config is not None
    config._attn_implementation = HALF if half else NAME
    return model


def blocks_of(model: nn.Module) -> str:
    """The path of the list of blocks: of all lists of modules of one class, the one with most weights in linear layers.

    Raises:
        SchemeError: there is none.
    """
    sizes = {
        name: sum(m.weight.numel() for m in blocks.modules() if isinstance(m, nn.Linear))
        for name, blocks in model.named_modules()
        if isinstance(blocks, nn.ModuleList) and len({type(b) for b in blocks}) == 1
    }
    if not any(sizes.values()):
        raise SchemeError(f"{type(model).__name__} has no list of blocks with linear layers in it.")
    return max(sizes, key=lambda name: sizes[name])
