"""The schemes by which gradients travel, as one table.

Owns: `GRADIENT_SCHEMES`, `GradientScheme`, and `check_world`, which refuses or warns.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

from arrondi.distributed.feedback import Feedback
from arrondi.distributed.scripts import effective_bits
from arrondi.distributed.topology import Topology
from arrondi.errors import SchemeError
from arrondi.tensor.blocks import Bits, BlockCodec, Rounding

_FEW: Final = 16
"""Ranks up to which shared scales leave about four bits."""
_MOST: Final = 127
"""Ranks at which a shared scale leaves each of them the codes -1, 0 and 1."""


@dataclass(frozen=True)
class GradientScheme:
    """How gradients travel.

    Attributes:
        source: who proposed it.
        what: one line for people.
        needs: of the backend, the machines or the memory.
        kind: "blocks" (messages with a scale for each block), "shared" (one scale of all ranks) or "torch" (PyTorch's own hook).
        hops: "one": an all-to-all among all ranks; "two": inside the nodes, then between them.
        feedback: what happens by default to what was lost.
        refuses: where it does not work, and why.
    """

    name: str
    source: str
    what: str
    needs: str
    kind: Literal["blocks", "shared", "torch"] = "blocks"
    bits: Bits = 8
    block: int = 256
    hops: Literal["one", "two"] = "one"
    feedback: Feedback = "none"
    refuses: str = "nothing"

    def codec(self, bits: Bits | None, block: int | None, rounding: Rounding | None, feedback: Feedback) -> BlockCodec:
        """The codec with the user's wishes. Below 8 bits it rounds stochastically unless errors are fed back."""
        width = self.bits if bits is None else bits
        noisy = width in (2, 4) and feedback == "none"
        how: Rounding = rounding or ("stochastic" if noisy else "nearest")
        # bfloat16 holds every gradient that float32 does; float16 loses those of scaled losses at both ends.
        return BlockCodec(width, self.block if block is None else block, rounding=how, side="bfloat16", propagate=True)


GRADIENT_SCHEMES: Final[Mapping[str, GradientScheme]] = MappingProxyType(
    {
        scheme.name: scheme
        for scheme in (
            GradientScheme(
                "int8", "LightSeq gradient communication quantization; Wang et al. 2021 (NAACL), arXiv:2110.05722",
                "int8 codes on scales that all ranks share, summed by an ordinary all-reduce", "two all-reduces, a maximum of float32 and a sum of int8", kind="shared", block=1024,
                refuses="more than 127 ranks: none of int8 would be left to each; it warns beyond 16",
            ),
            GradientScheme("block8", "Wang et al. 2023, arXiv:2306.10209", "block-wise int8: all-to-all, mean, all-gather", "an all-to-all of bytes"),
            GradientScheme("block4", "Wang et al. 2023, arXiv:2306.10209", "block-wise int4: all-to-all, mean, all-gather", "an all-to-all of bytes", bits=4),
            GradientScheme(
                "qgz", "ZeRO++; Wang et al. 2023, arXiv:2306.10209",
                "block-wise int4 in two hops: all-to-all inside the nodes, then between them", "per_node, or torchrun's LOCAL_WORLD_SIZE", bits=4, hops="two",
                refuses="nodes of unequal size",
            ),
            GradientScheme(
                "onebit", "1-bit Adam; Tang et al. 2021, arXiv:2102.02888",
                "signs with the mean magnitude of each block, errors fed back at the worker and at the server", "four bytes of memory for every gradient and rank", bits=1, block=4096, feedback="ef",
                refuses="compression without error feedback: it does not converge",
            ),
            GradientScheme(
                "powersgd", "Vogels et al. 2019, arXiv:1905.13727; the hook is PyTorch's own",
                "low-rank factors of each gradient", "four bytes of memory for every gradient and rank", kind="torch", feedback="ef", refuses="bits, block, rounding and error_feedback: it has its own",
            ),
        )
    }
)  # fmt: skip
"""Name → scheme."""


def check_world(scheme: GradientScheme, topology: Topology) -> None:
    """Refuses a world that a scheme cannot take, and warns of one that it takes badly.

    Raises:
        SchemeError: more ranks than int8 sums can hold.
    """
    if scheme.kind != "shared":
        return
    if topology.world > _MOST:
        raise SchemeError(
            f"{scheme.name} takes up to {_MOST} ranks, since the sum of their codes must fit int8, got {topology.world}. Use qgz."
        )
    if topology.world > _FEW:
        warnings.warn(
            f"With {topology.world} ranks, {scheme.name} leaves each {effective_bits(topology.world):.2f} effective bits. Use qgz beyond {_FEW}.",
            RuntimeWarning,
            stacklevel=3,
        )
