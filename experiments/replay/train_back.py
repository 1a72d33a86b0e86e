"""Train another back on what a run recorded: ``experiments.replay RUN_DIR --train-back``."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from sfl import seeds
from sfl.archive.reader import Step
from sfl.config import RunConfig
from sfl.errors import RunError
from sfl.files.atomic import write_file
from sfl.files.torch_file import encode_state
from sfl.model.metrics import add_up
from sfl.model.segment import Segment, evaluate_step, train_step
from sfl.model.topology import BACK, Holder
from sfl.runtime.recorded_run import RecordedRun
from sfl.strategy.recipe import Recipe
from sfl.strategy.split_model import SplitModel
from sfl.values import Position


def train_back(recorded: RecordedRun, options: Namespace) -> None:
    """Train a fresh back on the activations of one round, and print its figures.

    A fifth of the recorded steps is held out. A round's activations come from a front that was
    still in training; by default the last round's are taken, whose front had settled most.

    Raises:
        RunError: no tensors are recorded there.
    """
    rounds = recorded.archive.rounds(options.client)
    chosen = max(rounds, default=0) if options.round is None else options.round
    steps = list(recorded.archive.steps(options.client, chosen))
    if not recorded.split.cuts:
        raise RunError(f"--scheme {recorded.run.scheme} has no cut-layer tensors to train on")
    if len(recorded.split.cuts) > 1 or recorded.recipe.joins:
        raise RunError(
            "--train-back takes a run with one cut, whose clients have steps of their own; this one"
            f" has --cut {recorded.run.cut} --topology {recorded.run.topology}"
        )
    if len(steps) < 2:
        raise RunError(f"{recorded.archive.root} has no tensors of --round {chosen}")
    changes = {name: getattr(options, name) for name in ("lr", "optimizer", "seed")}
    run = replace(recorded.run, **{n: v for n, v in changes.items() if v is not None})
    run.check()
    data = recorded.archive.environment()["data"]
    split = SplitModel.of_data(Recipe.of(run, recorded.allowed), data)
    back = split.segments(Holder.SERVER, recorded.device)[BACK]
    order = torch.randperm(len(steps), generator=seeds.generator(run.seed, seeds.OFFLINE, -1))
    num_held_out = max(len(steps) // 5, 1)
    held_out = [steps[i] for i in order[:num_held_out].tolist()]
    training = [steps[i] for i in order[num_held_out:].tolist()]
    title, num_steps = f"round {chosen + 1}/{run.rounds}", len(training)
    print(f"{title}: {num_steps} steps to train on, {len(held_out)} held out")
    for epoch in range(options.epochs):
        train_loss = _train_epoch(back, run, training, epoch)
        tally = add_up(evaluate_step(back, step.activations, step.labels)[0] for step in held_out)
        held = ", ".join(
            f"{name} {v:.4f}" for name, v in back.task.figures(tally, "held_out").items()
        )
        print(f"epoch {epoch + 1}/{options.epochs}: train_loss {train_loss:.4f}, {held}")
    if options.save:
        write_file(Path(options.save), encode_state(back.state()))
        print(f"the back lies in {options.save}")


def _train_epoch(back: Segment, run: RunConfig, steps: Sequence[Step], epoch: int) -> float:
    """Take every step once, in an order of the epoch's own; return the mean loss of a sample."""
    drawn = seeds.generator(run.seed, seeds.OFFLINE, epoch)
    loss_sum, samples = 0.0, 0
    for i in torch.randperm(len(steps), generator=drawn).tolist():
        at = Position(run.run, epoch, i, steps[i].client)
        figures, _ = train_step(back, steps[i].activations, steps[i].labels, at)
        back.update()
        loss_sum += figures.loss * figures.samples
        samples += figures.samples
    return loss_sum / samples
