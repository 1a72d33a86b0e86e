"""``KINDS``: the kinds of files that ``--to`` names, each made of one part of a trained model."""

import contextlib
import io
import logging
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sfl.errors import RunError, not_installed, reason_of
from sfl.model.portable import ENTRY, About, Portable, encode_portable

MOST_DIFFERENCE = 1e-4  # between onnxruntime and torch, in any output
_BATCHES = (1, 2, 5)  # for which that is seen
_MOST_BYTES = 2**31 - 2**20  # of an ONNX file's weights: protobuf ends at 2 GiB
_INPUT, _OUTPUT = "input", "output"  # their names in an ONNX file


class Made(NamedTuple):
    """A file's bytes, and what its making has shown, for the user; "" if nothing."""

    data: bytes
    shown: str = ""


@dataclass(frozen=True)
class Kind:
    """One row: a file's suffix, and how it is made.

    ``make`` gets a part in evaluation mode, samples (B, *takes) that are made up, and what the part
    is; B is the sum of ``_BATCHES``.
    """

    suffix: str
    make: Callable[[nn.Module, Tensor, About], Made]


def _weights(part: nn.Module, samples: Tensor, about: About) -> Made:
    return Made(encode_portable(Portable(part.state_dict(), about)))


def _exported(part: nn.Module, samples: Tensor, about: About) -> Made:
    """Make what ``torch.export.load`` loads: weights and graph, without the model's code."""
    with exporting(about.part, about.model):
        program = torch.export.export(part, (samples[:2],), dynamic_shapes=(_any_batch(),))
        stream = io.BytesIO()
        torch.export.save(program, stream, extra_files={ENTRY: about.to_json()})
    return Made(stream.getvalue())


def _onnx(part: nn.Module, samples: Tensor, about: About) -> Made:
    """Make an ONNX file, and see what onnxruntime computes with it.

    Raises:
        ConfigError: a package is missing.
        RunError: the part cannot be exported, or gives other outputs than with torch.
    """
    check_onnx_installed()
    if (size := sum(t.nbytes for t in part.state_dict().values())) > _MOST_BYTES:
        raise RunError(
            f"the {about.part} has {size / 2**30:.1f} GiB of weights, and one ONNX file holds 2:"
            " write it with --to exported"
        )
    with exporting(about.part, about.model):
        program = torch.onnx.export(
            part,
            (samples[:2],),
            dynamo=True,
            dynamic_shapes=(_any_batch(),),
            input_names=[_INPUT],
            output_names=[_OUTPUT],
            verbose=False,
        )
        assert program is not None
        program.model.metadata_props[ENTRY] = about.to_json()
        data: bytes = program.model_proto.SerializeToString()
        worst = _largest_difference(part, onnx_session(data), samples)
    if not worst <= MOST_DIFFERENCE:  # NaN is refused as well
        raise RunError(
            f"onnxruntime and torch differ by {worst:.1e} in an output of the {about.part}, more"
            f" than {MOST_DIFFERENCE:.0e}, so no file is written: --to exported keeps torch's own"
            " arithmetic"
        )
    sizes = " and ".join([", ".join(map(str, _BATCHES[:-1])), str(_BATCHES[-1])])
    return Made(
        data,
        f"onnxruntime and torch differ by at most {worst:.1e} on made-up batches of {sizes}",
    )


def check_onnx_installed() -> None:
    """Check that ONNX files can be made here.

    Raises:
        ConfigError: a package is missing.
    """
    try:
        import onnx  # noqa: F401 - torch's exporter needs both
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise not_installed((error.name or "").partition(".")[0]) from error


def onnx_session(data: bytes) -> Any:
    """Return onnxruntime's session of an ONNX file, on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors alone
    return onnxruntime.InferenceSession(data, options, ["CPUExecutionProvider"])


def _largest_difference(part: nn.Module, session: Any, samples: Tensor) -> float:
    """Return how far an output of onnxruntime is from torch's, on batches of several sizes."""
    worst = torch.zeros(())
    for batch in samples.split_with_sizes(_BATCHES):
        with torch.no_grad():
            ours = part(batch)
        (theirs,) = session.run([_OUTPUT], {_INPUT: batch.numpy()})
        worst = torch.maximum(worst, (ours - torch.from_numpy(theirs)).abs().max())
    return float(worst)


def _any_batch() -> dict[int, Any]:
    """Return that the first dimension of an input is of any size."""
    return {0: torch.export.Dim("batch", min=1)}


# Torch's exporter, and what is ignored of warnings and logs, belong to the whole process.
_EXPORTER = threading.Lock()


@contextlib.contextmanager
def exporter_alone() -> Iterator[None]:
    """Let one thread at a time export; keep the exporter's warnings and log lines from the user."""
    with _EXPORTER, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        disabled = logging.root.manager.disable
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(disabled)


@contextlib.contextmanager
def exporting(part: str, model: str) -> Iterator[None]:
    """Export in the ``with`` block, as ``exporter_alone``; say what the exporter cannot do.

    ``part``: what is exported, of ``model``.

    Raises:
        RunError: it raised anything.
    """
    try:
        with exporter_alone():
            yield
    except Exception as error:  # torch and onnxruntime raise dozens of types
        raise RunError(
            f"torch's exporter does not take the {part} of {model}:"
            f" {reason_of(error)}; --to torch writes its weights"
        ) from error


NUM_SAMPLES = sum(_BATCHES)
KINDS: Mapping[str, Kind] = {
    "torch": Kind(".pt", _weights),
    "onnx": Kind(".onnx", _onnx),
    "exported": Kind(".pt2", _exported),
}
