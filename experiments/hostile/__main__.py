"""Attack a running server in every way that we know, and say what it answered.

python -m experiments.hostile [--seconds N] [--hop]
python -m experiments.hostile --memory [--hop]
python -m experiments.hostile --server ADDRESS [--seconds N] [--token-file FILE] [--folder RUN]

The third attacks a server of this machine that runs already, at HOST:PORT or ws://HOST:PORT/, as
whoever reaches its port; with --token-file, as somebody who has a client's token besides. The first
starts all itself: a run of three honest clients with tokens and TLS, one over TCP and two over
WebSocket, once alone and once with attacks in every other stretch of rounds; then a server whose
one client means harm, and one that wants clients' certificates; then servers and clients whose
memory the other side takes, which --memory tries alone. With --hop what has a cut happens at the
port of a hop before the server; --server may be the address of a hop, too. It compares all weights,
steps and figures of the two honest runs, and a round's time with and without the attacker in the
same run.

Attacks go to this machine's loopback alone. Exit code 0 if nobody was disturbed, else 1.
"""

import sys
from argparse import Namespace
from pathlib import Path

from sfl.options import Parser
from sfl.program import run_program


def main() -> int:
    options = parse()
    from experiments.hostile.attempts import attack_a_server
    from experiments.hostile.lone_servers import greedy
    from experiments.hostile.study import study

    if options.memory:
        num_disturbed = greedy(Path(options.out).resolve(), hop=options.hop)
    elif options.server:
        num_disturbed = attack_a_server(options)
    else:
        num_disturbed = study(options)
    return 1 if num_disturbed else 0


def parse() -> Namespace:
    parser = Parser(prog="python -m experiments.hostile", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--server",
        metavar="ADDRESS",
        help="HOST:PORT or ws://HOST:PORT/ of one that runs already, on this machine",
    )
    parser.add_argument("--hop", action="store_true", help="attack a hop's port, not the server's")
    parser.add_argument("--memory", action="store_true", help="try alone what takes memory")
    parser.add_argument("--seconds", type=float, default=60.0, help="of attacks (default: 60)")
    parser.add_argument("--token-file", default="", help="the attacker's own, with --server")
    parser.add_argument("--folder", help="of the attacked run, to see whether it is disturbed")
    parser.add_argument("--rounds", type=int, default=150, help="of each run (default: 150)")
    parser.add_argument("--out", default="shared_files/hostile", help="for folders by start time")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run_program("hostile", main))
