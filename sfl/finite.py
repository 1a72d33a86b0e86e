"""NaN and infinity in what a peer sends: one of them, averaged or trained on, spoils everything."""

from collections.abc import Callable, Iterable

from torch import Tensor

from sfl.errors import ProtocolError
from sfl.tensors import is_finite

REJECT, LOG = "reject", "log"


def check_finite(
    tensors: Iterable[Tensor], name: str, policy: str, warn: Callable[[str], None]
) -> None:
    """See that a peer's tensors hold neither NaN nor infinity; else refuse them, or warn.

    Raises:
        ProtocolError: they hold some, and the policy is to refuse them.
    """
    if all(map(is_finite, tensors)):
        return
    why = f"{name} hold NaN or infinity"
    if policy == REJECT:
        raise ProtocolError(
            f"{why}: a lower --lr or --clip-norm may help; --on-nonfinite log lets them pass"
        )
    warn(f"warning: {why}")
