"""Limits on a client's report: its counts and shapes decide how much the server stores for it.

::

    samples              the data set's number, or --max-samples
    steps of a round     MOST_STEPS: metrics, answers and log lines of each step
    predictions          MOST_PREDICTION_BYTES: labels and outputs of the test set
    tensors, answers     the free disk
    shape, classes       --memory-limit, if no data set defines them
"""

import functools
import math
import shutil

from sfl.config import RunConfig
from sfl.conversation.join import Joined
from sfl.conversation.party import TEST, TRAIN
from sfl.conversation.report import DataReport
from sfl.data.client_data import num_batches
from sfl.data.datasets import dataset_of
from sfl.data.partition import OWN
from sfl.nodes import ServerNode
from sfl.runtime.memory import Sizes, megabytes, server_bytes, sizes_of, why_too_large
from sfl.strategy.recipe import Recipe
from sfl.strategy.schemes import Exchange

MOST_STEPS = 2**20  # of a client in a round
MOST_PREDICTION_BYTES = 2**28  # of a client's test set


def claim_error(recipe: Recipe, node: ServerNode, joined: Joined) -> str:
    """Return why a client's report exceeds a limit; "" if it does not."""
    report = joined.data
    return _too_many(recipe, node, report) or _too_large(recipe, node, joined)


def _known_total(run: RunConfig) -> int:
    """Return the number of samples in the run's data set; 0 if the server does not know it."""
    return 0 if ":" in run.dataset or run.partition == OWN else dataset_of(run).num_samples


def _too_many(recipe: Recipe, node: ServerNode, report: DataReport) -> str:
    """Return which count in a report is too large; "" if none is."""
    run, counts, classes = recipe.run, report.num_samples, len(report.classes)
    known = _known_total(run)
    most, total = known or node.max_samples, sum(counts.values())
    if total > most:
        has = f"{run.dataset} has {most:,}" if known else f"--max-samples allows {most:,}"
        return f"reports {total:,} samples; {has}"
    steps = num_batches(counts[TRAIN], run.batch_size) * run.local_epochs
    if steps > MOST_STEPS:
        return (
            f"reports {counts[TRAIN]:,} training samples, {steps:,} steps a round; at most"
            f" {MOST_STEPS:,} are possible: give a larger --batch-size"
        )
    if recipe.keeps_labels and counts[TRAIN] == 1:
        return (
            "reports a single training sample, whose loss would be sent; where labels stay at the"
            " clients each needs 2"
        )
    if report.class_counts and sum(report.class_counts) != counts[TRAIN]:
        return (
            f"reports {sum(report.class_counts):,} samples by their classes, but"
            f" {counts[TRAIN]:,} training samples"
        )
    outputs = 4 * math.prod(recipe.task.output_shape(classes))
    predictions = counts[TEST] * (recipe.task.label.num_bytes + outputs)
    if recipe.shares_labels and predictions > MOST_PREDICTION_BYTES:
        return (
            f"reports {counts[TEST]:,} test samples of {classes} classes, whose predictions would"
            f" take {megabytes(predictions)}; at most {megabytes(MOST_PREDICTION_BYTES)} are kept"
        )
    return ""


@functools.lru_cache(maxsize=4)
def _sizes(recipe: Recipe, shape: tuple[int, ...], num_classes: int, client: int) -> Sizes:
    return sizes_of(recipe, shape, num_classes, client)


def _too_large(recipe: Recipe, node: ServerNode, joined: Joined) -> str:
    """Return what a report makes too large: the model or the recorded steps; "" if neither."""
    run, report, client = recipe.run, joined.data, recipe.model_index(joined.client)
    sizes = _sizes(recipe, report.input_shape, len(report.classes), client)
    if ":" in run.dataset or run.partition == OWN:  # else the data set defines shape and classes
        named = f"reports {len(report.classes)} classes and samples of {list(report.input_shape)}"
        needed = server_bytes(recipe, sizes, run.most_clients)
        if why := why_too_large(needed, node, f"{named}: {run.model} for them"):
            return why
    # If the data set defines the number of samples, the run is too large and not the report.
    judged = node.role != "fed" and not _known_total(run)
    recorded = _recorded_bytes(recipe, sizes, report.num_samples[TRAIN]) if judged else 0
    free = shutil.disk_usage(node.out_path).free
    if recorded > free:
        return (
            f"reports {report.num_samples[TRAIN]:,} training samples, whose tensors take about"
            f" {megabytes(recorded)} of the server's disk; {megabytes(free)} are free: give the"
            " server --keep-tensors last or none, or fewer samples"
        )
    return ""


def _recorded_bytes(recipe: Recipe, sizes: Sizes, num_train: int) -> int:
    """Estimate how many bytes of the server's disk a client's steps take."""
    run, exchange, epoch_bytes = recipe.run, recipe.scheme.exchange, 0
    if exchange is Exchange.CUT:
        epoch_bytes = num_train * (recipe.task.label.num_bytes + 2 * sum(sizes.at_cuts))
    elif exchange is Exchange.WEIGHT_GRADS:
        epoch_bytes = num_batches(num_train, run.batch_size) * sizes.whole
    # One round's answers are stored for repeated steps, even if tensors are not recorded.
    rounds = max(recipe.keep.tensors.num_kept(run.rounds), 1)
    return round(run.participation * run.local_epochs * epoch_bytes * rounds)
