"""NaN, infinity and overflow: one of them, averaged or trained on, spoils everything."""

from collections.abc import Callable, Iterable

from torch import Tensor

from sfl.errors import NotFinite
from sfl.files.torch_file import are_finite

REJECT, LOG = "reject", "log"


def check_finite(
    tensors: Iterable[Tensor], name: str, policy: str, warn: Callable[[str], None]
) -> None:
    """See that tensors which a peer sent, or which follow from them, are finite as
    ``are_finite`` means it; else refuse them, or warn.

    Raises:
        NotFinite: they are not, and the policy is to refuse them.
    """
    tensors = list(tensors)
    if are_finite(tensors):
        return
    plain = all(bool(tensor.isfinite().all()) for tensor in tensors)
    why = f"{name} hold {'numbers whose squares overflow' if plain else 'NaN or infinity'}"
    if policy == REJECT:
        raise NotFinite(
            f"{why}: a lower --lr or --clip-norm may help; --on-nonfinite log lets them pass"
        )
    warn(f"warning: {why}")
