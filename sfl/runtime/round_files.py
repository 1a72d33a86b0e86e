"""The files that a server writes at a round's end for the next one to start from."""

from collections.abc import Iterator, Mapping

from sfl.archive.layout import SERVER_OPTIMIZER, segment_path
from sfl.files.torch_file import encode_state
from sfl.model.topology import Holder, Segments, joined
from sfl.strategy.merge import Shared
from sfl.strategy.split_model import SplitModel


def front_file(split: SplitModel, shared: Mapping[str, Shared]) -> bytes:
    """Return the file of the clients' weights; b"" if a separate fed server has them."""
    names = [name for name in split.held_by(Holder.CLIENT) if name in shared]
    states = {name: shared[name].state for name in names}
    return encode_state(joined(states)) if states else b""


def optimizer_files(
    backs: Mapping[int, Segments], round_index: int
) -> Iterator[tuple[str, str, bytes]]:
    """Yield kind, path and content of the files of the server's optimisers."""
    for b, copy in backs.items():
        for name, segment in copy.items():
            path = segment_path(SERVER_OPTIMIZER, name, round_index, back=b)
            yield "server_optimizer", path, encode_state(segment.optimizer.state())
