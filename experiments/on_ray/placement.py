"""Where the processes of a run are placed: what each reserves, and what the cluster has.

The server is placed on the machine where the program was started, so that the run's folder is
there; the clients where there is room, on as many machines as there are. A place is kept: a process
that died is started again where it ran before, as long as that machine is there.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from sfl.errors import ConfigError, RunError, counted

PLACED_WITHIN_S = 30.0  # who waits longer waits for other users of the cluster
ROUNDING = 1e-6  # of sums of parts of a CPU
HERE = 0.001  # of a machine's own resource, which only says where: as little as Ray counts

Resources = Mapping[str, float]  # "CPU", "GPU"


@dataclass(frozen=True)
class Needs:
    """What a run reserves."""

    server: Resources
    actor: Resources  # each actor of clients
    num_clients: int
    per_actor: int  # clients; 0: not known before ``fitted``

    def fitted(self, free: Resources) -> "Needs":
        """Return these needs with so many clients an actor that all fit into what is free."""
        left = free.get("CPU", 0.0) - self.server["CPU"]
        num_actors = max(math.floor(left / self.actor["CPU"] + ROUNDING), 1)
        per_actor = self.per_actor or math.ceil(self.num_clients / num_actors)
        return replace(self, per_actor=per_actor)

    @property
    def groups(self) -> list[range]:
        """The clients of each actor."""
        firsts = range(0, self.num_clients, self.per_actor)
        return [range(k, min(k + self.per_actor, self.num_clients)) for k in firsts]

    @property
    def bundles(self) -> list[dict[str, float]]:
        """What each actor reserves, the server first."""
        here = f"node:{ray.util.get_node_ip_address()}"
        of_all = [{**self.server, here: HERE}, *(dict(self.actor) for _ in self.groups)]
        return [{name: amount for name, amount in bundle.items() if amount} for bundle in of_all]

    def missing(self, has: Resources) -> str:
        """Return what the run reserves and more than there is; "" if there is enough."""
        lines = []
        for name, of_server in self.server.items():
            of_actor, num_actors = self.actor[name], len(self.groups)
            needed = of_server + of_actor * num_actors
            if needed > has.get(name, 0.0) + ROUNDING:
                lines.append(
                    f"{name}: {needed:g} are needed, {of_server:g} for the server and {of_actor:g}"
                    f" for each of {counted(num_actors, 'actor')} of clients;"
                    f" {has.get(name, 0.0):g} are there"
                )
        return ", ".join(lines)


@contextlib.contextmanager
def placed(needs: Needs) -> Iterator[PlacementGroup]:
    """Reserve what a run needs, all at once, until the block ends.

    Raises:
        ConfigError: the cluster has less.
        RunError: others have reserved it, or no machine has what one actor needs.
    """
    if missing := needs.missing(ray.cluster_resources()):
        raise ConfigError(
            f"the cluster is too small: {missing}; give less with --cpus-per-server and"
            " --cpus-per-actor, or let an actor be several clients: --virtual-clients"
            f" {needs.num_clients}"
        )
    group = placement_group(needs.bundles, strategy="SPREAD")
    try:
        if not group.wait(PLACED_WITHIN_S):
            free = needs.missing(ray.available_resources())
            raise RunError(
                f"the cluster has no room for the run: {free or 'no machine has what one needs'}"
                f" (waited {PLACED_WITHIN_S:g} seconds)"
            )
        yield group
    finally:
        remove_placement_group(group)


def machines_of(group: PlacementGroup, names: list[str]) -> dict[str, list[str]]:
    """Return for each machine, by its address, which of the actors are placed on it."""
    table: dict[str, Any] = placement_group_table(group)
    address = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    found: dict[str, list[str]] = {}
    for index, name in enumerate(names):
        node = table["bundles_to_node_id"][index]
        found.setdefault(address.get(node, node), []).append(name)
    return found
