"""Serve a page that computes the front of a trained model in the browser, and the model's back.

python -m experiments.web [RUN] [--port 8080] [--host 127.0.0.1]

RUN: a run's folder or name; without it, the newest run that has a finished round. docs/web.md shows
what the page does.
"""

import sys
from collections.abc import Sequence

from sfl.nodes import ClientNode, ServerNode
from sfl.options import Parser, add_options, from_values, names_of
from sfl.program import run_program

PROG = "python -m experiments.web"
PORT = 8080
_OF_SERVER = (
    "insecure tls_cert tls_key out data_dir cache_dir device threads memory_limit peer_timeout"
    " allow_import"
)


def _parser() -> Parser:
    parser = Parser(prog=PROG, description=__doc__.partition("\n")[0])
    parser.add_argument(
        "run", metavar="RUN", nargs="?", default="", help="a run's folder or name; if not given,"
        " the newest that has a finished round",
    )  # fmt: skip
    parser.add_argument(
        "--port", type=int, default=PORT, help=f"port to listen on (default: {PORT}); 0: a free one"
    )
    add_options(parser, ServerNode, "host")
    parser.add_argument(
        "--name", dest="names", action="append", default=[], metavar="NAME", help="host name by"
        " which pages may come, beside the names of this machine; may be given again",
    )  # fmt: skip
    parser.add_argument(
        "--client", type=int, metavar="K", help="the front as this client has it, where each client"
        " keeps its own",
    )  # fmt: skip
    parser.add_argument(
        "--train", default="", metavar="HOST:PORT", help="a server that trains: pages may take part"
        " in its run, with the token of --token-file, under TLS with --tls-ca",
    )  # fmt: skip
    parser.add_argument(
        "--no-decoder", action="store_true", help="do not train, in the background, what shows"
        " what an attacker sees",
    )  # fmt: skip
    parser.add_argument(
        "--share-samples", action="store_true", help="with --host, show the test samples of the"
        " run's data set to other machines as well",
    )  # fmt: skip
    add_options(parser, ServerNode, _OF_SERVER)
    add_options(parser, ClientNode, "token_file tls_ca")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(argv)
    typed = vars(options)
    of_client = {"token_file", "tls_ca"}
    node, to_train = (
        from_values(kind, {n: v for n, v in typed.items() if n in names}, "the options")
        for kind, names in (
            (ServerNode, names_of(ServerNode) - of_client),
            (ClientNode, of_client | {"peer_timeout", "data_dir", "cache_dir"}),
        )
    )
    from experiments.web.serving import serve_site

    serve_site(options, node, to_train)


if __name__ == "__main__":
    sys.exit(run_program("web", main))
