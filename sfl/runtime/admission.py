"""Admit or refuse a client that has loaded its data, by its identity, its report and its model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sfl.conversation.join import Joined
from sfl.runtime.resume import Past
from sfl.runtime.same_model import ServersModel


@dataclass(frozen=True)
class Admission:
    """What a client's report is checked against."""

    past: Past | None = None
    model: ServersModel | None = None  # that clients must have built; None: not checked
    # returns why the reported numbers are refused; "" if they are not
    claim_error: Callable[[Joined], str] = lambda joined: ""

    def why_refused(self, joined: Joined, before: Joined | None, *, has_begun: bool) -> str:
        """Return why a client that has loaded its data cannot take part; "" if it can."""
        if claim := self.claim_error(joined):
            return f"client_{joined.client} {claim}"
        if (why := self._identity_problem(joined, before, has_begun)) or not self.model:
            return why
        return self.model.why_different(joined) or self.model.why_too_few_samples(joined)

    def past_fingerprint(self, joined: Joined) -> Mapping[str, str]:
        """Return a client's fingerprint before the resume; in a new run its current one."""
        known = self.past.client_fingerprints if self.past else {}
        return known.get(joined.client, joined.fingerprint)

    def _identity_problem(self, joined: Joined, before: Joined | None, has_begun: bool) -> str:
        """Return why a client is not the one that had this id before; "" if it is."""
        past, begins = self.past, not has_begun
        digest = before.data.digest if before and has_begun else ""
        if past:
            digest = past.digests[joined.client]
        if past and begins and not past.matches_own_state(joined.client, joined.data.rounds):
            return (
                f"client_{joined.client} lacks what only it has of round"
                f" {past.first_round + 1}: start it where it ran before, with the same --out"
            )
        if digest in ("", joined.data.digest):
            return ""
        return (
            f"client_{joined.client} has other data than it had in this run; give each client the"
            " --client-id and the --data-dir that it had"
        )
