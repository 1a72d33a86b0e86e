"""``python -m sfl.auth new-token FILE [--clients N]``: make tokens for server and clients."""

import secrets
import sys
from pathlib import Path

from sfl.options import Parser
from sfl.program import run_program
from sfl.transport.tokens import TOKEN_BYTES, write_tokens
from sfl.wire.link import MAIN


def main(argv: list[str] | None = None) -> None:
    """Write the token files that the command line asks for.

    Raises:
        ConfigError: as ``write_tokens``.
    """
    parser = Parser(prog="python -m sfl.auth", description="Make tokens for server and clients.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    new = commands.add_parser("new-token", help="write a file with a new token")
    new.add_argument("file", type=Path, metavar="FILE", help="for --token-file; is not overwritten")
    new.add_argument(
        "--clients",
        type=int,
        metavar="N",
        help="a token for each of N clients, and one for a main server that goes to a fed server:"
        " FILE, with all of them, is the server's; FILE.0, FILE.1, ... and FILE.main are theirs",
    )
    options = parser.parse_args(argv)
    if options.clients is None:
        write_tokens(options.file, [secrets.token_urlsafe(TOKEN_BYTES)])
        return
    owners = [*map(str, range(options.clients)), MAIN]
    lines = {owner: f"{owner} {secrets.token_urlsafe(TOKEN_BYTES)}" for owner in owners}
    write_tokens(options.file, list(lines.values()))
    for owner, line in lines.items():
        write_tokens(options.file.with_name(f"{options.file.name}.{owner}"), [line])


if __name__ == "__main__":
    sys.exit(run_program("sfl.auth", main))
