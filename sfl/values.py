"""Values of options that are more than a number or a name."""

import math
import random
import re
from dataclasses import dataclass
from typing import NamedTuple

from sfl.errors import ConfigError, quoted


@dataclass(frozen=True)
class KeepTensors:
    """Which rounds' tensors stay on disk: every ``period``-th from round 0, or the last."""

    period: int  # 0: none of its own account
    last: bool

    @classmethod
    def parse(cls, text: str) -> "KeepTensors":
        """Return the policy that ``all``, ``last``, ``every:N`` or ``none`` names.

        Raises:
            ConfigError: the text is none of them.
        """
        fixed = {"all": cls(1, False), "last": cls(0, True), "none": cls(0, False)}
        if text in fixed:
            return fixed[text]
        every, _, number = text.partition(":")
        if every == "every" and number.isascii() and number.isdigit() and int(number) > 0:
            return cls(int(number), False)
        raise ConfigError(f"--keep-tensors {text!r}: give all, last, every:N or none")

    def stays(self, round_index: int) -> bool:
        """Say whether this round's files stay, whatever comes later."""
        return self.period > 0 and round_index % self.period == 0

    def records(self, round_index: int) -> bool:
        """Say whether this round's tensors are written at all."""
        return self.last or self.stays(round_index)

    @property
    def records_all(self) -> bool:
        """Whether every round's tensors are written."""
        return self.last or self.period == 1

    def num_kept(self, rounds: int) -> int:
        """Return of how many of ``rounds`` rounds the tensors lie on disk at the end."""
        return 1 if self.last else -(-rounds // self.period) if self.period else 0


KEEP_NOTHING = KeepTensors(0, False)


@dataclass(frozen=True)
class KeepModels:
    """Which rounds' models stay on disk: those that were asked for, and those that are needed.

    The tensors of a round are replayed with the models that it started from, and compared with
    those that it gave.
    """

    models: KeepTensors
    tensors: KeepTensors
    behind: int = 0  # how many more rounds others may go back than this folder's checkpoints
    best_by: str = ""  # metric of rounds.csv by which the best round so far stays as well

    @classmethod
    def parse(cls, text: str, tensors: KeepTensors = KEEP_NOTHING) -> "KeepModels":
        """Return the policy that ``all``, ``last``, ``every:N`` or ``best[:METRIC]`` names.

        Raises:
            ConfigError: the text is none of them.
        """
        if found := re.fullmatch(r"best(?::(\w{1,64}))?", text, re.ASCII):
            return cls(KeepTensors(0, True), tensors, best_by=found[1] or "val_loss")
        try:
            if text == "none":
                raise ConfigError("what a run goes on from stays")
            return cls(KeepTensors.parse(text), tensors)
        except ConfigError:
            raise ConfigError(f"--keep-models {text!r}: give {_KEEP_MODELS}") from None

    def stays(self, round_index: int) -> bool:
        """Say whether the models after a round stay when nothing goes on from them any more."""
        starts, ends = self.tensors.stays(round_index + 1), self.tensors.stays(round_index)
        return self.models.stays(round_index) or starts or ends

    def num_kept(self, rounds: int) -> int:
        """Return about how many sets of models lie on disk, at most, in ``rounds`` rounds."""
        tensors = 0 if self.tensors.last else 2 * self.tensors.num_kept(rounds)
        models = self.models.num_kept(rounds) + bool(self.best_by)
        return min(models + tensors + MODELS_IN_USE, rounds + 1)


_KEEP_MODELS = "all, last, every:N or best[:METRIC]"


@dataclass(frozen=True)
class StopWhen:
    """When a run stops early: its metric has not become better for ``patience`` rounds."""

    metric: str  # of rounds.csv; "": the run does not stop early
    patience: int = 0
    min_delta: float = 0.0  # a metric is better if it is so by more than this

    @classmethod
    def parse(cls, text: str) -> "StopWhen":
        """Return what ``METRIC:patience=N[,min_delta=X]`` means; "": never.

        Raises:
            ConfigError: the text has another form.
        """
        found = _STOP_WHEN.fullmatch(text)
        if text and not found:
            raise ConfigError(
                f"--stop-when {quoted(text, 80)}: give METRIC:patience=N[,min_delta=X], as"
                " val_loss:patience=5"
            )
        return cls(found[1], int(found[2]), float(found[3] or 0)) if found else cls("")


_STOP_WHEN = re.compile(
    r"(\w{1,64}):patience=([1-9]\d{0,8})(?:,min_delta=(\d{1,9}(?:\.\d{1,20})?(?:e-?\d\d?)?))?",
    re.ASCII,
)
MODELS_IN_USE = 3  # what two checkpoints start from, and what is being made
UNCUT = math.inf
_RATES = {"kbit": 1e3 / 8, "mbit": 1e6 / 8, "gbit": 1e9 / 8}  # bytes a second
_TIMES = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_PART = re.compile(r"(?:(jitter|loss)=)?(\d+(?:\.\d+)?)([a-z]*)", re.ASCII)


@dataclass(frozen=True)
class LinkShape:
    """What a link is like, each direction by itself. It does nothing if all is left as it is."""

    bytes_per_s: float = math.inf
    delay_s: float = 0.0
    jitter_s: float = 0.0  # up to so much more delay; nothing overtakes
    loss: float = 0.0  # probability that the connection breaks, for each 64 KiB that pass

    dark_until = 0.0

    @classmethod
    def parse(cls, text: str) -> "LinkShape":
        """Return what ``RATE,DELAY[,jitter=TIME][,loss=P]`` means; each part may be left out.

        ``100mbit,50ms,jitter=5ms,loss=0.001``. Rates are in kbit, mbit, gbit a second.

        Raises:
            ConfigError: the text means nothing.
        """
        given: dict[str, float] = {}
        for part in text.split(",") if text else ():
            found = _PART.fullmatch(part.strip())
            name, number, unit = found.groups(default="") if found else ("", "0", "?")
            value = float(number)
            if not name and unit in _RATES and value > 0:
                key, value = "bytes_per_s", value * _RATES[unit]
            elif name in ("", "jitter") and unit in _TIMES:
                key, value = "jitter_s" if name else "delay_s", value * _TIMES[unit]
            elif name == "loss" and not unit and value < 1:
                key = "loss"
            else:
                key = ""
            if not key or key in given:
                raise ConfigError(
                    f"--link {text}: {quoted(part, 40)} is none of a rate (100mbit), a delay"
                    " (50ms), jitter=5ms and loss=0.001, each once"
                )
            given[key] = value
        return cls(**given)

    @property
    def shapes(self) -> bool:
        return self != LinkShape()

    def draw_delay_s(self) -> float:
        return self.delay_s + (random.uniform(0, self.jitter_s) if self.jitter_s else 0.0)

    def cut_after(self) -> float:
        return random.expovariate(self.loss / 65536) if self.loss else UNCUT

    def count_cut(self) -> None:
        pass


class Position(NamedTuple):
    """Where in a run a message belongs; -1 and "" where it belongs nowhere in particular."""

    run: str = ""
    round: int = -1
    step: int = -1
    client: int = -1
    link: int = 0  # which cut of the model; 0 is the first


_UNITS = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}


def parse_bytes(text: str) -> int:
    """Parse a size such as ``500mb`` or ``1.5gb`` into bytes.

    Raises:
        ConfigError: the text is not a size.
    """
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)([kmgt]b)", text.strip().lower(), re.ASCII)
    count = round(float(found[1]) * _UNITS[found[2]]) if found else 0
    if not count:
        raise ConfigError(f"--memory-limit {text!r:.40}: give a size as 500mb or 4gb")
    return count
