"""Files from a template: the same bytes as torch's own, and none but those are taken for them."""

import io
import zipfile
import zlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sfl.errors import IntegrityError
from sfl.files.checksum import crc_of
from sfl.files.torch_file import TensorSpec, _save, _template, decode, encode, encode_file
from sfl.files.torch_template import Template

SHAPES = [(), (1,), (7,), (128,), (3, 4), (33, 400), (257, 16, 5, 5), (2, 3, 4, 5, 6)]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8]


def made(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    draws = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=draws) * 50).abs().to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_file_is_byte_for_byte_what_torch_writes(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    assert _template(TensorSpec(shape, dtype)) is not None  # else the test would compare nothing
    for seed in range(3):
        tensor = made(shape, dtype, seed)
        data = encode(tensor)
        assert data == _save(tensor)
        with zipfile.ZipFile(io.BytesIO(data)) as container:
            assert container.testzip() is None
        read = decode(data, TensorSpec.of(tensor), "z")
        assert torch.equal(read, tensor)
        assert read.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize


@pytest.mark.parametrize("dtype", [torch.complex64, torch.uint16, torch.float8_e5m2])
def test_a_dtype_that_is_not_read_has_no_template(dtype: torch.dtype) -> None:
    tensor = torch.zeros(3, dtype=dtype)
    assert _template(TensorSpec.of(tensor)) is None
    assert encode(tensor) == _save(tensor)
    with pytest.raises(IntegrityError):
        decode(encode(tensor), TensorSpec.of(tensor), "z")


@pytest.mark.parametrize("tensor", [torch.zeros(0), torch.zeros(3, 0), torch.tensor([True, False])])
def test_what_has_no_template_goes_the_ordinary_way(tensor: torch.Tensor) -> None:
    assert _template(TensorSpec.of(tensor)) is None
    assert encode(tensor) == _save(tensor)
    assert torch.equal(decode(encode(tensor), TensorSpec.of(tensor), "z"), tensor)


def test_every_changed_byte_is_noticed() -> None:
    tensor = made((3, 4), torch.float32)
    template, data = _template(TensorSpec.of(tensor)), encode(tensor)
    assert template is not None
    for place in range(len(data)):
        for bit in (1, 128):
            changed = bytearray(data)
            changed[place] ^= bit
            assert template.data_of(changed) is None
    for other in (data[:-1], data + b"x", b"", data[1:] + b"x"):
        assert template.data_of(other) is None


def test_a_files_checksum_spares_that_of_the_data_and_hides_nothing() -> None:
    tensor = made((3, 4), torch.float32)
    template, file = _template(TensorSpec.of(tensor)), encode_file(tensor)
    assert template is not None
    crc = crc_of(file.checksum)
    assert crc == zlib.crc32(file.data)
    assert template.data_of(file.data, crc) == tensor.numpy().tobytes()
    assert template.data_of(file.data, crc ^ 1) is None
    for place in range(len(file.data)):  # whoever changed it may say the checksum of the change
        changed = bytearray(file.data)
        changed[place] ^= 1
        assert template.data_of(changed, zlib.crc32(changed)) is None


@given(st.binary(min_size=48, max_size=48))
def test_any_data_come_back(raw: bytes) -> None:
    spec = TensorSpec((12,), torch.float32)
    template = _template(spec)
    assert template is not None
    file = template.fill(raw)
    assert template.data_of(file) == raw
    assert decode(file, spec, "z").numpy().tobytes() == raw


def test_a_file_that_is_read_is_not_the_tensors_memory() -> None:
    """What is recorded stays what came, whatever is done to the tensor."""
    data = bytearray(encode(torch.zeros(3)))
    before = bytes(data)
    decode(data, TensorSpec((3,), torch.float32), "z").add_(1)
    assert data == before


def test_a_layout_that_is_not_known_has_no_template() -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as container:
        container.writestr("archive/data.pkl", b"x")
    for file in (b"", b"text", stream.getvalue()):
        assert Template.of(lambda byte, file=file: file) is None


def test_a_huge_spec_costs_nothing() -> None:
    with pytest.raises(IntegrityError, match="expected"):
        decode(encode(torch.zeros(3)), TensorSpec((2**40, 2**20), torch.float32), "z")
