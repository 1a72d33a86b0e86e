"""Limits on what each side accepts from the other: files, their sizes and where they are stored."""

from sfl.archive.layout import ACTIVATIONS, LABELS
from sfl.conversation.cut import EVALUATION, TRAINING, own_transfers
from sfl.files.torch_file import TensorSpec, max_file_bytes, max_state_bytes
from sfl.model.topology import Holder, holds_last, hops_of, route
from sfl.strategy.schemes import Exchange
from sfl.strategy.split_model import SplitModel
from sfl.wire.messages import Limits, MessageType
from sfl.wire.payload import MakeStore
from sfl.wire.seal import OVERHEAD_BYTES


def client_limits(split: SplitModel, store: MakeStore) -> Limits:
    """Return the limits of a client for its server's messages."""
    weights = max_state_bytes(split.front_spec)
    limits = {MessageType.SEND_MODEL: weights, MessageType.SEND_AGGREGATED_MODEL: weights}
    if split.cuts:
        limits |= _tensor_limits(split, Holder.CLIENT)
    return Limits(payload_bytes=_sealed(split, limits), store=store)


def _sealed(split: SplitModel, limits: dict[MessageType, int]) -> dict[MessageType, int]:
    """Return limits with room for what sealing adds, where hops stand in between."""
    more = OVERHEAD_BYTES if hops_of(split.recipe.segments) else 0
    return {kind: size + more for kind, size in limits.items()}


def _tensor_limits(split: SplitModel, holder: Holder) -> dict[MessageType, int]:
    """Return the most bytes of each kind of tensor that a party receives at the model's cuts."""
    way = route(split.recipe.segments, holder)
    step, evaluation = split.recipe.run.batch_size + 1, split.largest_evaluation_batch
    specs: dict[MessageType, list[TensorSpec]] = {}
    for transfer in own_transfers(way):
        for messages, size in ((TRAINING, step), (EVALUATION, evaluation)):
            if not transfer.sends and transfer.kind in messages:
                spec = split.features_spec(size, transfer.link)
                specs.setdefault(messages[transfer.kind], []).append(spec)
    if holder is Holder.SERVER and split.recipe.shares_labels:
        labels_spec = split.recipe.task.labels_spec
        specs[MessageType.TRAINING_LABELS] = [labels_spec(step)]
        specs[MessageType.VALIDATION_LABELS] = [labels_spec(evaluation)]
    return {kind: max(max_file_bytes([s]) for s in of_kind) for kind, of_kind in specs.items()}


def server_limits(split: SplitModel, num_steps: int, store: MakeStore) -> Limits:
    """Return the server's limits for a client of at most ``num_steps`` steps a round."""
    limits = {MessageType.SEND_MODEL: max_state_bytes(split.front_spec)}
    task = split.recipe.task
    if split.cuts:
        limits |= _tensor_limits(split, Holder.SERVER)
    elif split.recipe.scheme.exchange is Exchange.WEIGHT_GRADS:
        limits[MessageType.TRAINING_GRADS] = max_state_bytes(split.parameters_spec)
    else:
        figures = max_file_bytes([task.steps_spec(num_steps)])
        limits[MessageType.TRAINING_FIGURES] = figures
    return Limits(payload_bytes=_sealed(split, limits), store=store)


def task_limits(split: SplitModel, store: MakeStore) -> Limits:
    """Return the limits of a further task's server for a client."""
    return Limits(payload_bytes=_tensor_limits(split, Holder.SERVER), store=store)


def hop_limits(split: SplitModel, store: MakeStore) -> Limits:
    """Return a hop's limits, for either of its neighbours: what it computes with or passes on."""
    weights, run = max_state_bytes(split.front_spec), split.recipe.run
    largest = [(TRAINING, run.batch_size + 1), (EVALUATION, split.largest_evaluation_batch)]
    limits = {MessageType.SEND_MODEL: weights, MessageType.SEND_AGGREGATED_MODEL: weights}
    for messages, size in largest:
        tensors = max(max_file_bytes([spec]) for spec in split.features_specs(size))
        labels = max_file_bytes([split.recipe.task.labels_spec(size)])
        limits |= {kind: labels if name == LABELS else tensors for name, kind in messages.items()}
    return Limits(payload_bytes=_sealed(split, limits), store=store)


def inference_limits(split: SplitModel, holder: Holder) -> Limits:
    """Return the limits of one side of split inference for the other's messages."""
    way, size = route(split.recipe.segments, holder), split.evaluation_batch
    specs = [
        split.features_spec(size, transfer.link)
        for transfer in own_transfers(way)
        if transfer.kind == ACTIVATIONS and not transfer.sends
    ]
    of_one = [max_file_bytes([spec]) for spec in specs]
    limits = {MessageType.INFERENCE_FEATURES: max(of_one, default=0)}
    if not holds_last(way):
        outputs = split.recipe.task.outputs_spec(size, split.num_classes)
        limits[MessageType.INFERENCE_OUTPUTS] = max_file_bytes([outputs])
    return Limits(payload_bytes=limits)
