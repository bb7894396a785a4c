"""Schemes: what one tensor becomes, what the inputs of a layer become, and what one layer becomes.

Owns: `Scheme` (format + granularity + zero point + how scales and offsets are stored), its `Table` (learned values), `Apart` (what
stays out of the codes) and `Turned` (another basis), `ActivationScheme` (a scheme with the moment at which its scales are known) and `LayerScheme` (weights, inputs,
outputs, key/value cache). Their text form, `str`, is the grammar that `arrondi.formats.grammar` reads.

A scheme says nothing of *how* its codes and scales are chosen: that is the method's business.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Literal

from arrondi.arguments import check_fields
from arrondi.errors import SchemeError
from arrondi.formats.format import Format
from arrondi.formats.granularity import (
    Granularity,
    PerBlock,
    PerChannel,
    PerFlat,
    PerGroup,
    PerRun,
    PerTensor,
    PerToken,
)

ScaleType = Literal["float32", "bfloat16", "float16", "e8m0"]
OffsetType = Literal["float32", "bfloat16", "float16"]
ZeroPoint = Literal["none", "integer", "float"]
Dynamic = bool | Literal["local"]

PLAIN: Final = ("float32", "bfloat16", "float16")
"""Storage types that are ordinary floating-point numbers."""


TableType = Literal["int8", "float16", "bfloat16", "float32"]
"""How an entry of a table is stored; int8 counts in steps of 1/128."""


@dataclass(frozen=True)
class Table:
    """The tables of a look-up format.

    Attributes:
        rows: rows of the matrix that share a table; 0: all of them.
        stored: type of an entry. An int8 entry t means t/128, so that products with a table are integer products.
    """

    rows: int = 1
    stored: TableType = "int8"

    def __post_init__(self) -> None:
        check_fields(self)
        if self.rows < 0:
            raise SchemeError(f"A table serves some rows (1, 2, …) or all of them (0), got {self.rows}.")

    def count(self, rows: int) -> int:
        """How many tables a matrix of so many rows has."""
        return -(-rows // self.rows) if self.rows else min(rows, 1)

    def __str__(self) -> str:
        return f"t:{self.stored}" + ("" if self.rows == 1 else f":{self.rows}" if self.rows else ":all")


@dataclass(frozen=True)
class Apart:
    """Numbers that stay out of the codes of a matrix, because they would spoil the grid of the others.

    Attributes:
        what: "columns" (input features with outliers) or "elements" (single weights).
        count: of columns, of each matrix; or of elements, of the tensor.
        stored: type of their values.
    """

    what: Literal["columns", "elements"]
    count: int
    stored: OffsetType = "float32"

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 < self.count < 2**31:
            raise SchemeError(f"1 to 2³¹ {self.what} are kept apart, got {self.count}. For none leave it out.")

    def __str__(self) -> str:
        return f"{self.what}:{self.count}" + ("" if self.stored == "float32" else f":{self.stored}")


@dataclass(frozen=True)
class Turned:
    """The basis in which a matrix is rounded: both sides multiplied by signs, then by Hadamard matrices in blocks.

    Rounding then sees numbers that look normal, whatever the weights and inputs were (incoherence processing: Tseng et al. 2024,
    arXiv:2402.04396). A side is turned in the largest blocks, powers of two up to `block`, that divide it.

    Attributes:
        block: the largest block, a power of two.
        seed: of the signs, which are then not stored; None: the tensor brings numbers for rows and columns instead, float16.
    """

    block: int = 128
    seed: int | None = 0

    def __post_init__(self) -> None:
        check_fields(self)
        if self.block < 2 or self.block & (self.block - 1) or self.block > 2**20:
            raise SchemeError(f"Both sides are turned in blocks of a power of two, got {self.block}. Use 128.")
        if self.seed is not None and not 0 <= self.seed < 2**31:
            raise SchemeError(f"Signs are drawn from a seed of 0 to 2³¹ - 1, got {self.seed}.")

    def __str__(self) -> str:
        return f"rht{self.block}" + (":sides" if self.seed is None else f":{self.seed}" if self.seed else "")


@dataclass(frozen=True)
class Scheme:
    """What one tensor becomes.

    Attributes:
        format: the number format of the codes.
        granularity: which elements share a scale.
        zero_point: "none" (symmetric), "integer" (asymmetric: zero is a code) or "float" (an offset: x ≈ scale·value + offset).
        scale: storage type of the scales, or a scheme by which the scales are quantized in turn (double quantization,
            NVFP4's fp8 block scales, super-blocks).
        offset: storage type of the offsets, or a scheme by which they are quantized in turn; of zero_point="float" only.
        signed: whether a scale may be negative, which mirrors the grid. None is the usual answer for its storage: plain
            floating-point scales may, powers of two and quantized scales may not.
        table: of a look-up format, who shares its tables and how they are stored; None for every other format.
        apart: what is kept apart; None: nothing.
        turned: the basis in which codes and scales are; None: the tensor's own.
    """

    format: Format
    granularity: Granularity = PerChannel()
    zero_point: ZeroPoint = "none"
    scale: ScaleType | Scheme = "float32"
    offset: OffsetType | Scheme = "float32"
    signed: bool | None = None
    table: Table | None = None
    apart: Apart | None = None
    turned: Turned | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        self._check_trellis()
        if self.format.learned and self.table is None:
            object.__setattr__(self, "table", Table())
        if self.table is not None and not self.format.learned:
            raise SchemeError(
                f"{self.format} has values of its own and no table ('t:…'). Use lut{self.format.bits}, or drop it."
            )
        if self.format.learned and (
            self.scale not in PLAIN or self.offset not in PLAIN or isinstance(self.granularity, PerBlock)
        ):
            raise SchemeError(
                f"Look-up tables go with plain scales of groups, channels or tensors, got {self.granularity} and scales stored as {self.scale}."
            )
        if self.zero_point == "integer" and self.format.kind != "integer":
            raise SchemeError(
                f"A zero point needs an integer format, got {self.format} with a zero point ('asym'). "
                "Use 'offset', or neither: float formats and codebooks have their own zero."
            )
        if self.scale == "e8m0" and self.zero_point != "none":
            raise SchemeError("Power-of-two scales (e8m0) go with symmetric formats only. Drop the zero point.")
        if self.scale == "e8m0" and self.signed:
            raise SchemeError("Power-of-two scales (e8m0) have no sign. Drop 'signed'.")
        if self.offset != "float32" and self.zero_point != "float":
            raise SchemeError(
                f"Offsets stored as {self.offset} need 'offset', got a zero point of the kind {self.zero_point!r}."
            )
        if self.signed is not None and self.signed == self._usually_signed:
            object.__setattr__(self, "signed", None)  # one meaning has one value

    def _check_trellis(self) -> None:
        if self.turned is not None and self.format.trellis is None:
            raise SchemeError(
                f"Both sides are turned ('rht') of trellises, got {self.format}. Use tcq{self.format.bits}."
            )
        if self.format.trellis is None:
            return
        plain = self.zero_point == "none" and self.scale in PLAIN and self.apart is None
        if not plain or not isinstance(self.granularity, PerChannel | PerTensor) or self.granularity == PerChannel(1):
            raise SchemeError(
                f"A trellis has one plain scale a row or a tensor and nothing else, got {self.format} with more. "
                f"Example: w={self.format}/channel/float16/rht128."
            )

    @property
    def _usually_signed(self) -> bool:
        return self.scale in PLAIN

    @property
    def symmetric(self) -> bool:
        """True when the real zero is not stored."""
        return self.zero_point == "none"

    @property
    def nearest(self) -> bool:
        """Whether rounding numbers one by one makes it: no values are learned, none are along a ring, and nothing is kept apart."""
        return not self.format.learned and self.format.trellis is None and self.apart is None

    @property
    def shared_offset(self) -> bool:
        """Whether all offsets are one number, of which only the sign is stored for each: it is the mean of what is quantized."""
        return (
            isinstance(self.offset, Scheme)
            and self.offset.granularity == PerTensor()
            and self.offset.format.levels == 2
        )

    @property
    def signed_scales(self) -> bool:
        """Whether a scale may be negative."""
        return self._usually_signed if self.signed is None else self.signed

    def __str__(self) -> str:
        match self.granularity:
            case PerTensor():
                where = "tensor"
            case PerChannel(axis):
                where = "channel" if axis == 0 else f"channel{axis}"
            case PerToken():
                where = "token"
            case PerGroup(size):
                where = f"g{size}"
            case PerRun(size):
                where = f"run{size}"
            case PerFlat(size):
                where = f"flat{size}"
            case PerBlock(rows, columns):
                where = f"b{rows}x{columns}"
        zero = {"none": "", "integer": "/asym", "float": "/offset"}[self.zero_point]
        scale = "" if self.scale == "float32" else f"/{self.scale}"
        offset = "" if self.offset == "float32" else f"/o:{self.offset}"
        if isinstance(self.scale, Scheme):
            scale = f"/s:({self.scale})"
        if isinstance(self.offset, Scheme):
            offset = f"/o:({self.offset})"
        sign = {None: "", True: "/signed", False: "/unsigned"}[self.signed]
        rest = "".join(f"/{part}" for part in (self.table, self.apart, self.turned) if part is not None)
        return f"{self.format}/{where}{zero}{scale}{offset}{sign}{rest}"


@dataclass(frozen=True)
class ActivationScheme:
    """What the inputs or outputs of a layer, or its key/value cache, become.

    Attributes:
        scheme: what each tensor becomes.
        dynamic: True: the scales follow each tensor. False: they are stored (static) and serve every tensor. "local": the
            outer scale of quantized scales is stored, the inner scales follow each tensor (NVFP4).
        spread: size of the blocks of channels that go through a Hadamard transform before they are rounded, 0 without one;
            the weight is stored for channels that have.
        outliers: features that hold a number of at least this size, in any position of a tensor, keep their numbers; None: none do.
    """

    scheme: Scheme
    dynamic: Dynamic = True
    spread: int = 0
    outliers: float | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.dynamic == "local" and not isinstance(self.scheme.scale, Scheme):
            raise SchemeError(
                f"Local scales are quantized by a stored outer scale, and those of {self.scheme} are not quantized. "
                "Use 'dynamic' or 'static'."
            )
        if self.outliers is not None and self.spread:
            raise SchemeError(
                "A Hadamard transform leaves no outliers to keep. Drop 'outliers' (llm-int8), or the rotation."
            )
        if self.outliers is not None and not (self.outliers >= 0 and self.dynamic is True):
            raise SchemeError(
                f"Outliers are found in each tensor, by a size of at least 0, and go with dynamic scales, got {self.outliers} and {self.scheme}."
            )
        if self.dynamic is False and isinstance(
            self.scheme.granularity, PerToken | PerGroup | PerBlock | PerRun | PerFlat
        ):
            raise SchemeError(
                f"Static scales are known before the tensors are, so they cannot follow single tokens, got {self.scheme}. "
                "Use 'tensor' (one scale) or 'dynamic'."
            )
        if self.dynamic is False and (isinstance(self.scheme.scale, Scheme) or isinstance(self.scheme.offset, Scheme)):
            raise SchemeError(
                f"A static scale is one number, and those of {self.scheme} are quantized together. Use 'local' or 'dynamic'."
            )
        if self.spread < 0:
            raise SchemeError(f"Channels are spread in blocks of at least one, got {self.spread}. Use 0 to leave them.")

    @property
    def rounding(self) -> ActivationScheme:
        """What becomes of channels that have been spread."""
        return replace(self, spread=0) if self.spread else self

    def __str__(self) -> str:
        when = {True: "", False: "/static", "local": "/local"}[self.dynamic]
        outliers = "" if self.outliers is None else f"/outliers:{self.outliers:.15g}"
        return f"{self.scheme}{when}{f'/h{self.spread}' if self.spread else ''}{outliers}"


@dataclass(frozen=True)
class LayerScheme:
    """What one layer becomes: its weights and, unless None, what enters it, what leaves it and its key/value cache."""

    weights: Scheme
    inputs: ActivationScheme | None = None
    outputs: ActivationScheme | None = None
    kv: ActivationScheme | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if isinstance(self.weights.granularity, PerFlat):
            raise SchemeError(
                f"Blocks of the flattened tensor are for scales, not for weights, got {self.weights}. Use g{self.weights.granularity.size}."
            )
        if self.inputs is not None and self.inputs.spread and self.weights.apart is not None:
            raise SchemeError(
                "Columns with outliers are kept of inputs that are not transformed. Drop llm-int8, or the rotation."
            )
        static = self.inputs is not None and self.inputs.dynamic is False
        if static and self.inputs is not None and not isinstance(self.inputs.scheme.granularity, PerTensor):
            raise SchemeError(
                f"A static scale of inputs is one scale for a whole tensor, got {self.inputs}. Use 'tensor' or 'dynamic'."
            )

    def with_scale(self, scale: ScaleType, instead: tuple[str, ...] = PLAIN) -> LayerScheme:
        """The same scheme with its plain floating-point scales, those of weights and of static inputs, stored in another type.

        Args:
            scale: the type.
            instead: types that give way to it.
        """
        weights, inputs = self.weights, self.inputs
        if weights.scale in instead:
            weights = replace(weights, scale=scale)
        if inputs is not None and inputs.dynamic is False and inputs.scheme.scale in instead:
            inputs = replace(inputs, scheme=replace(inputs.scheme, scale=scale))
        return replace(self, weights=weights, inputs=inputs)

    def with_group_size(self, size: int) -> LayerScheme:
        """The same scheme with another group size (-1: one group per output channel).

        Raises:
            SchemeError: the block size belongs to the format (MX, NVFP4).
        """
        if self.weights.scale == "e8m0" or isinstance(self.weights.scale, Scheme):
            raise SchemeError(f"The block size of {self.weights} is fixed by the format. Drop --group-size.")
        granularity = PerChannel() if size == -1 else PerGroup(size)
        return replace(self, weights=replace(self.weights, granularity=granularity))

    def __str__(self) -> str:
        parts = {"w": self.weights, "a": self.inputs, "o": self.outputs, "kv": self.kv}
        return ",".join(f"{key}={part}" for key, part in parts.items() if part is not None)
