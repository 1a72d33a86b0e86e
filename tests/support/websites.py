"""A site for browsers in this process, which can be stopped and started again on its port."""

import contextlib
import functools
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

pytest.importorskip("websockets")

from experiments.web import templates
from experiments.web.behind import service_of
from experiments.web.decoder_process import NONE, DecoderProcess
from experiments.web.doors import BoundedListener, Doors
from experiments.web.model_files import ModelFiles
from experiments.web.pages import Pages, Route
from experiments.web.site import Parts, Site
from sfl.interactive.run import Run, open_run
from sfl.nodes import ServerNode
from sfl.trained.service import Service, open_service
from sfl.transport.certificates import server_tls
from sfl.transport.refusal_log import RefusalLog


@functools.lru_cache(maxsize=4)
def _files_of(run: Path, data_dir: str, cache_dir: str) -> ModelFiles:
    """Return a run's files, which take seconds to make."""
    return ModelFiles(open_run(run), ServerNode(data_dir=data_dir, cache_dir=cache_dir))


@contextlib.contextmanager
def _running(service: Service) -> Iterator[None]:
    stop = threading.Event()
    thread = threading.Thread(target=service.run, args=(stop.is_set,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


class Website:
    """The page of a run, and its back. Ended by ``with``."""

    def __init__(self, run: Path, decoder: DecoderProcess | None = None, **options: object) -> None:
        """``options``: of the site's node, such as ``tls_cert`` and ``tls_key``."""
        self._decoder = decoder
        self._node = ServerNode(host="127.0.0.1", port=0, **options)  # type: ignore[arg-type]
        self.files = _files_of(run, self._node.data_dir, self._node.cache_dir)
        self.run: Run = self.files.run
        self._running = contextlib.ExitStack()
        self._port = 0

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self._port}"

    @property
    def url(self) -> str:
        return f"{'https' if self._node.tls_cert else 'http'}://{self.host}/"

    def _routes(self) -> Mapping[str, Route]:
        decoder = self._decoder

        def more() -> dict[str, object]:
            return {"train": False, "decoder": decoder.state if decoder else NONE}

        found = self.files.routes(more) | templates.routes()
        return found | decoder.routes() if decoder else found

    def start(self) -> None:
        node, refusals, tls = self._node, RefusalLog(print), server_tls(self._node)
        enter = self._running.enter_context
        service = enter(open_service(ServerNode(serve=str(self.run.path), port=0)))
        enter(_running(service))
        parts = Parts(
            Pages(self._routes(), print),
            {"/predict": service_of(service.address)},
            Doors(node.host, (), is_tls=tls is not None),
            tls.context if tls else None,
        )
        listener = BoundedListener.on(node.host, self._port, refusals)
        self._port = enter(Site(parts, listener, refusals)).port

    def stop(self) -> None:
        self._running.close()

    def __enter__(self) -> "Website":
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()
