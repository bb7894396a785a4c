"""Rounding the weights of one block, or one tensor without a model around it.

Owns: `round_tensor` (a stored tensor by itself) and `BlockRounder` (the weights of a block with what calibration learnt of their
inputs). Both give QTensors in the orientation and shape in which the tensor is stored.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from arrondi.calibration import SecondMoment
from arrondi.errors import DataError
from arrondi.formats import PerBlock, PerChannel, PerGroup, PerTensor, Scheme
from arrondi.model import Product, Skeleton, Slot, find_stages, release, watch_products
from arrondi.pipeline.plan import PlannedTensor
from arrondi.rounding import Method, get_method
from arrondi.tensor.qtensor import QTensor
from arrondi.tensor.quantizers import knows, lost

Forward = Callable[[], object]
"""Sends one calibration batch through the block."""

_CHUNK = 1 << 19
"""Elements of a tensor that are rounded at a time when rows do not depend on each other."""


_ERROR_ROWS = 1024
"""Rows whose output error is computed at a time."""


_BLIND: tuple[Method, Mapping[str, Any]] = (get_method("rtn"), {"range": "search"})
"""Instead of a method that needs calibration, where nothing is known of the inputs."""


class _Enough(Exception):
    """Every weight of the stage has seen its input; the rest of the forward pass is not needed."""


@dataclass
class Rounded:
    """One stored tensor, rounded, with what it cost."""

    tensor: PlannedTensor
    q: QTensor
    sqnr_db: float
    output_error: float | None = None
    tokens: int | None = None

    def row(self) -> dict[str, Any]:
        """Its line in `report.json`."""
        assert self.tensor.rule is not None
        return {
            "name": self.tensor.name,
            "scheme": str(self.tensor.scheme),
            "method": self.tensor.rule.method,
            "bits_per_weight": round(self.q.bits_per_weight, 4),
            "sqnr_db": round(self.sqnr_db, 3) if math.isfinite(self.sqnr_db) else None,
            "output_error": self.output_error,
            "calibration_tokens": self.tokens,
        }


def sqnr(weight: torch.Tensor, restored: torch.Tensor) -> float:
    """Signal to quantization noise ratio in dB; infinite for an exact copy."""
    noise = float((weight - restored).square().sum(dtype=torch.float64))
    return decibels(noise, float(weight.square().sum(dtype=torch.float64)))


def decibels(noise: float, signal: float) -> float:
    """The ratio of two sums of squares."""
    return math.inf if noise == 0 else 10 * math.log10(max(signal, 1e-300) / noise)


def losses(weight: torch.Tensor, q: QTensor) -> tuple[float, float]:
    """Σ (w - ŵ)² and Σ w² of a rounded tensor."""
    found = lost(weight, q.codes, q.scheme, q.grid)
    if found is not None:
        return found
    weight = weight.float()
    noise = float(torch.linalg.vector_norm(q.dequantize().sub_(weight))) ** 2
    return noise, float(torch.linalg.vector_norm(weight)) ** 2


def rowwise(scheme: Scheme) -> bool:
    """Whether each row of a matrix is rounded by itself."""
    return scheme.granularity == PerChannel() or (
        isinstance(scheme.granularity, PerGroup) and not isinstance(scheme.scale, Scheme)
    )


def stackable(scheme: Scheme) -> bool:
    """Whether matrices that are stored on top of each other can be rounded one by one: no scale covers two of them."""
    return rowwise(scheme) or (isinstance(scheme.granularity, PerBlock) and not isinstance(scheme.scale, Scheme))


def round_tensor(tensor: PlannedTensor, weight: torch.Tensor) -> Rounded:
    """Round a stored tensor without knowing its inputs.

    Args:
        weight: as stored, any float dtype; a stack (E, a, b) is rounded as the matrix (E·a, b).
    """
    assert tensor.rule is not None and tensor.scheme is not None
    scheme = tensor.scheme.weights
    method, options = get_method(tensor.rule.method), tensor.rule.options
    if method.needs_moment:
        method, options = _BLIND
    matrix = weight.reshape(tensor.placed.matrix_shape)
    chunked = rowwise(scheme) and not knows(matrix, scheme)
    step = max(_CHUNK // matrix.shape[1], 1) if chunked else len(matrix)
    parts, noise, signal = [], 0.0, 0.0
    for start in range(0, len(matrix), step):
        part = matrix[start : start + step]
        q = method.run(part.float() if chunked else part, scheme, None, name=tensor.name, **options)
        lost, had = losses(part, q)
        noise, signal = noise + lost, signal + had
        parts.append(q)
    return Rounded(tensor, stack_rows(parts), decibels(noise, signal))


def stack_rows(parts: list[QTensor]) -> QTensor:
    """QTensors of the same row-wise scheme on top of each other."""
    if len(parts) == 1:
        return parts[0]

    def cat(pick: Callable[[QTensor], torch.Tensor | None]) -> torch.Tensor | None:
        found = [p for q in parts if (p := pick(q)) is not None]
        return torch.cat(found) if found else None

    codes, scale = cat(lambda q: q.codes), cat(lambda q: q.real_scale)
    assert codes is not None and scale is not None
    return QTensor(codes, scale, cat(lambda q: q.zero_point), cat(lambda q: q.real_offset), parts[0].scheme)


def split_rows(q: QTensor, sizes: list[int]) -> list[QTensor]:
    """The inverse of `stack_rows`."""
    if len(sizes) == 1:
        return [q]

    def split(part: torch.Tensor | None) -> list[torch.Tensor | None]:
        return [None] * len(sizes) if part is None else list(part.split(sizes))

    parts = zip(split(q.codes), split(q.real_scale), split(q.zero_point), split(q.real_offset), strict=True)
    return [QTensor(c, s, z, o, q.scheme, q.group_index) for c, s, z, o in parts]  # type: ignore[arg-type]


def transposed(q: QTensor, scheme: Scheme) -> QTensor:
    """The transpose of a matrix QTensor, described by `scheme`, which must mean the same tiles seen from the side."""
    scale = transposed(q.scale, q.scale.scheme) if isinstance(q.scale, QTensor) else q.scale.T.contiguous()
    zero = None if q.zero_point is None else q.zero_point.T.contiguous()
    offset = None if (real := q.real_offset) is None else real.T.contiguous()
    return QTensor(q.codes.T.contiguous(), scale, zero, offset, scheme)


def transposed_scheme(scheme: Scheme) -> Scheme:
    """The scheme that lays the same tiles on the transposed matrix."""
    match scheme.granularity:
        case PerGroup(size):
            return replace(scheme, granularity=PerBlock(size, 1))
        case PerBlock(rows, columns):
            return replace(scheme, granularity=PerBlock(columns, rows))
        case PerChannel(axis):
            return replace(scheme, granularity=PerChannel(1 - axis % 2))
        case PerTensor():
            return scheme
    raise AssertionError(f"{scheme.granularity} is no granularity of weights")


@dataclass
class _Piece:
    """One matrix to be rounded: a tensor, its place, and the piece of weight in stored orientation."""

    tensor: PlannedTensor
    slot: Slot
    weight: torch.Tensor


class BlockRounder:
    """Rounds the weights of the parameters that a block multiplies by, stage by stage.

    After a stage the parameters hold the rounded values, so the next stage is calibrated on what the rounded weights give
    ("true sequential" order).
    """

    def __init__(self, skeleton: Skeleton, tensors: list[PlannedTensor], forwards: Sequence[Forward]) -> None:
        """
        Args:
            tensors: the stored tensors to be rounded; their parameters are filled.
            forwards: one for each calibration batch; empty without calibration.

        Raises:
            DataError: a weight is NaN or infinite.
        """
        self.skeleton, self.tensors, self.forwards = skeleton, tensors, forwards
        self.pieces: dict[str, list[_Piece]] = {}
        self.loose: list[PlannedTensor] = []
        for tensor in tensors:
            slots = skeleton.slots(tensor.name)
            assert tensor.scheme is not None
            if not slots or (slots[0].source_index is not None and not stackable(tensor.scheme.weights)):
                self.loose.append(tensor)
                continue
            for slot in slots:
                piece = _Piece(tensor, slot, self._weight(slot))
                if not bool(torch.isfinite(piece.weight).all()):
                    raise DataError(
                        f"{tensor.name}: the weights hold NaN or infinity. Repair the checkpoint, or leave the tensor out with --ignore."
                    )
                self.pieces.setdefault(self._main(slot.param), []).append(piece)
        self.results: dict[str, list[Rounded]] = {}

    def _main(self, param: str) -> str:
        return self.skeleton.names_of(param)[0]

    def _region(self, slot: Slot) -> torch.Tensor:
        param = self.skeleton.parameter(slot.param)
        matrix = param if slot.index is None else param[slot.index]
        return matrix[slot.rows, slot.columns]

    def _weight(self, slot: Slot) -> torch.Tensor:
        region = self._region(slot)
        return region.T if slot.flipped else region

    def round(self) -> list[Rounded]:
        """All tensors, rounded, in their given order; the parameters hold the rounded values."""
        sequential = any(get_method(t.rule.method).needs_moment for t in self.tensors if t.rule)
        if not self.forwards or not self.pieces:
            for param in self.pieces:
                self._round_param(param, True, {})
        else:
            params = {p: self.skeleton.parameter(p) for p in self.pieces}
            stages = find_stages(params, self.forwards[0])
            used = {p for s in stages for p in s.leaders}
            if not sequential and stages:
                leaders = {p: leader for s in stages for p, leader in s.leaders.items()}
                last = {p: r for s in stages for p, r in s.reduces_last.items()}
                stages = [type(stages[0])(leaders, last)]
            for stage in stages:
                moments = self._collect(stage.leaders, params)
                for leader in dict.fromkeys(stage.leaders.values()):
                    self._round_together(
                        [p for p, l in stage.leaders.items() if l == leader], stage.reduces_last, moments
                    )
            for param in self.pieces.keys() - used:
                self._round_param(param, True, {})
        return [self._joined(t) for t in self.tensors]

    def _collect(
        self, leaders: dict[str, str], params: dict[str, torch.Tensor]
    ) -> dict[tuple[str, int | None], SecondMoment]:
        """Second moments of the inputs of a stage, one for each leader (and each matrix of a fused parameter)."""
        moments: dict[tuple[str, int | None], SecondMoment] = {}
        wanted = set(leaders.values())
        # Which experts a batch reaches is not known beforehand, so fused parameters want the whole forward pass.
        countdown = len(wanted) if all(params[p].ndim == 2 for p in wanted) else 0
        seen: set[str] = set()

        def report(product: Product) -> None:
            if product.param not in wanted:
                return
            key = (product.param, product.matrix)
            if key not in moments:
                moments[key] = SecondMoment(product.x.shape[-1])
            moments[key].update(product.x)
            seen.add(product.param)
            if len(seen) == countdown:
                seen.clear()
                raise _Enough

        with watch_products({p: params[p] for p in wanted}, report):
            for forward in self.forwards:
                with contextlib.suppress(_Enough):
                    forward()
        return moments

    def _round_together(
        self, params: list[str], reduces_last: dict[str, bool], moments: dict[tuple[str, int | None], SecondMoment]
    ) -> None:
        """Round parameters that read the same input; those with the same rule and scheme in one sweep."""
        batches: dict[Any, list[_Piece]] = {}
        for param in params:
            for piece in self.pieces[param]:
                last = reduces_last[param] != piece.slot.flipped
                assert piece.tensor.rule is not None and piece.tensor.scheme is not None
                scheme = piece.tensor.scheme.weights
                alone = id(piece) if not last or not rowwise(scheme) else None
                key = (piece.slot.index, last, scheme, id(piece.tensor.rule), alone)
                batches.setdefault(key, []).append(piece)
        for (index, last, *_), pieces in batches.items():
            self._round_pieces(pieces, last, moments.get((params[0], index)))

    def _round_param(self, param: str, last: bool, moments: dict[tuple[str, int | None], SecondMoment]) -> None:
        for piece in self.pieces[param]:
            self._round_pieces([piece], last, moments.get((param, piece.slot.index)))

    def _round_pieces(self, pieces: list[_Piece], last: bool, moment: SecondMoment | None) -> None:
        tensor = pieces[0].tensor
        assert tensor.rule is not None and tensor.scheme is not None
        scheme, rule = tensor.scheme.weights, tensor.rule
        method = get_method(rule.method)
        options = rule.options
        if method.needs_moment and (moment is None or moment.tokens == 0):
            # No token reached it (an expert never chosen, a module never run): nothing is known of its inputs.
            (method, options), moment = _BLIND, None
        weight = pieces[0].weight if len(pieces) == 1 else torch.cat([p.weight for p in pieces])
        if last:
            q = method.run(weight, scheme, moment, name=tensor.name, **options)
        else:
            q = transposed(method.run(weight.T, transposed_scheme(scheme), moment, name=tensor.name, **options), scheme)
        restored = q.dequantize()
        error = None if moment is None else output_error(weight, restored, moment, last)
        tokens = None if not self.forwards else 0 if moment is None else moment.tokens
        sizes = [len(p.weight) for p in pieces]
        for piece, part, back in zip(pieces, split_rows(q, sizes), restored.split(sizes), strict=True):
            done = Rounded(piece.tensor, part, sqnr(piece.weight, back), error, tokens)
            self.results.setdefault(piece.tensor.name, []).append(done)
            region = self._region(piece.slot)
            region.copy_(back.T if piece.slot.flipped else back)
        release()

    def _whole(self, tensor: PlannedTensor) -> Rounded:
        """A tensor that cannot be rounded piece by piece is rounded blindly, and its parameters are made anew from it."""
        done = round_tensor(tensor, self.skeleton.tensor(tensor.name))
        self.skeleton.overrides[tensor.name] = done.q.dequantize().reshape(tensor.shape)
        params = self.skeleton.params_of[tensor.name]
        self.skeleton.drop(params)
        self.skeleton.fill(params)
        return done

    def _joined(self, tensor: PlannedTensor) -> Rounded:
        """The result of a tensor; a stored stack joins those of its matrices."""
        if tensor in self.loose:
            return self._whole(tensor)
        parts = self.results[tensor.name]
        if len(parts) == 1:
            return parts[0]
        errors = [p.output_error for p in parts if p.output_error is not None]
        tokens = [p.tokens for p in parts if p.tokens is not None]
        ratio = sum(p.sqnr_db for p in parts) / len(parts)
        return Rounded(
            tensor,
            stack_rows([p.q for p in parts]),
            ratio,
            sum(errors) / len(errors) if errors else None,
            min(tokens) if tokens else None,
        )


def output_error(weight: torch.Tensor, restored: torch.Tensor, moment: SecondMoment, last: bool = True) -> float:
    """‖X(W - Ŵ)ᵀ‖² / ‖XWᵀ‖² on the calibration inputs, from their second moment."""
    hessian = moment.matrix()
    if not last:
        weight, restored = weight.T, restored.T
    error = power = 0.0
    for rows, back in zip(weight.split(_ERROR_ROWS), restored.split(_ERROR_ROWS), strict=True):
        difference = rows - back
        error += float((difference @ hessian).mul_(difference).sum(dtype=torch.float64))
        power += float((rows @ hessian).mul_(rows).sum(dtype=torch.float64))
    return error / power if power > 0 else 0.0
