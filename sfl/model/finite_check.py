"""Refusal of NaN, infinity and overflow: one such number ruins every weight that it reaches."""

from collections.abc import Callable, Iterable

from torch import Tensor

from sfl.errors import NotFinite
from sfl.model.transfer import are_finite

REJECT, LOG = "reject", "log"


def check_finite(
    tensors: Iterable[Tensor], name: str, policy: str, warn: Callable[[str], None]
) -> None:
    """Refuse tensors that are not finite (``are_finite``), or only warn, as ``policy`` says.

    Raises:
        NotFinite: some tensor is not finite, and the policy is ``reject``.
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
