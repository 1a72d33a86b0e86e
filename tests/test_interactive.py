"""A run in a Python session: its figures, its trained model and the samples behind its steps."""

import csv
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib
import pandas as pd
import pytest
import torch

import sfl
from sfl.config import RunConfig
from sfl.data.datasets import dataset_spec
from sfl.errors import ConfigError, DataError, IntegrityError, RunError
from sfl.model.zoo import build, model_spec
from tests.support.made_data import write_own
from tests.support.models import bn_dropout
from tests.support.runs import BN_DROPOUT
from tests.support.simulations import simulated

matplotlib.use("Agg")
ROOT = Path(__file__).parent.parent
SMALL = {"rounds": 2, "run": "r", "batch_size": 64, "model": "mlp"}


def run_of(out: Path, **options: object) -> sfl.Run:
    return sfl.simulate(RunConfig(**SMALL | options), out=str(out))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> sfl.Run:
    return run_of(tmp_path_factory.mktemp("run"))


@pytest.mark.slow
def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, sfl; assert 'simulate' in dir(sfl);"
        "print({'torch', 'pandas', 'numpy', 'matplotlib'} & sys.modules.keys());"
        "print(sfl.simulate.__module__)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["set()", "sfl.interactive.run"], done.stderr
    with pytest.raises(AttributeError, match="no attribute 'simulated'"):
        _ = sfl.simulated


def test_the_frames_have_what_the_files_have(run: sfl.Run) -> None:
    rows = list(csv.DictReader((run.path / "rounds.csv").read_text().splitlines()))
    assert list(run.rounds.columns) == list(rows[0])
    assert [repr(v) for v in run.rounds["train_loss"].tolist()] == [r["train_loss"] for r in rows]
    assert run.rounds["took_part"].tolist() == [r["took_part"] for r in rows]
    assert run.rounds["missing"].tolist() == [""] * 2
    assert list(run.steps.columns) == ["round", "step", "client", "loss", "acc"]
    written = [
        (row["client"], row["file"], row["value"])
        for r in range(2)
        for row in csv.DictReader((run.path / f"rounds/round_00{r}.csv").read_text().splitlines())
        if row["metric"] == "loss"
    ]
    ours = {
        (str(s.client), f"labels_{s.round}_{s.step}.pt", repr(s.loss))
        for s in run.steps.itertuples()
    }
    assert ours == set(written)
    assert len(written) == len(ours) == len(run.steps) > 50
    assert run.config.model == "mlp"
    assert run.config.cut == 3


# What is recorded, and where: the server has predictions and weights, or some are at the clients.
RUNS = {
    "vanilla": {},
    "relayed": {"scheme": "sl"},
    "u-shaped": {"model": "lenet5", "cut": "3,9"},
    "fl": {"scheme": "fl"},
    "own-fronts": {"scheme": "sflv3"},
    "own-fronts-and-tails": {"scheme": "sflv3", "cut": "1,4"},
    "batch-norm": {"model": BN_DROPOUT, "cut": 6, "batch_size": 200, "partition": "dirichlet:0.5"},
    "pooled": {"scheme": "central"},
    "over-hops": {"topology": "multi-hop", "cut": "1,4"},
    "vertical": {"partition": "vertical", "topology": "vertical"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_the_model_gives_the_recorded_predictions_bit_for_bit(name: str, tmp_path: Path) -> None:
    run = run_of(tmp_path, **RUNS[name], keep_tensors="none")
    right = samples = 0
    clients = [0] if name in ("pooled", "vertical") else [0, 1, 2]
    for client in clients:
        model = run.model(client=client if name.startswith("own") else None)
        assert not any(module.training for module in model.modules())
        with torch.no_grad():
            if name == "vertical":  # each client has columns of its own; one has the labels
                batches = [list(run.batches("test", k)) for k in range(3)]
                outputs = [model(*(x for x, _ in parts)) for parts in zip(*batches, strict=True)]
                labels = torch.cat([y for _, y in batches[0]])
            else:
                outputs = [model(x) for x, _ in run.batches("test", client)]
                labels = torch.cat([y for _, y in run.batches("test", client)])
        kept = run.predictions(client)
        assert torch.equal(torch.cat(outputs), kept["logits"])
        assert torch.equal(labels, kept["labels"])
        right += int((kept["logits"].argmax(1) == labels).sum())
        samples += len(labels)
    assert samples == 1000
    assert run.rounds["test_acc"].iloc[-1] == right / samples
    assert run.differences == []


@pytest.mark.parametrize("model", ["mlp", BN_DROPOUT])
def test_the_weights_fit_the_model_before_it_was_cut(model: str, tmp_path: Path) -> None:
    cut = 6 if model == BN_DROPOUT else 3
    run = run_of(tmp_path, model=model, cut=cut, batch_size=200, rounds=1, keep_tensors="none")
    allowed = {model}
    plain = build(model_spec(model, allowed), (1, 28, 28), 10, seed=7)
    if model == BN_DROPOUT:
        plain = bn_dropout((1, 28, 28), 10)
    plain.load_state_dict(run.model().state_dict())
    plain.eval()
    x, _ = next(run.batches("test"))
    with torch.no_grad():
        whole = run.model()(x)
        assert torch.equal(plain(x), whole)
        assert torch.equal(run.back()(run.front()(x)), whole)
        assert not torch.equal(run.model(round=-1)(x), whole)
    start = build(model_spec(model, allowed), (1, 28, 28), 10, seed=0).state_dict()
    for key, value in run.model(round=-1).state_dict().items():
        assert torch.equal(value, start[key])


def test_the_samples_behind_a_step_give_its_labels_and_activations(run: sfl.Run) -> None:
    spec = dataset_spec("mnist-5k")
    train, _ = spec.load(None)
    steps = list(run.tensors())
    assert len(steps) == len(run.steps)
    seen = {k: [] for k in range(3)}
    for step in steps:
        behind = run.samples(step)
        assert behind.client == step.client
        assert torch.equal(behind.y, step.labels)
        assert torch.equal(train.y[behind.indices], step.labels)
        pixels = train.take(behind.indices).x.float() / 255
        assert torch.equal((pixels - torch.tensor(spec.mean)) / torch.tensor(spec.std), behind.x)
        if step.step == 0:  # a later one has a front that is not recorded
            front = run.front(round=step.round - 1)
            assert torch.equal(front(behind.x), step.activations)
        if step.round == 0:
            seen[step.client] += behind.indices.tolist()
    assert sum(map(len, seen.values())) == len(set().union(*seen.values())) == 3202
    (step,) = (s for s in run.tensors(client=1, round=1) if s.step == 2)
    rows = run.steps.query("client == 1 and round == 1 and step == 2")
    for same in (rows.iloc[0], next(rows.itertuples())):  # a row of the frame, either way
        assert torch.equal(run.samples(same).indices, run.samples(step).indices)


@pytest.mark.slow
def test_the_samples_of_own_fronts_and_pooled_data(tmp_path: Path) -> None:
    ways: dict[str, dict[str, object]] = {
        "own": {"scheme": "sflv3", "partition": "shards:2", "augment": "crop:padding=2"},
        "vertical": {"partition": "vertical", "topology": "vertical", "label_client": 1},
    }
    for name, options in ways.items():
        run = run_of(tmp_path / name, local_epochs=2, **options)
        for step in run.tensors(round=1):
            behind = run.samples(step)
            if name == "own" or step.client == 1:
                assert torch.equal(behind.y, step.labels)
            if step.step == 0:
                front = run.front(round=0, client=step.client)
                assert torch.equal(front(behind.x), step.activations)
    pooled = run_of(tmp_path / "pooled", scheme="central", rounds=1)
    train, _ = dataset_spec("mnist-5k").load(None)
    labels = [train.y[pooled.samples(step).indices] for step in pooled.tensors()]
    assert torch.equal(torch.cat(labels), torch.cat([s.labels for s in pooled.tensors()]))


def test_normalisation_and_pictures(run: sfl.Run, tmp_path: Path) -> None:
    said = run.normalisation
    assert (said.mean, said.std) == ((0.1307,), (0.3081,))
    assert (said.input_shape, said.classes) == ((1, 28, 28), tuple("0123456789"))
    with pytest.MonkeyPatch.context() as patch:  # a user's own may have ints
        patch.setattr(sfl.Run, "data_spec", replace(run.data_spec, mean=0, std=1))
        assert repr((run.normalisation.mean, run.normalisation.std)) == "((0.0,), (1.0,))"
    axes = run.plot()
    lines = {line.get_label(): list(line.get_ydata()) for line in axes[0].get_lines()}
    assert lines["training"] == run.rounds["train_loss"].tolist()
    other = run_of(tmp_path, scheme="fl", lr=0.01, normalize="mean=0.5,std=0.25")
    assert other.normalisation.mean == (0.5,)
    axes = sfl.plot([run, other])
    assert [line.get_label() for line in axes[1].get_lines()][::2] == [
        "scheme sflv1, normalize -, lr 0.001, training",
        "scheme fl, normalize mean=0.5,std=0.25, lr 0.01, training",
    ]
    assert len(axes[1].get_lines()) == 4
    axes = sfl.plot([run, other], labels=["_a", "b"])  # of "_..." matplotlib makes no legend
    assert [text.get_text().strip()[:2] for text in axes[0].get_legend().get_texts()][::2] == [
        "_a",
        "b,",
    ]
    path = tmp_path / "curves.png"
    axes[0].figure.savefig(path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_what_is_not_here_is_said(tmp_path: Path) -> None:
    path = simulated(tmp_path / "a", model="mlp", scheme="sflv3", keep_tensors="none")
    own = sfl.open_run(path)
    with pytest.raises(
        RunError, match=r"a front of its own: say whose, with client= or --client, of 0, 1, 2"
    ):
        own.model()
    moved = tmp_path / "brought/r/client_2"
    moved.parent.mkdir(parents=True)
    shutil.move(tmp_path / "a/client/r/client_2", moved)
    with pytest.raises(RunError, match=r"client_2.*of its machine.*bring that folder here"):
        sfl.open_run(path).front(client=2)
    assert len(sfl.open_run(path, clients=[moved]).front(client=2)) == 3
    with pytest.raises(RunError, match=r"a is no folder of a run: it has no manifest"):
        sfl.open_run(path, clients=[tmp_path / "a"])
    other = shutil.copytree(moved, tmp_path / "brought/s/client_2")
    with pytest.raises(RunError, match=r"s/client_2 is no client's folder of .*server/r: "):
        sfl.open_run(path, clients=[moved, other])
    with pytest.raises(RunError, match=r"round 2: .* has finished 2 rounds"):
        own.front(round=2, client=0)
    with pytest.raises(RunError, match="has no client_3"):
        own.front(client=3)
    with pytest.raises(RunError, match="has no step 99 of round 0"):
        own.samples(pd.Series({"round": 0, "step": 99, "client": 0}))
    with pytest.raises(ConfigError, match="or a row of steps"):
        own.samples(3)
    for unknown in {"client": 3}, {"round": 2}:
        with pytest.raises(RunError, match=r"has no (client_3|round 2)"):
            own.tensors(**unknown)
    with pytest.raises(RunError, match="no part 'tests': give one of train, validation, test"):
        next(own.batches("tests"))
    with pytest.raises(RunError, match=r"no test set was evaluated after round 1$"):
        own.predictions(round=0)
    vertical = SMALL | {"topology": "vertical", "partition": "vertical", "clients": 2}
    joined = sfl.simulate(RunConfig(**vertical), out=str(tmp_path / "v"), track="csv", away="1:0")
    assert (joined.path / "tracked/figures.csv").is_file()
    assert joined.rounds["missing"][0].startswith("client_1")
    with pytest.raises(RunError, match="has the fronts of all clients: leave out client=1"):
        joined.model(client=1)
    of_client = sfl.open_run(tmp_path / "v/client/r/client_0")  # a simulation's has weights alone
    for read in (lambda: of_client.config, lambda: of_client.rounds, of_client.model):
        with pytest.raises(RunError, match=r"client_0 has no \w+.\w+: give .* a server's run"):
            read()
    with pytest.raises(DataError, match=r"no folder .*client_0: a simulation reads client_0's own"):
        run_of(tmp_path / "o", partition="own")
    whole = run_of(tmp_path / "b", scheme="fl", rounds=3, keep_models="last")
    with pytest.raises(RunError, match="no segment back; it has front"):
        whole.back()
    with pytest.raises(RunError, match="was removed, as --keep-models asks"):
        whole.model(round=0)
    write_own(tmp_path / "client_0")
    config = RunConfig(**SMALL, partition="own", clients=1)  # type: ignore[arg-type]
    untested = sfl.simulate(config, out=str(tmp_path / "c"), data_dir=str(tmp_path))
    with pytest.raises(RunError, match="no predictions of client_0: it has no test samples"):
        untested.predictions(0)
    with pytest.raises(ConfigError, match="data_dirs"):
        sfl.open_run(path, data_dirs="x")
    (path / "models/server_model_001.pt").write_bytes(b"x")
    with pytest.raises(IntegrityError, match=r"server_model_001.pt: is damaged"):
        sfl.open_run(path).back()


def test_samples_are_told_only_of_the_same_data_set(
    run: sfl.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sfl.interactive import dealt

    load = dealt.load

    def other(*given: object) -> object:
        train, test = load(*given)
        train.y[:] = train.y.flip(0)
        return train, test

    monkeypatch.setattr(dealt, "load", other)
    with pytest.raises(DataError, match="mnist-5k on this machine are not those that client_0"):
        sfl.open_run(run.path).samples(next(run.tensors()))
