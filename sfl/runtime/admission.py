"""Whether a client that has loaded its data can take part: as what it was, and as what it says."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sfl.conversation.join import Joined
from sfl.runtime.resume import Past
from sfl.runtime.same_model import ServersModel


@dataclass(frozen=True)
class Admission:
    """What a client's report is held against."""

    past: Past | None = None
    model: ServersModel | None = None  # that clients must have built; None: any will do
    # says why a client's report is refused; "" if it is not
    excessive_claim: Callable[[Joined], str] = lambda joined: ""

    def why_refused(self, joined: Joined, before: Joined | None, *, has_begun: bool) -> str:
        """Say why a client that has loaded its data cannot take part; "" if it can."""
        if claim := self.excessive_claim(joined):
            return f"client_{joined.client} {claim}"
        if (why := self._identity_problem(joined, before, has_begun)) or not self.model:
            return why
        return self.model.why_different(joined) or self.model.why_too_few_samples(joined.data)

    def past_fingerprint(self, joined: Joined) -> Mapping[str, str]:
        """Return what a client ran on before a run that goes on; else what it runs on."""
        known = self.past.client_fingerprints if self.past else {}
        return known.get(joined.client, joined.fingerprint)

    def _identity_problem(self, joined: Joined, before: Joined | None, has_begun: bool) -> str:
        """Say what is wrong with a client that should be the one that was here before."""
        past, begins = self.past, not has_begun
        digest = before.data.digest if before and has_begun else ""
        if past:
            digest = past.digests[joined.client]
        if past and begins and not past.matches_own_state(joined.client, joined.data.rounds):
            return (
                f"client_{joined.client} lacks what only it has of round"
                f" {past.first_round - 1}: start it where it ran before, with the same --out"
            )
        if digest in ("", joined.data.digest):
            return ""
        return (
            f"client_{joined.client} has other data than it had in this run; give each client the"
            " --client-id and the --data-dir that it had"
        )
