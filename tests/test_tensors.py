"""Tensor files: what is written, and what is refused on reading."""

import io
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sfl.errors import IntegrityError
from sfl.tensors import (
    TensorSpec,
    compact,
    decode,
    decode_state,
    encode,
    encode_state,
    max_file_bytes,
    owns_storage,
    state_spec,
)

Z = torch.arange(12, dtype=torch.float32).reshape(3, 4)
SPEC = TensorSpec((3, 4), torch.float32)


def saved(content: object) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def test_a_file_is_what_any_torch_load_reads(tmp_path: Path) -> None:
    (tmp_path / "z.pt").write_bytes(encode(Z))
    assert torch.equal(torch.load(tmp_path / "z.pt", weights_only=True), Z)
    with zipfile.ZipFile(tmp_path / "z.pt") as container:
        assert container.testzip() is None


@pytest.mark.parametrize("view", [Z[1:2], Z.t(), Z[:, 0], Z.expand(2, 3, 4), Z[:0], Z[0, 0]])
def test_a_view_is_sent_without_the_storage_around_it(view: torch.Tensor) -> None:
    sent = decode(encode(view), TensorSpec.of(view), "z")
    assert torch.equal(sent, view)
    assert owns_storage(sent)
    assert owns_storage(compact(view))


def test_a_planted_view_is_refused() -> None:
    data = saved(Z[1:2])
    with pytest.raises(IntegrityError, match="z: its tensor is a view"):
        decode(data, TensorSpec((1, 4), torch.float32), "z")


class RunsCode:
    def __reduce__(self) -> tuple[object, ...]:
        return (pytest.fail, ("the file ran code",))


def asking_for(pickled: bytes) -> bytes:
    """Return a file whose pickle is another one."""
    stream = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(saved(Z))) as source,
        zipfile.ZipFile(stream, "w") as target,
    ):
        for record in source.infolist():
            replaced = record.filename.endswith("data.pkl")
            target.writestr(record.filename, pickled if replaced else source.read(record))
    return stream.getvalue()


# bytearray(3 GiB), which weights_only allows: a file of 1.5 KB that takes 3 GiB.
BOMB = asking_for(b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\xc0\x00\x85R.")


def deflated(data: bytes) -> bytes:
    stream = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(data)) as source,
        zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for record in source.infolist():
            target.writestr(record.filename, source.read(record))
    return stream.getvalue()


def doubled(data: bytes) -> bytes:
    stream = io.BytesIO(data)
    with zipfile.ZipFile(stream, "a") as container, pytest.warns(UserWarning, match="Duplicate"):
        container.writestr(container.infolist()[0].filename, b"again")
    return stream.getvalue()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no whole torch.save file"),
        (b"not a file", "no whole torch.save file"),
        (saved(Z)[:-1], "no whole torch.save file"),
        (saved(Z)[: len(saved(Z)) // 2], "no whole torch.save file"),
        (pickle.dumps(RunsCode()), "no whole torch.save file"),
        (saved(RunsCode()), "asks for _pytest.outcomes _Fail, which is no tensor"),
        (BOMB, "asks for builtins bytearray, which is no tensor"),
        (asking_for(b"\x80\x04\x8c\x02os\x8c\x06system\x93."), "asks for STACK_GLOBAL"),
        (asking_for(b"garbage"), "no whole torch.save file"),
        (deflated(saved(Z)), "compressed"),
        (doubled(saved(Z)), "two records"),
        (saved([Z]), "no plain dense tensor"),
        (saved(Z.to_sparse()), "asks for torch._utils _rebuild_sparse_tensor"),
        (saved(torch.nn.Parameter(Z)), "asks for torch._utils _rebuild_parameter"),
        (saved(Z.double()), r"float64 \[3, 4\], but float32 \[3, 4\] is expected"),
        (saved(Z[:2].clone()), r"float32 \[2, 4\], but float32 \[3, 4\] is expected"),
        (saved(Z.t()), "expected"),
        (saved(torch.empty(3, 4, device="meta")), "asks for torch._utils _rebuild_meta_tensor"),
        (saved(Z * 1j), "asks for torch ComplexFloatStorage"),
        (saved(torch._neg_view(Z)), "asks for|kind that never travels|expected"),
    ],
)
def test_anything_but_the_expected_tensor_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(IntegrityError, match=f"features: .*({reason})"):
        decode(data, SPEC, "features")


@given(st.data())
def test_a_mutated_file_gives_a_tensor_or_our_error(data: st.DataObject) -> None:
    mutated = bytearray(encode(Z))
    for _ in range(data.draw(st.integers(1, 3))):
        mutated[data.draw(st.integers(0, len(mutated) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert TensorSpec.of(decode(mutated, SPEC, "z")) == SPEC
    except IntegrityError as error:
        assert str(error).startswith("z: ")  # noqa: PT017 - either outcome is right


def test_states_come_back_whole_and_others_are_refused() -> None:
    state = torch.nn.BatchNorm1d(3).state_dict()
    spec = state_spec(state)
    read = decode_state(encode_state(state), spec, "weights")
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], state[name]) for name in state)
    others = [
        {},
        {name: tensor for name, tensor in state.items() if name != "weight"},
        {**state, "more": Z},
        {**state, "num_batches_tracked": torch.tensor(1.0)},
        {**state, "weight": Z[0, 1:]},
    ]
    for other in others:
        with pytest.raises(IntegrityError, match="weights"):
            decode_state(saved(other), spec, "weights")


@pytest.mark.parametrize("shape", [(), (1,), (0,), (33, 400), (257, 16, 5, 5), (2, 3, 4, 5, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.float16])
def test_the_bound_on_a_files_size_holds_and_is_tight(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    tensor = torch.zeros(shape, dtype=dtype)
    size, bound = len(encode(tensor)), max_file_bytes([TensorSpec.of(tensor)])
    assert size <= bound <= size + 5000


def test_the_bound_on_a_states_size_holds() -> None:
    names = [f"a.rather.long.name.of.a.block.{n}.weight" for n in range(300)]
    state = {name: torch.zeros(5) for name in names}
    assert len(encode_state(state)) <= max_file_bytes(state_spec(state).values())
