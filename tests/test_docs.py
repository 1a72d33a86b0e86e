"""The README and the docs say what is true."""

import csv
import dataclasses
import re
from collections.abc import Collection
from pathlib import Path

import pytest

from sfl.archive.round_log import round_figures
from sfl.config import RunConfig, flag
from sfl.data.augment import AUGMENTATIONS
from sfl.data.datasets import DATASETS
from sfl.data.partition import OWN, PARTITIONS
from sfl.model.optimizers import OPTIMIZERS
from sfl.model.schedule import SCHEDULES
from sfl.model.task import TASKS
from sfl.model.zoo import MODELS
from sfl.nodes import ClientNode, ServerNode, SimulationNode
from sfl.options import parse_options
from sfl.strategy.aggregate import RULES
from sfl.strategy.schemes import SCHEMES
from sfl.tracking.trackers import TRACKERS
from sfl.weights.stores import WEIGHT_STORES
from sfl.wire.messages import MessageType
from tests.support.simulations import recorded

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^python3 -m venv .*$", README, flags=re.MULTILINE)


def test_there_are_two_commands_and_ci_runs_the_second() -> None:
    start = "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt "
    assert [c.removeprefix(start) for c in COMMANDS] == [
        "&& .venv/bin/python -m experiments.demo",
        "-r requirements-dev.txt && .venv/bin/python -m pytest -n 2 --dist loadfile",
    ]
    pattern = re.search(r"grep -E '(.*)' README.md", (ROOT / ".ci/run").read_text())
    assert pattern is not None
    assert re.findall(pattern[1], README, flags=re.MULTILINE) == [COMMANDS[1]]


def test_every_metric_is_defined(tmp_path: Path) -> None:
    run = recorded(tmp_path, rounds=1)
    defined = set(re.findall(r"`(\w+)`", (ROOT / "docs/metrics.md").read_text()))
    rows = csv.DictReader((run / "rounds/round_000.csv").read_text().splitlines())
    used = (
        {row["metric"] for row in rows}
        | set(round_figures(TASKS["classification"]))
        | {"took_part", "missing"}
    )
    assert len(used) > 15
    assert used - defined == set()


def test_every_tracker_is_in_the_table_with_its_options() -> None:
    page = (ROOT / "docs/metrics.md").read_text()
    rows = {row.split("`")[1]: row for row in page.splitlines() if row.startswith("| `")}
    for name, tracker in TRACKERS.items():
        for option, default in (tracker.__init__.__kwdefaults__ or {}).items():
            assert f"`{option}` ({default})" in rows[name], name


def test_every_name_that_can_be_chosen_is_on_its_page() -> None:
    page = (ROOT / "docs/options.md").read_text()
    for name in (*DATASETS, *PARTITIONS, OWN, *MODELS):
        assert f"`{name}" in page or f" {name}`" in page, name


@pytest.mark.parametrize(
    ("option", "names"),
    [
        ("scheme", SCHEMES), ("model", MODELS), ("dataset", DATASETS), ("optimizer", OPTIMIZERS),
        ("partition", {OWN, *PARTITIONS}), ("weights", WEIGHT_STORES), ("aggregation", RULES),
        ("lr_schedule", SCHEDULES), ("task", TASKS), ("augment", AUGMENTATIONS),
        ("track", TRACKERS),
    ],
)  # fmt: skip
def test_the_help_names_what_can_be_chosen(
    option: str, names: Collection[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse_options(["--help"], RunConfig, SimulationNode, prog="p", about="")
    flag = option.replace("_", "-")
    text = re.search(rf"^  --{flag} .*?(?=^  --|^$)", capsys.readouterr().out, re.M | re.S)
    assert text is not None
    assert set(names) - set(re.findall(r"[\w-]+", re.sub(r"-\n +", "-", text[0]))) == set()


def test_names_stand_in_their_registry_alone() -> None:
    """And as RunConfig's defaults."""
    allowed = {"schemes.py", "zoo.py", "datasets.py", "optimizers.py", "task.py", "config.py",
               "femnist.py"}  # fmt: skip
    names = "|".join((*SCHEMES, *MODELS, *DATASETS, *OPTIMIZERS, *TASKS))
    named = re.compile(rf"[\"`]({names})[\"`]|\b(sflv\d|sync-sgd)\b")
    files = [path for path in (ROOT / "sfl").rglob("*.py") if path.name not in allowed]
    assert [p.name for p in files if named.search(p.read_text())] == []


def test_every_scheme_has_its_page() -> None:
    index = (ROOT / "docs/schemes/README.md").read_text()
    for name, row in SCHEMES.items():
        page = (ROOT / f"docs/schemes/{name}.md").read_text()
        assert f"({name}.md)" in index
        for needed in ("```\n", "**What we do differently, and why.**"):
            assert needed in page, name
        for paper in re.findall(r"arXiv [\d.]+", row.source):
            assert paper in page, name
        assert row.pooled or "**Source.**" in page


def test_every_rule_is_in_the_table_with_its_options() -> None:
    index = (ROOT / "docs/schemes/README.md").read_text()
    rows = {n: row for row in index.splitlines() for n in re.findall(r"^\| (.*?) \|", row)}
    for name, rule in RULES.items():
        (row,) = (row for names, row in rows.items() if f"`{name}`" in names)
        for option, default in (rule.__kwdefaults__ or {}).items():
            assert f"`{option}` ({default:g})" in row, name


def test_every_option_that_the_pages_use_exists() -> None:
    pages = [README, *(page.read_text() for page in ROOT.glob("docs/**/*.md"))]
    known = {
        flag(field.name)
        for group in (RunConfig, ServerNode, ClientNode, SimulationNode)
        for field in dataclasses.fields(group)
    }
    known |= {"--config", "--help", "--version", "--train-back", "--epochs"}
    known |= {"--allow", "--source-ranges"}  # gcloud's
    known |= {"--allow-run-as-root", "--map-by"}  # mpirun's
    known |= {
        "--nodes",
        "--ntasks",
        "--ntasks-per-node",
        "--nodelist",
        "--job-name",
        "--time",
    }  # srun's
    known |= {"--dist"}  # pytest-xdist's
    known |= {"--nproc-per-node", "--max-restarts", "--no-python"}  # torchrun's
    known |= {"--schemes", "--delays-ms"}  # experiments.measure.run_times'
    # experiments.compare's
    known |= {"--partitions", "--topologies", "--seeds", "--over", "--jobs", "--sweep"}
    # experiments.on_ray's
    known |= {"--address", "--virtual-clients", "--clients-per-actor"}
    known |= {f"--{kind}-per-{of}" for kind in ("cpus", "gpus") for of in ("server", "actor")}
    known |= {"--head"}  # ray start's
    known |= {"--figures", "--tables", "--labels"}  # sfl-report's
    known |= {"--kills", "--cuts", "--flips", "--delay-ms", "--blackouts"}  # experiments.chaos's
    known |= {"--to", "--part", "--round", "--client"}  # experiments.export's
    known |= {"--once", "--interval"}  # experiments.watch's
    known |= {"--front", "--test-of", "--csv"}  # experiments.predict's
    known |= {"--train", "--name", "--no-decoder", "--share-samples"}  # experiments.web's
    known |= {"--ignore-scripts", "--prefix"}  # npm's
    known |= {"--num-cuts"}  # experiments.cuts's
    known |= {"--minutes"}  # experiments.gpu_check's
    known |= {"--memory", "--hop"}  # experiments.hostile's
    known |= {"--vgg-cut", "--resnet-cut"}  # experiments.measure.client_cost's
    known |= {"--rows", "--blocks", "--steps", "--hosts"}  # bench's, measure.many_clients'
    known |= set(
        re.findall(r"--[a-z-]+", "\n".join(re.findall(r"(?:gcloud|docker) .*", "\n".join(pages))))
    )
    assert {
        o for page in pages for o in re.findall(r"(?<![\w-])--[a-z][a-z-]+", page)
    } - known == set()


def test_the_protocol_page_names_every_message() -> None:
    page = (ROOT / "docs/protocol.md").read_text()
    assert [t for t in MessageType if t not in page] == []


@pytest.mark.parametrize("page", [ROOT / "README.md", *ROOT.glob("docs/**/*.md")])
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", [ROOT / "README.md", *ROOT.glob("docs/**/*.md")])
def test_what_examples_import_is_there(page: Path) -> None:
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S):
        for line in re.findall(r"^(?:from|import) sfl.*", block, re.M):
            exec(line, {})
