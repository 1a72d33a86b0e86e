"""Options from the command line and from files, derived from the dataclasses of ``sfl.config``."""

import argparse
import dataclasses
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, NoReturn, TypeVar, get_args, get_type_hints

from sfl import __version__
from sfl.config import RunConfig, flag
from sfl.errors import ConfigError, command, quoted
from sfl.files import strict_json
from sfl.files.regular_files import read_plain
from sfl.nodes import ClientNode, ServerNode, SimulationNode
from sfl.registry import NAMES, choices_of, near_names, unknown_name
from sfl.trusted_imports import remembered

T = TypeVar("T")
# The groups of --help, in order, with their options; each option stands in one of them.
GROUPS = {
    "run": "run resume serve scheme clients max_clients participation rounds test_every stop_when"
    " local_epochs server_order seed role next server fed_server task_servers client_id client_ids"
    " check_ away",
    "data": "dataset image_size augment normalize partition batch_size data_dir cache_dir",
    "model": "model init init_checksum cut topology fusion label_client party_models task tasks"
    " task_weights",
    "training": "optimizer lr lr_schedule lr_rounds momentum weight_decay optimizer_state clip_norm"
    " class_weights freeze fedprox_mu aggregation aggregation_weights",
    "weights": "weights weights_timeout allow_weights",
    "security": "keep_labels share_figures token_file next_token_file seal_file tls_cert tls_key"
    " tls_ca tls_client_ca insecure allow_import memory_limit max_samples max_pending",
    "failures": "on_missing round_timeout min_clients peer_timeout connect_timeout"
    " reconnect_timeout on_nonfinite",
    "this machine": "device client_device threads host port advertise transport at_once out"
    " on_end keep_tensors keep_models profile track link",
}


def _value_types(config_class: Any) -> dict[str, tuple[type, ...]]:
    """Return for each option the types that its value may have."""
    hints = get_type_hints(config_class)
    fields = dataclasses.fields(config_class)
    types = {f.name: hints[f.name] for f in fields}
    return {n: get_args(t) if isinstance(t, UnionType) else (t,) for n, t in types.items()}


def from_values(config_class: type[T], values: dict[str, Any], source: str) -> T:
    """Build a config from plain values, checking each one's type and range.

    Raises:
        ConfigError: an unknown option, or a value of another type or out of range; ``source`` says
            where it came from.
    """
    types = _value_types(config_class)
    checked = {}
    for name, value in values.items():
        if name not in types:
            raise unknown_name(f"option in {source}", name, types)
        if float in types[name] and type(value) is int and abs(value) < 2**53:
            value = float(value)
        if type(value) not in types[name]:
            kind = types[name][0].__name__
            raise ConfigError(f"{source}: {name} = {quoted(value)} is not of type {kind}")
        checked[name] = value
    config = config_class(**checked)
    config.check()  # type: ignore[attr-defined]
    return config


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` that wants whole names, and whose errors are one ``ConfigError``.

    A program that passes on what it does not know must not take ``--seed`` for its ``--seeds``.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)
        version = f"SFL {__version__}"
        self.add_argument(
            "--version", action="version", version=version, help="say which SFL it is"
        )

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        return self._without_rest(*self.parse_known_args(args, namespace))

    def parse_mixed_args(self, args: Any = None) -> Any:
        """Do as ``parse_args``; options may stand between the arguments of one list."""
        return self._without_rest(*self.parse_known_intermixed_args(args))

    def _without_rest(self, found: Any, rest: Sequence[str]) -> Any:
        if rest:
            raise self._unknown(rest)
        return found

    def format_help(self) -> str:
        """Return the help text, with the names that the registries have."""
        for action in self._actions:
            if action.help and NAMES in action.help:
                action.help = action.help.replace(NAMES, ", ".join(choices_of(action.dest)))
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see --help)")

    def _unknown(self, rest: Sequence[str]) -> ConfigError:
        """Return the error for arguments that no option takes."""
        options = [argument.partition("=")[0] for argument in rest if argument.startswith("--")]
        if not options:
            return ConfigError(f"unexpected argument {quoted(rest[0])} (see --help)")
        name = options[0].removeprefix("--").replace("-", "_")
        for program, groups in _PROGRAMS.items():
            if any(name in names_of(group) for group in groups):
                return ConfigError(
                    f"{options[0]} is an option of {command(program)}, not of {self.prog}"
                )
        near = near_names(options[0], self._option_string_actions)
        hint = f"did you mean {' or '.join(near)}?" if near else "see --help"
        return ConfigError(f"unknown option {quoted(options[0])}; {hint}")


def parse_options(
    argv: Sequence[str] | None, *groups: Any, prog: str, about: str
) -> tuple[Any, ...]:
    """Return one instance of each config class in ``groups``, from file and command line.

    Raises:
        ConfigError: a bad option, or a configuration file that cannot be read.
    """
    parser = Parser(prog=prog, description=about, usage=f"{prog} [--OPTION VALUE ...]")
    parser.add_argument("--config", metavar="FILE", help="TOML file, or a recorded config.json")
    tables = {group.table: group for group in groups}
    _add_options(parser, groups)
    typed = vars(parser.parse_args(argv))
    path = typed.pop("config", None)
    values = (_from_file(Path(path), tables) if path else {}) | typed
    if values.get("resume"):
        values = _resumed(Path(values["resume"]), values)
    return tuple(
        from_values(group, {n: v for n, v in values.items() if n in names_of(group)}, "the options")
        for group in groups
    )


def _add_options(parser: Parser, config_classes: Sequence[Any]) -> None:
    """Add the options of these classes, in the groups of ``GROUPS``."""
    known: dict[str, tuple[Any, tuple[type, ...]]] = {}
    for config_class in config_classes:
        known |= _specs_of(config_class)
    for title, names in GROUPS.items():
        group = parser.add_argument_group(title)
        for name in names.split():
            if name in known:
                _add_option(group, *known[name])


def _specs_of(config_class: Any) -> dict[str, tuple[Any, tuple[type, ...]]]:
    """Return the field of each option, and the types that its value may have."""
    types = _value_types(config_class)
    return {f.name: (f, types[f.name]) for f in dataclasses.fields(config_class)}


def add_options(parser: Parser, config_class: Any, names: str) -> None:
    """Add some options of a class, for a program that takes no others; those not typed are left out
    of what the parser returns.
    """
    specs = _specs_of(config_class)
    for name in names.split():
        _add_option(parser, *specs[name])


def _add_option(group: Any, spec: Any, kinds: tuple[type, ...]) -> None:
    how: dict[str, Any] = {"action": "store_true"}
    kind = kinds[0]
    choices, shown = spec.metadata["choices"], ""
    if kind is not bool:
        how = {"type": _number_or_text if str in kinds[1:] else kind}
        how["metavar"] = spec.metadata["form"] or kind.__name__.upper()
        shown = "" if spec.default in (None, "") else f" (default: {spec.default})"
    if choices:
        how |= {"choices": choices, "metavar": None}
    text = (spec.metadata["help"] + shown).replace("%", "%%")
    group.add_argument(flag(spec.name), dest=spec.name, default=argparse.SUPPRESS, help=text, **how)


def _number_or_text(text: str) -> int | str:
    return int(text) if text.isascii() and text.isdigit() else text


_ALL_OPTIONS = frozenset(
    spec.name
    for group in (RunConfig, ServerNode, ClientNode, SimulationNode)
    for spec in dataclasses.fields(group)
)
_PROGRAMS: Mapping[str, Sequence[Any]] = {
    "server": (RunConfig, ServerNode),
    "client": (ClientNode,),
    "simulate": (SimulationNode,),
}
OWN_ALONE = ("on_end",)  # never taken from a recorded run: it starts a command
CAN_GROW = frozenset({"rounds"})  # when a run goes on
# What may stand in each table of a file; what concerns one machine alone, in any machine's.
_TABLES = {g.table: g for g in (RunConfig, ServerNode, ClientNode, SimulationNode)}


def _from_file(path: Path, groups: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options in a file that this program knows.

    One file may serve all machines: it may have tables ``[run]``, ``[server]`` and ``[client]``,
    and what stands outside them is for every program that knows it. A recorded ``config.json``
    gives all but the run's name, since a run is never written twice.
    """
    recorded = path.suffix == ".json"
    try:
        content = path.read_bytes()
        values = strict_json.loads(content) if recorded else tomllib.loads(content.decode("utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from error
    except ValueError as error:  # bad UTF-8, bad JSON, bad TOML
        raise ConfigError(f"--config {path}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"--config {path}: is no table of options")
    if recorded:
        for name in ("run", "resume", *OWN_ALONE):
            values.pop(name, None)
    tables = {n: v for n, v in values.items() if n in _TABLES and isinstance(v, dict)}
    outside = {n: v for n, v in values.items() if n not in tables}
    chosen: dict[str, Any] = {}
    for title, options in {"": outside, **tables}.items():
        for key, value in options.items():
            name = _name_of(path, title, key, value)
            in_group = title in groups if title else True
            if in_group and value is not None and any(name in names_of(g) for g in groups.values()):
                chosen[name] = value
    return chosen


def _name_of(path: Path, title: str, key: str, value: object) -> str:
    """Return the option that a key of a file's table names; ``title`` "": outside the tables.

    Raises:
        ConfigError: it names none, or none that may stand there.
    """
    name = key.replace("-", "_")
    if not title and isinstance(value, dict):
        raise unknown_name(f"table in {path}", key, _TABLES)
    if name not in _ALL_OPTIONS:
        raise unknown_name(f"option in {path}", key, _ALL_OPTIONS)
    if title and name not in names_of(_TABLES[title]):
        raise ConfigError(f"--config {path}: {key} is no option of the table [{title}]")
    return name


def _resumed(folder: Path, values: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a run that goes on: those that it had, and what may be new.

    Raises:
        ConfigError: no run lies there, or an option of the run differs that must not.
    """
    path = folder / "config.json"
    try:
        recorded = strict_json.loads(read_plain(path))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"--resume {folder}: cannot read {path.name}: {reason}") from error
    if not isinstance(recorded, dict):
        raise ConfigError(f"--resume {folder}: {path.name} is no table of options")
    given = {n: v for n, v in values.items() if n in names_of(RunConfig) | {"init"}}
    check_goes_on({"init": ""} | recorded, given)
    # The folder may be somebody else's: what it imports and starts, this command line says.
    for name in ("allow_import", *OWN_ALONE):
        recorded.pop(name, None)
    model, allowed = str(recorded.get("model")), str(values.get("allow_import", "")).split(",")
    if ":" in model and model not in (values.get("model"), *allowed, *remembered()):
        raise ConfigError(
            f"--resume {folder}: its model {quoted(model, 120)} would be imported; if you trust"
            f" that module, give --allow-import {model}"
        )
    return recorded | values


def check_goes_on(recorded: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """See that the options of a run are those that it was recorded with, where they must be.

    Raises:
        ConfigError: one differs.
    """
    for name in sorted(wanted.keys() & recorded.keys() - CAN_GROW):
        if wanted[name] != recorded[name]:
            raise ConfigError(
                f"{flag(name)} {wanted[name]}: the run has {recorded[name]}; of a run that goes on"
                f" only {', '.join(map(flag, sorted(CAN_GROW)))} may differ"
            )


def names_of(config_class: Any) -> set[str]:
    """Return the names of a config class's options."""
    return {spec.name for spec in dataclasses.fields(config_class)}
