"""``sfl-report``: runs side by side, on one page; its figures and tables as files, if wanted."""

import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from sfl.errors import ConfigError, SflError, shortened
from sfl.files.atomic import write_file
from sfl.interactive.drawing import styled
from sfl.interactive.run import Run
from sfl.reports import figures, tables
from sfl.reports.gathered import Confusion, Group, confusion, gather
from sfl.reports.page import Section, render

FORMATS = ("pdf", "svg", "png")
MOST_OF_NOTE = 400  # characters
MOST_DRAWN = 12  # groups that have figures of their own


def write_report(
    runs: Sequence[Run],
    out: Path,
    *,
    labels: Sequence[str] = (),
    formats: Sequence[str] = (),
    with_tables: bool = False,
) -> list[Path]:
    """Write the page, and beside it the figures in these formats, and the tables as CSV and LaTeX.

    ``out``: the page's file, or a folder that takes it as ``report.html``: one that is there, or a
    name without a suffix.
    Return the paths of the files, the page first.

    Raises:
        ConfigError: there is no such format, or the labels are too many or too few.
    """
    if unknown := [name for name in formats if name not in FORMATS]:
        raise ConfigError(f"--figures {unknown[0]}: give some of {', '.join(FORMATS)}")
    groups = gather(runs, labels)
    out = out / "report.html" if out.is_dir() or not out.suffix else out
    out.parent.mkdir(parents=True, exist_ok=True)
    with styled():
        sections = list(_sections(groups))
        page = render(_title(groups), _about(groups), sections)
        paths = [out]
        write_file(out, page.encode())
        for picture in (p for section in sections for p in section.pictures):
            for kind in formats:
                paths.append(out.with_name(f"{out.stem}_{_file_name(picture.name)}.{kind}"))
                picture.figure.savefig(paths[-1], dpi=200)
    for name, table in _tables(groups).items() if with_tables else ():
        csv, tex = (out.with_name(f"{out.stem}_{name}.{kind}") for kind in ("csv", "tex"))
        table.to_csv(csv, index=False)
        table.to_latex(tex, index=False, escape=True)  # with booktabs' lines
        paths += [csv, tex]
    return paths


def _file_name(name: str) -> str:
    """Return a name that may have a strange column's in it as a part of a file's name."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", name)[:80]


def _title(groups: Sequence[Group]) -> str:
    runs = [run for group in groups for run in group.runs]
    names = ", ".join(run.name for run in runs)
    return shortened(f"{'Run' if len(runs) == 1 else 'Runs'} {names}", 120)


def _about(groups: Sequence[Group]) -> str:
    num_runs = sum(len(group.runs) for group in groups)
    if num_runs == len(groups):
        return ""
    return (
        f"{num_runs} runs; those that differ in the seed alone are one curve and one row: mean and"
        " standard deviation over their seeds."
    )


def _tables(groups: Sequence[Group]) -> dict[str, pd.DataFrame]:
    """Return the tables that are written as files."""
    return {
        "final": tables.final(groups),
        "clients": tables.by_client(groups),
        "bytes": tables.traffic(groups),
        "seconds": tables.times(groups),
        "options": tables.compared_options(groups).differ,
    }


def _sections(groups: Sequence[Group]) -> list[Section]:
    drawn = groups[:MOST_DRAWN]
    left_out = [f"Drawn of the first {MOST_DRAWN} of {len(groups)}."] if groups != drawn else []
    found, notes = _confusions(drawn)
    of_clients = [p for k, g in enumerate(drawn) for p in figures.of_clients(g, f"clients_{k}")]
    options, environments = tables.compared_options(groups), tables.compared_environments(groups)
    troubles, several = tables.troubles(groups), len(groups) > 1
    return [
        Section(
            "Configuration",
            f"Options that differ{'' if several else ' from the defaults'}.",
            [tables.overview(groups), options.differ],
            folded={"options that are the same" if several else "all others": options.same},
        ),
        Section(
            "Results",
            "After the last finished round: loss in nats, shares of the samples. Without test"
            " figures, the run is not over, or nobody has a test set.",
            [tables.final(groups)],
            list(figures.curves(groups)),
            [f"{name}: {shortened(why, MOST_OF_NOTE)}" for name, why in _stopped(groups)],
        ),
        Section(
            "Clients",
            "After the last finished round; curves are of one seed.",
            [tables.by_client(groups)],
            of_clients,
            left_out,
        ),
        Section(
            "Confusion",
            "Test samples by class, added up over clients and seeds; darker is a larger share.",
            pictures=list(figures.confusions(drawn, found)),
            notes=[*left_out, *notes],
        ),
        *_of_costs(groups, drawn, left_out),
        Section(
            "Failures and recoveries",
            "Lines of the server's log." if len(troubles) else "The server's log tells of none.",
            [troubles] if len(troubles) else [],
        ),
        Section(
            "Environment",
            "What differs." if len(environments.differ) else "",
            [environments.differ] if len(environments.differ) else [],
            folded={"what is the same" if several else "all of it": environments.same},
        ),
    ]


def _of_costs(
    groups: Sequence[Group], drawn: Sequence[Group], left_out: Sequence[str]
) -> list[Section]:
    """Return what the runs took: bytes, time, and who waited for whom."""
    costs = {picture.name: [picture] for picture in figures.costs(groups)}
    gantts = [figures.gantt(group, f"round_{k}") for k, group in enumerate(drawn)]
    no_spans = [
        f"{group.label}: its files do not tell when clients began and ended."
        for group, picture in zip(drawn, gantts, strict=True)
        if picture is None
    ]
    return [
        Section(
            "Bytes",
            "MB of a round, all clients together, up to the server and down from it: by content,"
            " and by link where there are several cuts.",
            [tables.traffic(groups)],
            costs.get("bytes", []),
        ),
        Section(
            "Time",
            "Seconds: of a round from start to end, and in it of one client on average.",
            [tables.times(groups)],
            costs.get("seconds", []),
        ),
        Section(
            "Who waited for whom",
            "The round of median length of one seed, by the server's clock.",
            pictures=[picture for picture in gantts if picture],
            notes=[*left_out, *no_spans],
        ),
    ]


def _stopped(groups: Sequence[Group]) -> list[tuple[str, str]]:
    """Return the runs that --stop-when ended, and why."""
    runs = [run for group in groups for run in group.runs]
    return [(run.name, why) for run in runs if (why := tables.why_stopped(run))]


def _confusions(groups: Sequence[Group]) -> tuple[dict[str, Confusion], list[str]]:
    """Return the confusion of each group that has one, by label, and why others have none."""
    found, notes = {}, []
    for group in groups:
        try:
            found[group.label] = confusion(group)
            missing = found[group.label].missing
        except SflError as error:
            missing = [str(error)]
        notes += [f"{group.label}: not drawn: {shortened(why, MOST_OF_NOTE)}" for why in missing]
    return found, notes
