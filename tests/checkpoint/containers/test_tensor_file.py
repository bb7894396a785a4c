"""One safetensors file: what the package writes we read, what we write it reads, and what lies is refused in one sentence."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from arrondi.checkpoint import Entry, ShardPlan, ShardWriter, read_header, read_tensor
from arrondi.checkpoint.containers.tensor_file import DTYPE_NAMES, DTYPES, as_memory, encode_header, read_bytes
from arrondi.errors import FileFormatError

SHAPES: dict[str, tuple[int, ...]] = {
    "scalar": (), "one": (1,), "row": (5,), "matrix": (3, 7), "stack": (2, 3, 5), "empty": (0,), "no-rows": (0, 4), "no-columns": (4, 0),
}  # fmt: skip


def of_type(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Random bits seen as `dtype`; booleans are 0 or 1."""
    count = math.prod(shape) * dtype.itemsize
    high = 2 if dtype == torch.bool else 256
    raw = torch.randint(0, high, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return raw.view(dtype).reshape(shape)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal type, shape and bytes; NaN equals itself."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and bytes(as_memory(a.contiguous())) == bytes(as_memory(b.contiguous()))
    )


def zoo(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: of_type(dtype, shape, i) for i, (name, shape) in enumerate(SHAPES.items())}


def write(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """Our writer, as the pipeline uses it."""
    plan = ShardPlan({path.name: [(n, t.dtype, tuple(t.shape)) for n, t in tensors.items()]})
    writer = ShardWriter(path.parent, plan)
    for name, tensor in tensors.items():
        writer.put(name, tensor)
    writer.publish()
    return path


# ── the package on the other side ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", DTYPES)
def test_what_the_package_writes_we_read(name: str, tmp_path: Path) -> None:
    tensors = zoo(DTYPES[name])
    save_file(tensors, tmp_path / "theirs.safetensors")
    entries = read_header(tmp_path / "theirs.safetensors")
    assert entries.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert entries[key].dtype == name
        assert same_bits(read_tensor(entries[key]), tensor), key


@pytest.mark.parametrize("name", DTYPES)
def test_what_we_write_the_package_reads(name: str, tmp_path: Path) -> None:
    tensors = zoo(DTYPES[name])
    path = write(tmp_path / "ours.safetensors", tensors)
    theirs = load_file(path)
    assert theirs.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert same_bits(theirs[key], tensor), key
        assert same_bits(read_tensor(read_header(path)[key]), tensor), key


def test_a_file_of_all_types_together_is_read_by_both(tmp_path: Path) -> None:
    tensors = {f"{n} {s}": of_type(d, SHAPES[s], 7) for n, d in DTYPES.items() for s in ("matrix", "empty")}
    theirs = load_file(write(tmp_path / "ours.safetensors", tensors))
    assert all(same_bits(theirs[n], t) for n, t in tensors.items())
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt", "note": "ünïcode"})
    ours = read_header(tmp_path / "theirs.safetensors")
    assert all(same_bits(read_tensor(ours[n]), t) for n, t in tensors.items())


def test_every_type_name_is_the_packages() -> None:
    """The package writes the same names for the same types: read them from its own header."""
    from safetensors.torch import save

    for name, dtype in DTYPES.items():
        blob = save({"x": torch.zeros(2, dtype=dtype)})
        length = int.from_bytes(blob[:8], "little")
        assert json.loads(blob[8 : 8 + length])["x"]["dtype"] == name == DTYPE_NAMES[dtype]


def test_the_buffer_starts_at_a_multiple_of_eight() -> None:
    for size in range(1, 12):
        header, ranges = encode_header([("n" * size, torch.float32, (2,))])
        assert len(header) % 8 == 0
        assert ranges["n" * size] == (len(header), len(header) + 8)


def test_a_piece_of_a_tensor_is_read_alone(tmp_path: Path) -> None:
    tensor = of_type(torch.uint8, (100,), 3)
    save_file({"before": torch.zeros(3), "x": tensor}, tmp_path / "f.safetensors")
    entry = read_header(tmp_path / "f.safetensors")["x"]
    assert torch.equal(read_bytes(entry, 10, 20), tensor[10:30])


def test_a_file_that_shrank_after_its_header_was_read_is_an_error_that_names_the_tensor(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    save_file({"x": torch.zeros(1000)}, path)
    entry = read_header(path)["x"]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FileFormatError, match=r"f\.safetensors.*'x'.*shorter"):
        read_tensor(entry)


# ── files that lie ────────────────────────────────────────────────────────────────────────────────────────────────────


def blob(table: object, payload: bytes = b"", length: int | None = None) -> bytes:
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + payload


def tensor(start: Any = 0, stop: Any = 4, shape: Any = (1,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [start, stop]}


GOOD = blob({"weight": tensor()}, b"\0" * 4)

LIES: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "0"),
    "seven bytes": (GOOD[:7], "7"),
    "no header": (GOOD[:8], "8"),
    "half a header": (GOOD[:30], "30"),
    "no payload": (GOOD[:-4], "weight"),
    "half a payload": (GOOD[:-1], "weight"),
    "bytes too many": (GOOD + b"\0", "1 bytes after"),
    "length of 2^63": (blob({}, length=2**63), str(2**63)),
    "length of 2^64-1": (blob({}, length=2**64 - 1), str(2**64 - 1)),
    "length beyond the file": (blob({}, length=3), "3 bytes"),
    "not json": (blob(b"\x80\x04K\x01."), "header"),
    "not utf-8": (blob(b'{"\xff": 1}'), "header"),
    "byte-order mark": (blob(b"\xef\xbb\xbf" + json.dumps({"weight": tensor()}).encode(), b"\0" * 4), "header"),
    "utf-16": (blob(json.dumps({"weight": tensor()}).encode("utf-16"), b"\0" * 4), "header"),
    "half a character in a name": (blob({"a\ud800": tensor()}, b"\0" * 4), "character"),
    "json list": (blob([1, 2]), "object"),
    "json null": (blob(b"null"), "object"),
    "nested too deep": (blob(b"[" * 100_000), "header"),
    "nested too deep inside": (blob(b'{"weight":' + b"[" * 100_000), "header"),
    "a number of 10,000 digits": (blob(b'{"weight":{"dtype":"F32","shape":[' + b"9" * 10_000 + b'],"data_offsets":[0,4]}}', b"\0" * 4), "header"),
    "metadata no object": (blob({"__metadata__": 3}), "__metadata__"),
    "metadata of numbers": (blob({"__metadata__": {"a": 1}}), "__metadata__"),
    "facts no object": (blob({"weight": 5}), "weight"),
    "facts missing": (blob({"weight": {"dtype": "F32", "shape": [1]}}, b"\0" * 4), "weight"),
    "unknown type": (blob({"weight": tensor(dtype="F31")}, b"\0" * 4), "F31"),
    "type no word": (blob({"weight": tensor(dtype=["F32"])}, b"\0" * 4), "weight"),
    "shape no list": (blob({"weight": tensor(shape=4)}, b"\0" * 4), "weight"),
    "shape negative": (blob({"weight": tensor(shape=(-1, -1))}, b"\0" * 4), "weight"),
    "shape fractional": (blob({"weight": tensor(shape=(1.0,))}, b"\0" * 4), "weight"),
    "shape boolean": (blob({"weight": tensor(shape=(True,))}, b"\0" * 4), "weight"),
    "shape huge": (blob({"weight": tensor(shape=(2**62,))}, b"\0" * 4), "weight"),
    "shape overflows to nothing": (blob({"weight": tensor(0, 0, shape=(2**32, 2**32, 0))}), "weight"),
    "shape of 10^19": (blob({"weight": tensor(0, 0, shape=(0, 10**19))}), "weight"),
    "offsets negative": (blob({"weight": tensor(-4, 0)}, b"\0" * 4), "weight"),
    "offsets boolean": (blob({"weight": tensor(False, 4)}, b"\0" * 4), "weight"),
    "offsets reversed": (blob({"weight": tensor(4, 0)}, b"\0" * 4), "weight"),
    "offsets one": (blob({"weight": {**tensor(), "data_offsets": [4]}}, b"\0" * 4), "weight"),
    "offsets three": (blob({"weight": {**tensor(), "data_offsets": [0, 4, 8]}}, b"\0" * 4), "weight"),
    "offsets null": (blob({"weight": {**tensor(), "data_offsets": None}}, b"\0" * 4), "weight"),
    "offsets huge": (blob({"weight": tensor(2**62, 2**62 + 4)}, b"\0" * 4), "weight"),
    "size too small for the shape": (blob({"weight": tensor(0, 4, shape=(2,))}, b"\0" * 4), "weight"),
    "size too large for the shape": (blob({"weight": tensor(0, 8)}, b"\0" * 8), "weight"),
    "starts late": (blob({"weight": tensor(4, 8)}, b"\0" * 8), "weight"),
    "overlap": (blob({"first": tensor(0, 8, (2,)), "second": tensor(4, 12, (2,))}, b"\0" * 12), "second"),
    "the same bytes twice": (blob({"first": tensor(), "second": tensor()}, b"\0" * 4), "second"),
    "gap": (blob({"first": tensor(0, 4), "second": tensor(8, 12)}, b"\0" * 12), "second"),
    "the same name twice": (blob(b'{"weight":%b,"weight":%b}' % ((json.dumps(tensor()).encode(),) * 2), b"\0" * 4), "weight"),
}  # fmt: skip

# The package keeps the last of two equal names in silence, and reads shapes that torch cannot make.
STRICTER = {"the same name twice", "shape overflows to nothing", "shape of 10^19"}


@pytest.mark.parametrize("case", LIES)
def test_a_file_that_lies_is_refused_with_its_name_and_the_tensors(case: str, tmp_path: Path) -> None:
    content, named = LIES[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(FileFormatError) as caught:
        read_header(path)
    message = str(caught.value)
    assert str(path) in message and named in message and "\n" not in message, message
    if case not in STRICTER:
        with pytest.raises(SafetensorError):  # the package agrees
            load_file(path)


def test_the_good_file_that_the_lies_are_made_from_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(GOOD)
    assert read_header(path) == {"weight": Entry("weight", path, "F32", (1,), len(GOOD) - 4, len(GOOD))}


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = tmp_path / "whole.safetensors"
    save_file({"a": torch.ones(3), "b": torch.ones(2, 2)}, whole)
    content, path = whole.read_bytes(), tmp_path / "cut.safetensors"
    for stop in range(len(content)):
        path.write_bytes(content[:stop])
        with pytest.raises(FileFormatError, match=r"cut\.safetensors"):
            read_header(path)


def test_a_missing_file_and_a_directory_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.safetensors", tmp_path):
        with pytest.raises(FileFormatError, match="cannot be read"):
            read_header(path)


def test_a_huge_length_allocates_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sparse file of 1 TB whose header claims 900 GB: refused by the limit, not by reading it."""
    path = tmp_path / "huge.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 900 * 10**9))
        file.truncate(10**12)
    with pytest.raises(FileFormatError, match="900000000000"):
        read_header(path)


NUMBERS = st.one_of(st.integers(-3, 40), st.sampled_from([True, 1.5, 2**31, 2**62, 2**64, 10**30, None, "4"]))
FACTS = st.one_of(
    st.fixed_dictionaries(
        {"dtype": st.sampled_from([*DTYPES, "F4", "", 3]), "shape": st.lists(NUMBERS, max_size=3), "data_offsets": st.lists(NUMBERS, min_size=1, max_size=3)}
    ),
    NUMBERS,
    st.lists(NUMBERS, max_size=2),
)  # fmt: skip
HEADERS = st.dictionaries(st.sampled_from(["a", "b", "c", "__metadata__"]), FACTS, max_size=3)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(table=HEADERS, payload=st.integers(0, 24))
@example(table={"a": tensor(0, 0, (0,)), "b": tensor(0, 4)}, payload=4)
def test_a_made_up_header_is_read_as_the_package_does_or_refused(
    tmp_path: Path, table: dict[str, Any], payload: int
) -> None:
    check_against_package(tmp_path / "f.safetensors", blob(table, b"\0" * payload))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_good_file_with_bytes_changed_is_read_or_refused_never_more(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(
        blob({"a": tensor(0, 8, (2,)), "b": tensor(8, 12, (1,)), "__metadata__": {"k": "v"}}, b"\0" * 12)
    )
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] = data.draw(st.sampled_from([*b'{}[]",:0123456789-.e \\', 0, 255, 128]))
    check_against_package(tmp_path / "f.safetensors", bytes(content))


def check_against_package(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    try:
        entries = read_header(path)
    except FileFormatError as error:
        assert str(path) in str(error)
        return
    theirs = load_file(path)  # what we take, the package takes
    assert theirs.keys() == entries.keys()
    for name, entry in entries.items():
        assert same_bits(read_tensor(entry), theirs[name])


def test_reading_asks_for_no_more_memory_than_the_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"small": torch.zeros(4), "large": torch.zeros(10_000)}, tmp_path / "f.safetensors")
    asked: list[int] = []
    empty: Callable[..., torch.Tensor] = torch.empty

    def counting(*args: Any, **kwargs: Any) -> torch.Tensor:
        asked.append(int(args[0]))
        return empty(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", counting)
    read_tensor(read_header(tmp_path / "f.safetensors")["small"])
    assert asked == [16]
