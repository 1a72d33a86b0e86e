"""Divide HAM10000 between two parties: one has the images and the labels, the other the metadata.

python -m experiments.ham10000_parties --data-dir DIR --out DIR [--image-size 64]

Writes DIR/client_0/ham10000.npz (images, labels) and DIR/client_1/ham10000.npz (age, sex, place of
the lesion), with the images' names as ids, each in an order of its own; then a run trains on both::

    run_server.py --topology vertical --partition own --dataset ham10000 --clients 2 \
        --model cnn-cifar10 --cut 9 --party-models cnn-cifar10,mlp --image-size 64
    run_client.py --client-id 0 --data-dir DIR/client_0
    run_client.py --client-id 1 --data-dir DIR/client_1
"""

import sys
from argparse import Namespace
from pathlib import Path

from sfl.options import Parser
from sfl.program import run_program


def parse() -> Namespace:
    parser = Parser(
        prog="python -m experiments.ham10000_parties", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--data-dir", type=Path, required=True, help="folder that has HAM10000")
    parser.add_argument("--cache-dir", type=Path, default=Path("cache"), help="decoded images")
    parser.add_argument("--out", type=Path, required=True, help="folder of both parties' files")
    parser.add_argument("--image-size", type=int, default=64, help="side in pixels (default: 64)")
    return parser.parse_args()


def main() -> None:
    options = parse()
    from experiments.ham10000_parties.files import write_files

    for line in write_files(options.data_dir, options.cache_dir, options.out, options.image_size):
        print(line)


if __name__ == "__main__":
    sys.exit(run_program("ham10000_parties", main))
