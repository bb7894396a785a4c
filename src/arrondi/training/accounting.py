"""What an encoder of one bit costs beside a float one: pure arithmetic. Owns: `Encoder`, `Cost`, `float_cost`, `one_bit_cost`.

Source: Qin et al. 2022, arXiv:2203.06390, which prints 418 MB against 13.4 MB (31.2×) and 22.5 G operations against 0.4 G (56.3×) for a
BERT of 12 layers and 128 tokens; the readme of its code prints 59.2× for operations. Those are quotients of rounded numbers. What is
counted here, and what follows:

* bytes (31.27×): every matrix, tables and pooler included, takes one bit a weight, and every output of a matrix in the blocks one float32, the
  bias or the scale that takes its place; norms are left out as in the paper's figure. `everything=True` counts what this package
  really stores: tables of positions and types and the pooler in float32, scales beside biases, and norms; then it is 23.8×.
* operations (56.07×): a multiplication and an addition are two, 64 operations on bits are one (the convention of Bi-Real Net, Liu et al. 2018,
  arXiv:1808.00278). Beside products: a scale and a bias for each output, 7 for each number that is normed (mean, variance, division, gain, bias), 1 for
  each residual, each value of the activation function and each scaling and masking of a score, 3 for each score in a softmax.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from arrondi.errors import SchemeError

BITS_A_WORD: Final = 64
"""Operations on bits that count as one."""

_NORM, _SOFTMAX, _SCORE = 7, 3, 2


class Encoder(NamedTuple):
    """The sizes of a BERT."""

    layers: int = 12
    width: int = 768
    inner: int = 3072
    heads: int = 12
    words: int = 30522
    positions: int = 512
    types: int = 2

    @classmethod
    def of(cls, config: Any) -> Encoder:
        """The sizes in a config of transformers.

        Raises:
            SchemeError: it lacks one.
        """
        names = (
            "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size", "max_position_embeddings", "type_vocab_size",
        )  # fmt: skip
        missing = [n for n in names if not isinstance(getattr(config, n, None), int)]
        if missing:
            raise SchemeError(f"The sizes of an encoder are in its config, and {missing[0]} is not. Give an Encoder.")
        return cls(*(getattr(config, n) for n in names))

    @property
    def matrices(self) -> int:
        """Weights of the matrices in the blocks."""
        return self.layers * (4 * self.width**2 + 2 * self.width * self.inner)

    @property
    def outputs(self) -> int:
        """Outputs of those matrices: as many biases, and scales of rows."""
        return self.layers * (5 * self.width + self.inner)

    @property
    def norms(self) -> int:
        """Gains and biases of all norms."""
        return (2 * self.layers + 1) * 2 * self.width


class Cost(NamedTuple):
    """Bytes of the parameters; operations of one pass over one text."""

    bytes: float
    operations: float


def float_cost(encoder: Encoder = Encoder(), tokens: int = 128) -> Cost:
    """A float32 encoder."""
    e = encoder
    tables = (e.words + e.positions + e.types) * e.width
    parameters = e.matrices + e.outputs + e.norms + tables + e.width * (e.width + 1)
    scores = e.layers * e.heads * tokens
    rest = e.outputs + scores * (_SOFTMAX + _SCORE)
    return Cost(4.0 * parameters, 2.0 * _products(e, tokens) + tokens * (rest + _beside(e)))


def one_bit_cost(encoder: Encoder = Encoder(), tokens: int = 128, *, everything: bool = False) -> Cost:
    """BiBERT's: weights, tables, activations and attention of one bit.

    Args:
        everything: count what is float in this package and was left out of the paper's figure.
    """
    e = encoder
    others = (e.positions + e.types) * e.width + e.width**2
    bits = e.matrices + e.words * e.width + (0 if everything else others)
    numbers = e.outputs + e.width + (others + e.outputs + e.words + e.norms if everything else 0)
    scores = e.layers * e.heads * tokens
    rest = 2 * e.outputs + scores * _SCORE
    return Cost(bits / 8 + 4.0 * numbers, 2.0 * _products(e, tokens) / BITS_A_WORD + tokens * (rest + _beside(e)))


def _products(e: Encoder, tokens: int) -> int:
    """Multiplications of all matrices and of both products of attention."""
    return tokens * e.matrices + e.layers * 2 * tokens**2 * e.width


def _beside(e: Encoder) -> int:
    """Operations on one token that both have: norms, residuals, the activation function."""
    return (2 * e.layers + 1) * _NORM * e.width + e.layers * (2 * e.width + e.inner)
