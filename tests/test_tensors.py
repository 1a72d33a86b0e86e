"""Tensor files: what is written, and what is refused on reading."""

import io
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experiments.hostile.files import RunsCode, Subclass, Z, hostile_files, patched, saved
from sfl.errors import IntegrityError
from sfl.files.torch_file import (
    TensorSpec,
    _load,
    are_finite,
    compact,
    decode,
    decode_state,
    encode,
    encode_state,
    max_file_bytes,
    max_state_bytes,
    owns_storage,
    state_spec,
)
from sfl.files.torch_reader import take_apart

FILES = hostile_files()
SPEC = TensorSpec((3, 4), torch.float32)


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
    with pytest.raises(IntegrityError, match=r"z: .* no tensor that owns its storage"):
        decode(data, TensorSpec((1, 4), torch.float32), "z")


@pytest.mark.parametrize("what", FILES)
def test_a_file_of_bad_will_is_refused(what: str) -> None:
    data, reason = FILES[what]
    with pytest.raises(IntegrityError, match=f"features: .*({reason})"):
        decode(data, SPEC, "features")


@pytest.mark.parametrize("what", FILES)
def test_a_state_of_bad_will_is_refused(what: str) -> None:
    spec = {"z": SPEC, "w": SPEC}
    with pytest.raises(IntegrityError, match="weights: "):
        decode_state(FILES[what][0], spec, "weights")


# Each of the layers below holds by itself, so that a hole in one is no hole.


def test_torch_itself_refuses_to_run_code() -> None:
    with pytest.raises(IntegrityError, match="features: torch does not load it"):
        _load(io.BytesIO(saved(RunsCode())), "features")


def test_torch_sees_nothing_of_the_container() -> None:
    """Only records that were checked, under names and attributes of our own."""
    data = patched(38, b"\x10", in_directory=True)  # the record is a folder: torch reads nothing
    assert torch.equal(decode(data, SPEC, "z"), Z)
    rebuilt = take_apart(data, "z").rebuilt().getvalue()
    assert rebuilt == take_apart(encode(Z), "z").rebuilt().getvalue()
    with zipfile.ZipFile(io.BytesIO(rebuilt)) as container:
        assert {r.external_attr for r in container.infolist()} == {0o600 << 16}
        assert all(r.filename.startswith("archive/") for r in container.infolist())


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.eye(3).to_sparse(), "no plain dense"),
        (torch.nn.Parameter(Z), "no plain dense"),
        (Z.as_subclass(Subclass), "no plain dense"),
        (torch.empty(3, 4, device="meta"), "never travels"),
        (torch._neg_view(Z), "never travels"),
        (Z.double(), "float64"),
        (Z[:2], "expected"),
        (torch.zeros(1).expand(3, 4), "a view"),
        (torch.zeros(13)[1:].reshape(3, 4), "a view"),
        ({"z": Z}, "no plain dense"),
    ],
)
def test_a_tensor_is_checked_after_loading_too(tensor: object, reason: str) -> None:
    with pytest.raises(IntegrityError, match=f"features: .*{reason}"):
        SPEC.check(tensor, "features")


def test_what_is_not_finite_is_found() -> None:
    fine = [Z, torch.tensor([1, 2]), torch.tensor([1e19, -1e19]), torch.empty(0)]
    assert are_finite(fine)
    assert are_finite([])
    nan, inf = float("nan"), float("inf")
    for wrong in ([1.0, nan], [1.0, inf], [1.0, -inf], [inf, -inf], [3e38], [2e19], [1.8e19] * 2):
        assert not are_finite([*fine, torch.tensor(wrong)])
        assert not are_finite([torch.tensor(wrong).double(), *fine])
    assert not are_finite([torch.tensor([inf]).half()])
    assert are_finite([torch.tensor([0.0, 1.0]).to_sparse()])
    assert not are_finite([torch.tensor([0.0, inf]).to_sparse()])


def test_reading_takes_no_more_memory_than_a_few_times_the_file() -> None:
    data = encode(torch.zeros(2**20))
    tracemalloc.start()
    decode(data, TensorSpec((2**20,), torch.float32), "z")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3.5 * len(data)  # torch's own copy is not counted


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
    for stem in ("a.rather.long.name.of.a.block", "層" * 400, "x" * 1000):
        state = {f"{stem}.{n}.weight": torch.zeros(5) for n in range(300)}
        data = encode_state(state)
        assert len(data) <= max_state_bytes(state_spec(state))
        assert decode_state(data, state_spec(state), "weights").keys() == state.keys()
