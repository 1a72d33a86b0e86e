"""How well the gradients that a party receives tell the labels that it is never sent.

python -m experiments.measure.label_leak RUN_DIR [--round 0] [--data-dir FOLDER]

Of a recorded run whose last segment the clients hold (``--cut 3,9``) it takes the gradients that
the server received at the last cut, of each client; of one with ``--topology vertical`` those that
each client without labels received. k-means puts them, each scaled to length 1, into as many
clusters as there are classes; a cluster is named by its most frequent label. Printed are the share
of samples that are named right, and that of the most frequent class. Labels that are not recorded
come from the run's own data set, which must be one that is dealt out, and not ``--partition own``.
"""

import sys
from argparse import Namespace
from pathlib import Path

from sfl.errors import ConfigError
from sfl.options import Parser
from sfl.program import run_program


def main() -> None:
    options = _parse()
    import torch
    from sklearn.cluster import KMeans
    from torch import Tensor

    from sfl.archive.layout import GRADS
    from sfl.data.client_data import Source, batch_indices, load, part_of
    from sfl.data.datasets import dataset_of
    from sfl.nodes import NodeConfig
    from sfl.runtime.recorded_run import load as load_run

    recorded = load_run(options.run_dir, allow_import=options.allow_import)
    run, recipe = recorded.run, recorded.recipe
    if not (recipe.keeps_labels or recipe.joins):
        raise ConfigError(f"{options.run_dir}: its labels are sent; give a run with --cut A,B")

    def labels_of(client: int) -> Tensor:
        """Return the labels of a client's steps: (N,) int64."""
        if recipe.joins:
            of_leader, own = (
                {step.step: step for step in recorded.archive.steps(client=k, round=options.round)}
                for k in (recipe.leader(client), client)
            )
            return torch.cat([of_leader[step].labels for step in own])
        node = NodeConfig(data_dir=options.data_dir)
        spec = dataset_of(run, recorded.allowed)
        both = load(spec, Source(node.data_path, node.cache_path, spec.input_shape))
        data = part_of(spec, run, client, both)
        drawn = batch_indices(len(data.train), run, round_index=options.round, client=client)
        return data.train.y[torch.cat(list(drawn))]

    last = len(recipe.cuts) - 1
    print("client,samples,named_right,most_frequent_class")
    told = [k for k in recorded.clients if not (recipe.joins and recipe.has_labels(k))]
    for client in told:
        steps = recorded.archive.steps(client=client, round=options.round)
        grads = [step.tensor(GRADS).flatten(1) for step in steps if step.link == last]
        if not grads:
            raise ConfigError(f"{options.run_dir}: nothing is recorded of --round {options.round}")
        y = labels_of(client)
        unit = torch.nn.functional.normalize(torch.cat(grads).double(), dim=1)  # (N, features)
        k = recorded.split.num_classes
        clusters = KMeans(k, n_init=10, random_state=0).fit_predict(unit.numpy())
        counts = torch.bincount(torch.from_numpy(clusters) * k + y, minlength=k * k).view(k, k)
        right = counts.max(1).values.sum().item() / len(y)
        most = torch.bincount(y).max().item() / len(y)
        print(f"{client},{len(y)},{right:.4f},{most:.4f}")


def _parse() -> Namespace:
    parser = Parser(
        prog="python -m experiments.measure.label_leak",
        description=(__doc__ or "").partition("\n")[0],
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="shared_files/server/<run>")
    parser.add_argument(
        "--round", type=int, default=0, help="which round's gradients, from 0 (default: 0)"
    )
    parser.add_argument("--data-dir", default="", help="where the run's data set lies")
    parser.add_argument("--allow-import", default="", help="the run's own model, data set")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run_program("label_leak", main))
