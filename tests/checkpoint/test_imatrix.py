"""llama.cpp's two files of importance matrices: against the package gguf, and against files written by hand."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from arrondi.checkpoint.gguf_names import GGUFNames, blocks_of
from arrondi.checkpoint.imatrix import Importance, ImportanceMatrix, read_imatrix, write_imatrix
from arrondi.errors import DataError, FileFormatError

DENSE = Importance(torch.tensor([[8.0, 2.0, 0.0]]), torch.tensor([4.0]))
STACK = Importance(torch.tensor([[6.0, 3.0], [0.0, 0.0], [5.0, 1.0]]), torch.tensor([3.0, 0.0, 5.0]))
MATRIX = ImportanceMatrix({"blk.0.attn_q.weight": DENSE, "blk.1.ffn_up_exps.weight": STACK}, ("a.txt", "b.txt"), 2, 3)


def same(found: Importance, wanted: Importance) -> bool:
    return torch.equal(found.sums, wanted.sums) and torch.equal(found.counts, wanted.counts)


def test_gguf_is_what_its_own_package_reads(tmp_path: Path) -> None:
    write_imatrix(tmp_path / "a.gguf", MATRIX)
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    facts = {n: f.contents() for n, f in reader.fields.items() if not n.startswith("GGUF.")}
    assert facts == {
        "general.type": "imatrix",
        "imatrix.datasets": ["a.txt", "b.txt"],
        "imatrix.chunk_count": 2,
        "imatrix.chunk_size": 3,
    }
    found = {t.name: (t.shape.tolist(), t.data) for t in reader.tensors}
    # ne[0] is the row: sums (n, matrices), counts (1, matrices), both float32.
    assert found["blk.1.ffn_up_exps.weight.in_sum2"][0] == [2, 3]
    assert found["blk.1.ffn_up_exps.weight.counts"][0] == [1, 3]
    np.testing.assert_array_equal(found["blk.0.attn_q.weight.in_sum2"][1], [[8, 2, 0]])
    assert all(data.dtype == np.float32 for _, data in found.values()) and len(found) == 4


def test_gguf_comes_back(tmp_path: Path) -> None:
    write_imatrix(tmp_path / "a.gguf", MATRIX)
    again = read_imatrix(tmp_path / "a.gguf")
    assert again.entries.keys() == MATRIX.entries.keys()
    assert all(same(again.entries[n], e) for n, e in MATRIX.entries.items())
    assert (again.datasets, again.chunks, again.chunk_size) == (("a.txt", "b.txt"), 2, 3)
    assert not list(tmp_path.glob("*.part"))


def test_the_legacy_file_byte_by_byte(tmp_path: Path) -> None:
    """Means of x² times calls (windows, rounded up); ones where no row was summed."""
    write_imatrix(tmp_path / "a.dat", MATRIX)
    by_hand = b"".join([
        struct.pack("<i", 2),
        struct.pack("<i", 19), b"blk.0.attn_q.weight", struct.pack("<ii3f", 2, 3, 4.0, 1.0, 0.0),
        struct.pack("<i", 24), b"blk.1.ffn_up_exps.weight", struct.pack("<ii6f", 2, 6, 4.0, 2.0, 2.0, 2.0, 2.0, 0.4),
        struct.pack("<i", 2), struct.pack("<i", 5), b"b.txt",
    ])  # fmt: skip
    assert (tmp_path / "a.dat").read_bytes() == by_hand
    found = read_imatrix(tmp_path / "a.dat")
    assert found.chunks == 2 and found.datasets == ("b.txt",)
    mean = found.entries["blk.0.attn_q.weight"].mean(3)
    assert mean is not None and mean.tolist() == [2.0, 0.5, 0.0]
    stack = [found.entries["blk.1.ffn_up_exps.weight"].mean(2, i, 3) for i in range(3)]
    torch.testing.assert_close(
        torch.stack([s for s in stack if s is not None]), torch.tensor([[2, 1], [1, 1], [1, 0.2]])
    )


def test_old_files_end_after_their_weights(tmp_path: Path) -> None:
    raw = struct.pack("<ii", 1, 1) + b"x" + struct.pack("<ii1f", 3, 1, 6.0)
    (tmp_path / "imatrix").write_bytes(raw)
    found = read_imatrix(tmp_path / "imatrix")
    mean = found.entries["x"].mean(1)
    assert mean is not None and mean.item() == 2.0 and found.chunks == 0 and found.datasets == ()


def test_means_are_those_of_the_matrix_and_ones_where_nothing_was_seen() -> None:
    assert torch.equal(STACK.mean(2, 0, 3), torch.tensor([2.0, 1.0]))  # type: ignore[arg-type]
    assert torch.equal(STACK.mean(2, 1, 3), torch.ones(2))  # type: ignore[arg-type]
    assert STACK.count(1) == 0 and STACK.count(2) == 5
    assert DENSE.mean(4) is None and STACK.mean(2, 0, 4) is None and DENSE.mean(3, 0, 2) is None


def model_file(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def without_counts(path: Path) -> None:
    plain: Any = type("Writer", (gguf.GGUFWriter,), {"add_architecture": lambda self: None})
    writer = plain(path, "")
    writer.add_type("imatrix")
    writer.add_tensor("blk.0.attn_q.weight.in_sum2", np.ones((1, 3), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def written(path: Path, **numbers: float) -> None:
    entry = Importance(torch.tensor([[1.0, numbers["value"]]]), torch.tensor([2.0]))
    write_imatrix(path, ImportanceMatrix({"blk.0.attn_q.weight": entry}, ("a",), 1, 8))


BROKEN: dict[str, tuple[Any, str]] = {
    "a model": (model_file, "of the type 'model', not an importance matrix"),
    "sums alone": (without_counts, "blk.0.attn_q.weight has sums and no counts"),
    "half a gguf": (lambda p: (written(p, value=1.0), p.write_bytes(p.read_bytes()[:150])), "in the middle of its header"),
    "half a legacy file": (lambda p: p.write_bytes(struct.pack("<ii", 1, 4) + b"name"), "ends early"),
    "text": (lambda p: p.write_text("Once upon a time there was a matrix."), "is no importance matrix"),
    "nothing": (lambda p: p.write_bytes(b""), "ends early"),
    "no weights": (lambda p: p.write_bytes(struct.pack("<i", 0)), "holds no weight"),
    "more bytes": (lambda p: p.write_bytes(struct.pack("<ii", 1, 1) + b"x" + struct.pack("<iifii", 1, 1, 1.0, 1, 0) + b"!"), "goes on after its end"),
    "NaN": (lambda p: written(p, value=float("nan")), "blk.0.attn_q.weight holds numbers below 0, NaN"),
    "below zero": (lambda p: written(p, value=-1.0), "blk.0.attn_q.weight holds numbers below 0, NaN"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_files_that_are_none(kind: str, tmp_path: Path) -> None:
    make, words = BROKEN[kind]
    make(tmp_path / "x.gguf")
    with pytest.raises((FileFormatError, DataError), match=words):
        read_imatrix(tmp_path / "x.gguf")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="no such file"):
        read_imatrix(tmp_path / "gone.gguf")


NAMES = {
    ("llama", "model.layers.3.self_attn.q_proj.weight"): ("blk.3.attn_q.weight",),
    ("qwen2_vl", "model.language_model.layers.1.mlp.down_proj.weight"): ("blk.1.ffn_down.weight",),
    ("phi3", "model.layers.0.mlp.gate_up_proj.weight"): ("blk.0.ffn_up.weight",),
    ("mixtral", "model.layers.0.block_sparse_moe.experts.5.w2.weight"): ("blk.0.ffn_down_exps.weight",),
    ("qwen3_moe", "model.layers.2.mlp.experts.7.up_proj.weight"): ("blk.2.ffn_up_exps.weight",),
    ("gpt2", "h.1.mlp.c_fc.weight"): ("blk.1.ffn_up.weight",),
    ("bert", "bert.encoder.layer.0.attention.self.query.weight"): ("blk.0.attn_q.weight",),
    ("llama", "lm_head.weight"): ("output.weight",),
    ("opt", "model.decoder.layers.0.fc1.weight"): (),
}


@pytest.mark.parametrize(("kind", "tensor"), NAMES)
def test_names_are_those_of_the_package(kind: str, tensor: str) -> None:
    assert GGUFNames(kind).of(tensor) == NAMES[kind, tensor]


def test_names_that_exist_and_stacks_of_two_matrices() -> None:
    names = GGUFNames("qwen3_moe")
    assert names.of("model.layers.0.mlp.experts.gate_up_proj")[1:] == (
        "blk.0.ffn_gate_exps.weight",
        "blk.0.ffn_up_exps.weight",
    )
    assert names.knows("blk.7.attn_k_b.weight") and names.knows("output.weight")
    assert not names.knows("blk.7.attn_z.weight") and not names.knows("decoder.weight")
    assert blocks_of({"text_config": {"num_hidden_layers": 3}}) == 3 and blocks_of({"n_layer": 2}) == 2
