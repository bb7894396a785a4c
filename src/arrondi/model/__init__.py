"""What a model is: sites, sources, and the walk over its units."""

from arrondi.model.backward import Gradients, kl_loss, next_token_loss, sampled_loss, walk_back
from arrondi.model.build import build_model, configs_in
from arrondi.model.chain import Chain, Inputs, model_output
from arrondi.model.device import device_named
from arrondi.model.folds import Fold, Producer, apply_fold, find_folds
from arrondi.model.in_memory import InMemory
from arrondi.model.instance import Instance, Rounding
from arrondi.model.memory import release
from arrondi.model.names import Names
from arrondi.model.overlay import Overlay
from arrondi.model.precision import DTYPES, bfloat16_pays, stored_in_16_bits
from arrondi.model.segments import Segments, Straight
from arrondi.model.settle import confirm, settle
from arrondi.model.shapes import usual_inputs
from arrondi.model.site import Facts, Site, StoredTensor, find_tensors
from arrondi.model.source import OnDisk
from arrondi.model.store import Budget, TreeStore
from arrondi.model.streams import Passage, Stream, Units, walk
from arrondi.model.towers import deaf_encoder, deaf_parameters, is_seq2seq
from arrondi.model.whole import Whole

Source = OnDisk | InMemory
"""Where a model comes from."""

__all__ = [
    "DTYPES",
    "Budget",
    "Chain",
    "Facts",
    "Fold",
    "Gradients",
    "InMemory",
    "Inputs",
    "Instance",
    "Names",
    "OnDisk",
    "Overlay",
    "Passage",
    "Producer",
    "Rounding",
    "Segments",
    "Site",
    "Source",
    "StoredTensor",
    "Straight",
    "Stream",
    "TreeStore",
    "Units",
    "Whole",
    "apply_fold",
    "bfloat16_pays",
    "build_model",
    "configs_in",
    "confirm",
    "deaf_encoder",
    "deaf_parameters",
    "device_named",
    "find_folds",
    "find_tensors",
    "is_seq2seq",
    "kl_loss",
    "model_output",
    "next_token_loss",
    "release",
    "sampled_loss",
    "settle",
    "stored_in_16_bits",
    "usual_inputs",
    "walk",
    "walk_back",
]
