"""``--track wandb``: Weights & Biases, offline where it cannot be reached."""

import functools
import os
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from sfl.errors import told
from sfl.tracking.tracked import TrackedRound, TrackedRun, title_of


class WeightsAndBiases:
    """Logs into the W&B run whose id is the run's name; a resumed run goes on in it."""

    package: ClassVar[str] = "wandb"

    def __init__(self, *, project: str = "sfl", histograms: int = 0) -> None:
        self.histograms = histograms
        self._project = project
        self._num_before: Callable[[int], int] = lambda round_index: 0
        self._draw: Callable[[TrackedRound], Any] = lambda done: None
        self._run: Any = None

    def start(self, run: TrackedRun) -> str:
        import wandb

        from sfl.tracking.pictures import confusion_pixels

        mode: Any = os.environ.get("WANDB_MODE")  # the user's word
        offline = "" if mode else _why_offline()
        self._num_before = run.num_before
        self._draw = functools.partial(confusion_pixels, run)
        # W&B makes links, and follows those that it finds: into a new folder at each start.
        folder = run.folder / "wandb" / f"{time.time_ns():020d}"
        folder.mkdir(parents=True)
        self._run = wandb.init(
            project=self._project,
            id=run.name,
            name=run.name,
            dir=folder,
            config=dict(run.config),
            mode=mode or ("offline" if offline else "online"),
            resume="allow" if run.is_resumed else "never",
            settings=wandb.Settings(console="off", silent=True),
        )
        for curves in ("round/*", "client_*", "weights/*"):
            self._run.define_metric(curves, step_metric="round")
        self._run.define_metric("step/*", step_metric="step")
        if self._run.settings.mode == "offline":
            why = f" ({offline})" if offline else ""
            return f"offline{why}; upload with: wandb sync {self._run.settings.sync_dir}"
        return str(self._run.url or "is disabled")

    def add(self, done: TrackedRound) -> None:
        import wandb

        by_step: defaultdict[int, dict[str, float]] = defaultdict(dict)
        for row in done.step_rows():
            at = self._num_before(done.index) + (row.step or 0)
            by_step[at][title_of(row)] = row.value
        for at, of_step in sorted(by_step.items()):
            self._run.log({"round": done.index, "step": at, **of_step})
        figures = {title_of(row): row.value for row in done.rows()}
        texts = {f"round/{name}": text for name, text in done.texts.items()}
        weights = {f"weights/{n}": wandb.Histogram(v.tolist()) for n, v in done.weights.items()}
        pixels = self._draw(done)
        pictures = {} if pixels is None else {"round/confusion": wandb.Image(pixels)}
        self._run.log({"round": done.index, **figures, **texts, **weights, **pictures})

    def end(self, summary: Mapping[str, float], *, failed: bool) -> None:
        self._run.summary.update(dict(summary))
        self._run.finish(exit_code=1 if failed else 0)


def _why_offline() -> str:
    """Return why W&B cannot be reached; "" if it can."""
    import wandb

    try:
        return "" if wandb.login(prompt=False, verify=True) else "there is no key of W&B"
    except Exception as error:  # noqa: BLE001 - of a library; the reason is said
        return told(error)
