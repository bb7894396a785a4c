"""Files ↔ named tensors and QTensors: containers (names, metadata, bytes) × layouts (a quantized layer ↔ named tensors)."""

from arrondi.checkpoint.checkpoint import Checkpoint
from arrondi.checkpoint.containers.model_dir import ModelDir
from arrondi.checkpoint.containers.tensor_file import Entry, read_header, read_tensor
from arrondi.checkpoint.containers.writer import ShardPlan, ShardWriter, TensorSpec, guard_disk, write_json
from arrondi.checkpoint.layouts import LAYOUTS
from arrondi.checkpoint.layouts.layout import LayerValues, Layout, ModelFacts, Placed
from arrondi.checkpoint.readers import Verdict, readers_of

__all__ = [
    "LAYOUTS",
    "Checkpoint",
    "Entry",
    "LayerValues",
    "Layout",
    "ModelDir",
    "ModelFacts",
    "Placed",
    "ShardPlan",
    "ShardWriter",
    "TensorSpec",
    "Verdict",
    "guard_disk",
    "read_header",
    "read_tensor",
    "readers_of",
    "write_json",
]
