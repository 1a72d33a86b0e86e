"""What ``experiments.bench`` trains: its rows."""

from dataclasses import dataclass

FEW_DIGITS = "experiments.bench.few_digits:few_digits"


@dataclass(frozen=True)
class Row:
    """One line of the table: what is trained, by how many clients."""

    model: str
    batch_size: int
    clients: int
    options: tuple[str, ...] = ()
    has_peers: bool = True
    epochs: int = 4  # in a round of ours: the first steps of a round take longer than the others

    @property
    def name(self) -> str:
        return f"{self.model}-{self.batch_size}-{self.clients}"

    def run_options(self) -> list[str]:
        # A round has as many steps, however many clients the data are dealt to.
        epochs = self.epochs * self.clients
        options = ["--clients", str(self.clients), "--local-epochs", str(epochs)]
        options += ["--model", self.model, "--batch-size", str(self.batch_size)]
        return [*options, *self.options]


LARGE = ("--image-size", "64", "--dataset", FEW_DIGITS)
ROWS = [
    *(Row(model, batch, clients)
      for model in ("mlp", "lenet5") for clients in (1, 3) for batch in (32, 128)),
    Row("resnet18", 32, 1, LARGE, has_peers=False, epochs=1),
]  # fmt: skip
