"""Kill, stop and cut off everybody at random, restart them, and compare with an undisturbed run.

python -m experiments.chaos --scheme S --kills N --seed K [--cuts N] [--flips N] [run options]

Server, hops and clients are real processes; clients reach the server, or the first hop, through a
TCP proxy of this program, which delays, breaks and blacks out connections, and flips bits of what
passes. What is killed is started again, the server with --resume. One run after the other is
disturbed until there were as many kills, cuts and flips as asked for; then every file of weights,
every recorded step and every figure is compared with those of a run that was left alone, and the
disturbed runs are replayed.

Exit code 0 if nothing differs, else 1.
"""

import random
import sys
from argparse import Namespace
from pathlib import Path

from sfl.options import Parser
from sfl.program import run_program

NUM_CLIENTS = 3


def main() -> int:
    options, rest = parse()
    from experiments.chaos.disturbed import Disturbance, Parties, Trouble, undisturbed
    from experiments.support.same_run import compare
    from sfl.archive.run_folder import create_run_folder

    out = create_run_folder(Path(options.out).resolve(), "")
    print(f"everything lies in {out}")
    run_options = ["--scheme", options.scheme, "--rounds", str(options.rounds), *rest]
    print(f"undisturbed: {options.rounds} rounds of {options.scheme}", flush=True)
    parties = Parties(NUM_CLIENTS, options.hops)
    whole, round_s, round_bytes = undisturbed(out / "undisturbed", run_options, parties)
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
    draws, number, found, checked = random.Random(options.seed), 0, 0, 0
    while trouble.is_left or not number:
        number += 1
        folder = out / f"disturbed_{number}"
        print(f"run {number}: {trouble.left}", flush=True)
        disturbance = Disturbance(folder, run_options, parties, trouble, draws)
        differences = compare(whole, disturbance.run())
        checked += differences.tensors
        found += differences.count
        for line in differences.lines:
            print(line)
    print(f"{checked} tensors compared, in {number} disturbed runs")
    if trouble.done["cut"]:
        print(f"{trouble.done['cut']} cuts survived")
    if trouble.done["flip"]:
        print(f"{trouble.done['flip']} flipped bits survived")
    print(f"{trouble.done['kill']} kills survived, {found} tensors differ")
    return 1 if found else 0


def parse() -> tuple[Namespace, list[str]]:
    parser = Parser(prog="python -m experiments.chaos", description=__doc__.partition("\n")[0])
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
    parser.add_argument("--hops", type=int, default=0, help="of --topology (default: 0)")
    parser.add_argument("--rounds", type=int, default=12, help="of each run (default: 12)")
    parser.add_argument("--out", default="shared_files/chaos", help="for folders by start time")
    return parser.parse_known_args()


if __name__ == "__main__":
    sys.exit(run_program("chaos", main))
