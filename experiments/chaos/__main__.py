"""Kill, stop and cut off everybody at random, restart them, and compare with an undisturbed run.

python -m experiments.chaos --scheme S --kills N --seed K [--cuts N] [--flips N] [run options]

Server, hops, servers of further tasks and clients are real processes: those that the run options
ask for. Clients reach the server or the first hop, and each task's server, through TCP proxies of
this program, which delay, break and black out connections, and flip bits of what passes. What is
killed is started again, the server with --resume. One run after the other is disturbed until there
were as many kills, cuts and flips as asked for; then every file of weights, every recorded step and
every figure of each party is compared with those of a run that was left alone, and the disturbed
runs are replayed. The run that was left alone is compared with a simulation.

Exit code 0 if nothing differs, else 1.
"""

import contextlib
import random
import sys
from argparse import Namespace
from pathlib import Path

from sfl.config import RunConfig
from sfl.nodes import ServerNode
from sfl.options import Parser, parse_options
from sfl.program import run_program

PROG = "python -m experiments.chaos"
NUM_CLIENTS = 3


def main() -> int:
    options, rest = parse()
    from experiments.chaos.disturbed import DEFAULTS, Disturbance, Parties, Trouble, undisturbed
    from experiments.support.same_run import compare
    from sfl.archive.run_folder import create_run_folder
    from sfl.runtime.simulation import simulate
    from sfl.strategy.recipe import Recipe

    out = create_run_folder(Path(options.out).resolve(), "")
    print(f"everything lies in {out}")
    run_options = ["--scheme", options.scheme, "--rounds", str(options.rounds), *rest]
    own = [*DEFAULTS, "--clients", str(NUM_CLIENTS), *run_options, "--out", str(out / "simulated")]
    run, node = parse_options(own, RunConfig, ServerNode, prog=PROG, about="")
    parties = Parties(NUM_CLIENTS, Recipe.of(run).followers)
    print(f"undisturbed: {options.rounds} rounds of {options.scheme}", flush=True)
    whole, round_s, round_bytes = undisturbed(out / "undisturbed", run_options, parties)
    with open(out / "simulated.out", "w") as log, contextlib.redirect_stdout(log):
        simulated = simulate(run, node)
    found = [compare(simulated, whole)]
    for line in found[0].lines:
        print(line)
    trouble = Trouble(
        kills=options.kills,
        stops=options.kills // 4 if options.stops is None else options.stops,
        cuts=options.cuts,
        flips=options.flips,
        blackouts=options.blackouts,
        blackout_s=options.blackout_s,
        delay_s=options.delay_ms / 1000,
        cut_bytes=options.cut_bytes or 2 * round_bytes,
        round_s=round_s,
    )
    draws = random.Random(options.seed)
    while trouble.is_left or len(found) == 1:
        print(f"run {len(found)}: {trouble.left}", flush=True)
        folder = out / f"disturbed_{len(found)}"
        found.append(
            compare(whole, Disturbance(folder, run_options, parties, trouble, draws).run())
        )
        for line in found[-1].lines:
            print(line)
    compared, differ = (sum(getattr(d, name) for d in found) for name in ("tensors", "count"))
    print(f"{compared} tensors compared, in {len(found) - 1} disturbed runs")
    if trouble.done["cut"]:
        print(f"{trouble.done['cut']} cuts survived")
    if trouble.done["flip"]:
        print(f"{trouble.done['flip']} flipped bits survived")
    print(f"{trouble.done['kill']} kills survived, {differ} tensors differ")
    return 1 if differ else 0


def parse() -> tuple[Namespace, list[str]]:
    parser = Parser(prog=PROG, description=__doc__.partition("\n")[0])
    parser.add_argument("--scheme", default="sflv1", help="of the run (default: sflv1)")
    parser.add_argument("--kills", type=int, default=20, help="SIGKILLs in all (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the disturbances (default: 0)")
    parser.add_argument("--stops", type=int, help="SIGSTOPs; a fourth of the kills if not given")
    parser.add_argument("--cuts", type=int, default=0, help="connections to break (default: 0)")
    parser.add_argument("--flips", type=int, default=0, help="bits to flip (default: 0)")
    parser.add_argument(
        "--cut-bytes", type=int, help="mean bytes before a cut or flip; two rounds' if not"
    )
    parser.add_argument("--delay-ms", type=float, default=0.0, help="each way (default: 0)")
    parser.add_argument("--blackouts", type=int, default=0, help="times that nothing arrives")
    parser.add_argument("--blackout-s", type=float, default=20.0, help="for how long (default: 20)")
    parser.add_argument("--rounds", type=int, default=12, help="of each run (default: 12)")
    parser.add_argument("--out", default="shared_files/chaos", help="for folders by start time")
    return parser.parse_known_args()


if __name__ == "__main__":
    sys.exit(run_program("chaos", main))
