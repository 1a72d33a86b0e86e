"""What a run's model takes its test set for: confusion matrix, ROC and precision-recall curves.

python -m experiments.predictions RUN_DIR [--clients FOLDER ...]

Reads the labels and logits that were kept after the last round: by the server, or, where clients
hold the whole model, in their own folders, which are found beside the server's if they are on this
machine. Writes ``confusion.png``, ``roc.png``, ``precision_recall.png`` and ``classes.csv`` into
RUN_DIR.
"""

import sys
from pathlib import Path

from sfl.options import Parser
from sfl.program import run_program


def main() -> None:
    parser = Parser(
        prog="python -m experiments.predictions", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="shared_files/server/<run>")
    parser.add_argument(
        "--clients", metavar="FOLDER", type=Path, nargs="+", default=[],
        help="clients' folders, brought here from their machines",
    )  # fmt: skip
    parser.add_argument(
        "--allow-import",
        default="",
        help="package.module:function that the run may import as model",
    )
    options = parser.parse_args()
    from experiments.predictions.figures import draw_all

    for path in draw_all(options.run_dir, options.clients, options.allow_import):
        print(path)


if __name__ == "__main__":
    sys.exit(run_program("predictions", main))
