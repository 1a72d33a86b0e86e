"""Look names up: in a registry (a plain dict), or as a user's own ``package.module:function``."""

import difflib
import importlib
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeVar

from sfl.errors import ConfigError, quoted, told

T = TypeVar("T")
R = TypeVar("R")
OWN = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", re.ASCII)  # a user's own function


NAMES = "{names}"  # in an option's help text: what its registry has
# Where an option's registry is. Imported for ``--help`` alone: torch takes seconds.
REGISTRIES = {
    "scheme": "sfl.strategy.schemes:SCHEMES",
    "topology": "sfl.model.topology:TOPOLOGIES",
    "fusion": "sfl.model.fusion:FUSIONS",
    "task": "sfl.model.task:TASKS",
    "tasks": "sfl.data.label_tasks:LABEL_TASKS",
    "model": "sfl.model.zoo:MODELS",
    "dataset": "sfl.data.datasets:DATASETS",
    "augment": "sfl.data.augment:AUGMENTATIONS",
    "partition": "sfl.data.partition:PARTITIONS",
    "optimizer": "sfl.model.optimizers:OPTIMIZERS",
    "lr_schedule": "sfl.model.schedule:SCHEDULES",
    "aggregation": "sfl.strategy.aggregate:RULES",
    "transport": "sfl.transport.transports:TRANSPORTS",
    "track": "sfl.tracking.trackers:TRACKERS",
    "to": "sfl.trained.kinds:KINDS",
}


def choices_of(option: str) -> list[str]:
    """Return the names in an option's registry, each with the options that it takes.

    Without the packages that a registry imports, say where the names are listed.
    """
    module, _, name = REGISTRIES[option].partition(":")
    try:
        known: Mapping[str, object] = getattr(importlib.import_module(module), name)
    except ImportError:
        return ["see docs/options.md"]
    defaults = {n: _options_of(row) for n, row in known.items()}
    options = {n: ",".join(f"{o}={v}" for o, v in of.items()) for n, of in defaults.items()}
    return [f"{n}[:{text}]" if text else n for n, text in options.items()]


def _options_of(row: object) -> Mapping[str, Any]:
    """Return the options of a registry's row: keyword-only arguments of a function or a class."""
    function = vars(row).get("__init__") if isinstance(row, type) else row
    return getattr(function, "__kwdefaults__", None) or {}


def named(kind: str, name: str, known: Mapping[str, T]) -> T:
    """Return the entry ``name`` of ``known``.

    Raises:
        ConfigError: there is none.
    """
    if name not in known:
        raise unknown_name(kind, name, known)
    return known[name]


def look_up(
    kind: str,
    name: str,
    known: Mapping[str, T],
    wrap: Callable[[Callable[..., object]], T],
    allowed: Collection[str] | None,
) -> T:
    """Return the entry ``name`` of ``known``, or ``wrap(function)`` of a user's own function.

    ``allowed`` lists the functions that may be imported; None allows any, since the name then comes
    from this machine's own command line. A name from a server, or from a recorded run, imports no
    module that this machine's own ``--allow-import`` does not list.

    Raises:
        ConfigError: no such entry, not allowed, or not importable.
    """
    if ":" not in name:
        return named(kind, name, known)
    if not OWN.fullmatch(name):
        raise ConfigError(f"the {kind} {quoted(name, 120)} is no package.module:function")
    if allowed is not None and name not in allowed:
        raise ConfigError(
            f"the {kind} {name!r} was named elsewhere, and this command line does not allow it;"
            f" if you trust that module, give --allow-import {name}"
        )
    module_name, _, function_name = name.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (Exception, SystemExit) as error:  # a user's own module
        raise ConfigError(f"cannot import the {kind} {name!r}: {told(error)}") from error
    if not callable(function):
        raise ConfigError(f"the {kind} {name!r} is no function")
    return wrap(function)


def with_options(kind: str, text: str, known: Mapping[str, Callable[..., R]]) -> Callable[..., R]:
    """Return the function or class that ``name`` or ``name:option=value,...`` names, so called.

    Its options are its keyword-only arguments, of the type of their defaults. It raises
    ``ValueError`` for a value out of range, which comes out as a ``ConfigError``.

    Raises:
        ConfigError: no such function, or an option that it does not take.
    """
    name, colon, rest = text.partition(":")
    function = named(kind, name, known)
    defaults = _options_of(function)
    options = {}
    for item in rest.split(",") if colon else []:
        option, _, value = item.partition("=")
        if option not in defaults:
            takes = ", ".join(defaults) or "none"
            raise ConfigError(f"--{kind} {text}: {name} has no option {option!r}; it has {takes}")
        try:
            options[option] = type(defaults[option])(value)
        except ValueError:
            wanted = type(defaults[option]).__name__
            raise ConfigError(f"--{kind} {text}: {option} must be of type {wanted}") from None

    def call(*arguments: object) -> R:
        try:
            return function(*arguments, **options)
        except (ValueError, OverflowError) as error:
            raise ConfigError(f"--{kind} {text}: {error}") from error

    return call


def unknown_name(kind: str, name: str, known: Iterable[str]) -> ConfigError:
    """Return the error for a name that no registry has, with the names near it, or all."""
    known = sorted(known)
    if near := near_names(name, known):
        return ConfigError(f"unknown {kind} {quoted(name)}; did you mean {' or '.join(near)}?")
    return ConfigError(f"unknown {kind} {quoted(name)}; there are {', '.join(known)}")


def near_names(name: str, known: Iterable[str]) -> list[str]:
    """Return the names that somebody may have meant, the nearest first."""
    by_lower = {one.lower(): one for one in known}
    near = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.5)
    return [by_lower[one] for one in near]
