"""Limits on what each side accepts from the other: files, their sizes and where they are stored."""

from sfl.files.torch_file import max_file_bytes, max_state_bytes
from sfl.strategy.schemes import Exchange
from sfl.strategy.split_model import SplitModel
from sfl.wire.messages import Limits, MessageType
from sfl.wire.payload import MakeStore


def client_limits(split: SplitModel, store: MakeStore) -> Limits:
    """Return the limits of a client for its server's messages."""
    weights = max_state_bytes(split.front_spec)
    limits = {MessageType.SEND_MODEL: weights, MessageType.SEND_AGGREGATED_MODEL: weights}
    if split.cuts:
        largest = split.features_spec(split.recipe.run.batch_size + 1)
        limits[MessageType.TRAINING_GRADS] = max_file_bytes([largest])
    return Limits(payload_bytes=limits, store=store)


def server_limits(split: SplitModel, num_steps: int, store: MakeStore) -> Limits:
    """Return the server's limits for a client of at most ``num_steps`` steps a round."""
    limits = {MessageType.SEND_MODEL: max_state_bytes(split.front_spec)}
    task = split.recipe.task
    if split.cuts:
        step, evaluation = split.recipe.run.batch_size + 1, split.evaluation_batch
        limits |= {
            MessageType.TRAINING_LABELS: max_file_bytes([task.labels_spec(step)]),
            MessageType.TRAINING_FEATURES: max_file_bytes([split.features_spec(step)]),
            MessageType.VALIDATION_LABELS: max_file_bytes([task.labels_spec(evaluation)]),
            MessageType.VALIDATION_FEATURES: max_file_bytes([split.features_spec(evaluation)]),
        }
    elif split.recipe.scheme.exchange is Exchange.WEIGHT_GRADS:
        limits[MessageType.TRAINING_GRADS] = max_state_bytes(split.parameters_spec)
    else:
        figures = max_file_bytes([task.steps_spec(num_steps)])
        limits[MessageType.TRAINING_FIGURES] = figures
    return Limits(payload_bytes=limits, store=store)
