"""Files ↔ named tensors and QTensors: containers (names, metadata, bytes) × layouts (a quantized layer ↔ named tensors)."""

from arrondi.checkpoint.checkpoint import Checkpoint
from arrondi.checkpoint.containers.disk import (
    WORK,
    digest_of,
    digest_pieces,
    file_sha256,
    guard_disk,
    side_by_side,
    sync_folder,
)
from arrondi.checkpoint.containers.json_file import read_report, write_config, write_json, written
from arrondi.checkpoint.containers.model_dir import ModelDir
from arrondi.checkpoint.containers.tensor_file import Entry, read_header, read_tensor
from arrondi.checkpoint.containers.writer import ShardPlan, ShardWriter, TensorSpec, shard_digest
from arrondi.checkpoint.layouts import CHOSEN, LAYOUTS
from arrondi.checkpoint.layouts.layout import LayerValues, Layout, ModelFacts, Placed
from arrondi.checkpoint.readers import readers_of
from arrondi.checkpoint.verdict import Verdict

__all__ = [
    "CHOSEN",
    "LAYOUTS",
    "WORK",
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
    "digest_of",
    "digest_pieces",
    "file_sha256",
    "guard_disk",
    "read_header",
    "read_report",
    "read_tensor",
    "readers_of",
    "shard_digest",
    "side_by_side",
    "sync_folder",
    "write_config",
    "write_json",
    "written",
]
