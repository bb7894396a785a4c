"""The `quantization_config` of GPTQ files.

Owns: `config` (what is written), `read_config` (what is read, `Rules`), `together`, `is_head` and `block_of`. One scheme is said for all, others and what is
kept by rules of GPTQModel (`dynamic`): pattern of module paths → what is different there ("+:"), or that nothing is quantized ("-:");
the first that matches has it. optimum, by which transformers reads, knows one scheme, and is told by `modules_in_block_to_quantize`
which modules of the repeated blocks have it.

Source: gptqmodel 7.7, `quantization/config.py`; optimum 2.3, `gptq/quantizer.py`.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any, Final

from arrondi.checkpoint.layouts.claims import Claims, compiled
from arrondi.checkpoint.layouts.gptq.storage import is_v1
from arrondi.checkpoint.layouts.integers import AUTOROUND, WIDTHS, said, scheme_of
from arrondi.checkpoint.layouts.layout import ModelFacts, Placed
from arrondi.formats import Scheme

HOW: Final = (
    "damp_percent", "damp_auto_increment", "static_groups", "true_sequential", "model_name_or_path", "model_file_base_name", "meta", "mse",
    "act_group_aware", "dataset", "tokenizer", "batch_size", "pad_token_id", "max_input_length", "cache_block_outputs", "model_seqlen",
    "modules_in_block_to_quantize", "block_name_to_quantize", "module_name_preceding_first_block", "use_cuda_fp16", "use_exllama",
    "exllama_config", "disable_exllama", "backend", "hyb_act", "gptaq", "foem", "v2", "v2_alpha", "v2_memory_device", "parallel_packing",
    "offload_to_disk", "offload_to_disk_path", "pack_impl", "failsafe_with_rtn", "fail_safe", "failsafe", "fallback", "quantizer", "uri",
    "checkpoint_format_version", "modules_to_not_convert", "device", "preprocessors", "smoother", "smooth", "awq_gemm_checkpoint", "moe",
)  # fmt: skip
"""Keys that say how codes were found or how a runtime multiplies them."""


@dataclass(frozen=True)
class Rules:
    """What a config says of its layers.

    Attributes:
        base: the scheme of all layers that no rule picks; its scale is "float32" until the files say its type.
        rules: pattern → another scheme, or None for what is not quantized; the first that matches has it.
        format: the convention of zero points, "gptq" or "gptq_v2".
        head: the head is quantized.
    """

    base: Scheme
    rules: list[tuple[re.Pattern[str], Scheme | None]]
    format: str
    head: bool

    def scheme_of(self, path: str) -> Scheme | None:
        """The scheme of a module, None if a rule says that it is not quantized."""
        return next((scheme for pattern, scheme in self.rules if pattern.match(path)), self.base)


def read_config(config: object) -> Rules:
    """Check a `quantization_config` of quant_method gptq and give what it says.

    Raises:
        FileFormatError: a key that is not known, or a value that cannot be.
    """
    claims = Claims(config, "quantization_config")
    claims.only("quant_method", "gptq")
    claims.only("method", "gptq")
    format = claims.word("checkpoint_format", "", ["", "gptq", "gptq_v2"])
    format = claims.word("format", format or "gptq", [format] if format else ["gptq", "gptq_v2"])
    base = read_base(claims)
    head = claims.flag("lm_head", False)
    claims.only("pack_dtype", "int32", "torch.int32")
    for key in ("rotation", "activation", "adapter", "is_marlin_format", "planar"):
        claims.only(key, False)
    rules = []
    for pattern, change in claims.table("dynamic").items():
        where = f"quantization_config.dynamic.{pattern[:60]}"
        own = Claims(change, where)
        text = pattern[2:] if pattern[:2] in ("+:", "-:") else pattern
        other = None if pattern.startswith("-:") else read_base(own, base)
        own.remarks((*HOW, "adapter"))
        own.only("pack_dtype", "int32")
        own.done()
        rules.append((compiled(text, where), other))
    claims.word("data_type", "int", ["int"])
    claims.remarks((*HOW, *AUTOROUND))
    claims.done()
    return Rules(base, rules, format, head)


def read_base(claims: Claims, base: Scheme | None = None) -> Scheme:
    """The scheme that a config says, or a rule that changes some of it."""
    bits, size, symmetric = (None, 128, True) if base is None else said(base)
    bits = claims.number("bits", bits, WIDTHS)
    size = claims.number("group_size", size, least=-1) or -1
    claims.flag("desc_act", False)  # the stored index of groups says it
    return scheme_of(bits, size, claims.flag("sym", symmetric))


def together(placed: list[Placed]) -> str | None:
    """Why one config cannot describe these layers, as a sentence; None if it can."""
    if len({is_v1(p) for p in placed}) > 1:
        return (
            "A gptq file has one convention of zero points, and symmetric and asymmetric layers of one model would need two. "
            "Make all weights symmetric, or all asymmetric."
        )
    return None


def config(placed: list[Placed], kept: list[str], facts: ModelFacts = ModelFacts()) -> dict[str, Any]:
    """The `quantization_config` of config.json.

    Args:
        placed: the layers that are stored in few bits.
        kept: paths of all modules with a matrix that is stored as it is.
        facts: not needed.
    """
    schemes = [said(p.scheme.weights) for p in placed]
    base = Counter(schemes).most_common(1)[0][0]
    block = block_of(placed)
    beside = [k for k in kept if block and k.startswith(f"{block}.")]
    rules: dict[str, dict[str, Any]] = {f"-:^{re.escape(k)}$": {} for k in beside}
    rules |= {f"+:^{re.escape(p.path)}$": _words(s) for p, s in zip(placed, schemes, strict=True) if s != base}
    document: dict[str, Any] = {
        "quant_method": "gptq",
        **_words(base),
        "desc_act": any(p.indexed for p in placed),
        "checkpoint_format": "gptq" if all(map(is_v1, placed)) else "gptq_v2",
        "pack_dtype": "int32",
        "lm_head": any(is_head(p.path) for p in placed),
    }
    if rules:
        document["dynamic"] = rules
    if block:
        document["block_name_to_quantize"] = block
    if beside:
        document["modules_in_block_to_quantize"] = [_inside(placed, block, beside)]
    return document


def is_head(path: str) -> bool:
    """Whether a module is the one that configs call the head."""
    return path.rpartition(".")[2] == "lm_head"


def _words(scheme: tuple[int, int, bool]) -> dict[str, Any]:
    return dict(zip(("bits", "group_size", "sym"), scheme, strict=True))


def block_of(placed: list[Placed]) -> str:
    """The path of the repeated blocks, "" if the layers lie in several such lists, or in none."""
    found = {m[1] for p in placed if (m := re.match(r"(.*?)\.\d+\.", p.path)) is not None}
    return found.pop() if len(found) == 1 else ""


def _inside(placed: list[Placed], block: str, kept: list[str]) -> list[str]:
    """Names of the modules of a block that are quantized, or their whole paths if blocks differ."""
    paths = [p.path for p in placed if p.path.startswith(f"{block}.")]
    short = {_within(p, block) for p in paths}
    return sorted(paths if short & {_within(k, block) for k in kept} else short)


def _within(path: str, block: str) -> str:
    return path.removeprefix(f"{block}.").partition(".")[2]
