"""The `quantization_config` of torchao, as transformers writes and reads it, and the metadata of its files.

Owns: `config` and `metadata` (what is written), `read_config`. The metadata describes every tensor; the config says by what function of the
package they were made, of which transformers must find one to load anything, and which decides nothing then.

Source: transformers 5.24, `TorchAoConfig` and `quantizers/quantizer_torchao.py`; torchao 0.18, `core/config.py`.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any, Final

from arrondi.checkpoint.layouts.claims import Claims
from arrondi.checkpoint.layouts.layout import ModelFacts, Placed
from arrondi.checkpoint.layouts.torchao.notes import DATA, FLOAT8, INT8, INTX, PLAIN, Note
from arrondi.checkpoint.layouts.torchao.storage import block_of, kind_of
from arrondi.formats import PerBlock, PerGroup, PerTensor

NAMES: Final = "tensor_names"


def metadata(placed: list[Placed], plain: list[str], facts: ModelFacts = ModelFacts()) -> dict[str, str]:
    """The metadata of every safetensors file: a note for each tensor of the model, and the list of them."""
    notes = {p.name: _note(p, facts).text() for p in placed}
    notes |= {name: json.dumps({"_type": PLAIN}) for name in plain}
    return notes | {NAMES: json.dumps(list(notes))}


def _note(p: Placed, facts: ModelFacts) -> Note:
    kind, weights = kind_of(p), p.scheme.weights
    dtype = facts.dtype if facts.dtype in ("bfloat16", "float16") else "float32"
    target = weights.format.name if kind == INTX else ""
    return Note(kind, block_of(weights, p.matrix_shape), dtype, p.scheme.inputs, target, DATA[kind])


def config(placed: list[Placed], kept: list[str], facts: ModelFacts = ModelFacts()) -> dict[str, Any]:
    """The `quantization_config` of config.json; of several schemes it names the commonest."""
    words = [json.dumps(_made_by(p)) for p in placed]
    return {
        "quant_method": "torchao",
        "quant_type": {"default": json.loads(Counter(words).most_common(1)[0][0])},
        "modules_to_not_convert": sorted(set(kept)) or None,
        "include_input_output_embeddings": False,
        "untie_embedding_weights": False,
    }


def _made_by(p: Placed) -> dict[str, Any]:
    """The config of torchao that makes such tensors, as its `config_to_dict` writes it."""
    kind, weights, inputs = kind_of(p), p.scheme.weights, p.scheme.inputs
    row = {"_type": "PerRow", "_version": 1, "_data": {"dim": -1}}
    if kind == INTX:
        size = weights.granularity.size if isinstance(weights.granularity, PerGroup) else None
        group = {"_type": "PerGroup", "_version": 1, "_data": {"group_size": size}}
        axis = {"_type": "PerAxis", "_version": 1, "_data": {"axis": 0}}
        mapping = {"_type": "MappingType", "_data": "SYMMETRIC" if weights.symmetric else "ASYMMETRIC"}
        said = {"weight_dtype": {"_type": "torch.dtype", "_data": weights.format.name}}
        words = ("granularity", "mapping_type") if inputs is None else ("weight_granularity", "weight_mapping_type")
        name = "IntxWeightOnlyConfig" if inputs is None else "Int8DynamicActivationIntxWeightConfig"
        return _typed(name, said | {words[0]: group if size else axis, words[1]: mapping})
    match weights.granularity:
        case PerGroup(size) if kind == INT8:
            granularity: dict[str, Any] = {"_type": "PerGroup", "_version": 1, "_data": {"group_size": size}}
        case PerTensor():
            granularity = {"_type": "PerTensor", "_version": 1, "_data": {}}
        case PerBlock() | _:
            granularity = row
    weight_only = "Int8WeightOnlyConfig" if kind == INT8 else "Float8WeightOnlyConfig"
    dynamic = "Int8DynamicActivationInt8WeightConfig" if kind == INT8 else "Float8DynamicActivationFloat8WeightConfig"
    return _typed(weight_only if inputs is None or kind == FLOAT8 else dynamic, {"granularity": granularity})


def _typed(name: str, data: dict[str, Any]) -> dict[str, Any]:
    return {"_type": name, "_version": 2, "_data": data}


def read_config(config: object) -> tuple[dict[str, Any], bool]:
    """Check a `quantization_config` of torchao: the metadata of the files, and whether embeddings are quantized, too.

    Raises:
        FileFormatError: a key that is not known, or a value that cannot be.
    """
    claims = Claims(config, "quantization_config")
    claims.only("quant_method", "torchao")
    quant_type = Claims(claims.table("quant_type"), "quantization_config.quant_type")
    made_by = Claims(quant_type.table("default"), "quantization_config.quant_type.default")
    quant_type.done()
    made_by.remarks(["_version", "_data"])  # the metadata says what came of it
    made_by.text("_type")
    made_by.done()
    claims.words("modules_to_not_convert")  # the metadata says it
    embeddings = claims.flag("include_input_output_embeddings", False)
    claims.remarks(["untie_embedding_weights"])
    metadata = claims.table("metadata")
    claims.done()
    return metadata, embeddings
