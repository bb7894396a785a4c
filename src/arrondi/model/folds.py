"""Stub until the real one lands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Producer:
    kind: Literal["norm", "linear"]
    param: str
    offset: float
    bias: str | None
    rows: slice | None
    count: int = 0
    index: int | None = None


@dataclass(frozen=True)
class Fold:
    consumers: tuple[str, ...]
    producer: Producer | None
    channels: tuple[int, ...]
    reason: str | None


def find_folds(source: Any) -> list[Fold]:
    c = source.model.config
    params = dict(source.model.named_parameters(remove_duplicate=False))
    name_of = {s.param: s.name for s in source.sites}
    out = []
    lead = "model." if any(n.startswith("model.") for n in params) else ""
    for i in range(c.num_hidden_layers):
        b = f"{lead}layers.{i}"
        a, m = f"{b}.self_attn", f"{b}.mlp"
        site = lambda *n: tuple(name_of[f"{x}.weight"] for x in n)
        hidden = tuple(range(c.hidden_size))
        out.append(
            Fold(
                site(f"{a}.q_proj", f"{a}.k_proj", f"{a}.v_proj"),
                Producer("norm", f"{b}.input_layernorm.weight", 0.0, None, None),
                hidden,
                None,
            )
        )
        d = params[f"{a}.v_proj.weight"].shape[0] // c.num_key_value_heads
        n = params[f"{a}.o_proj.weight"].shape[1]
        rep = c.num_attention_heads // c.num_key_value_heads
        ch = tuple((j // d // rep) * d + j % d for j in range(n))
        bias = f"{a}.v_proj.bias" if f"{a}.v_proj.bias" in params else None
        out.append(Fold(site(f"{a}.o_proj"), Producer("linear", f"{a}.v_proj.weight", 0.0, bias, None), ch, None))
        out.append(
            Fold(
                site(f"{m}.gate_proj", f"{m}.up_proj"),
                Producer("norm", f"{b}.post_attention_layernorm.weight", 0.0, None, None),
                hidden,
                None,
            )
        )
        out.append(
            Fold(
                site(f"{m}.down_proj"),
                Producer("linear", f"{m}.up_proj.weight", 0.0, None, None),
                tuple(range(params[f"{m}.up_proj.weight"].shape[0])),
                None,
            )
        )
    out.append(Fold(("lm_head.weight",), None, (), "what makes its input is not known to the stub"))
    return out
