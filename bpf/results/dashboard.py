"""optuna-dashboard on the study of an experiment, in this process: so a password is on no command line."""

import errno
from collections.abc import Callable
from contextlib import closing, suppress
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from bpf.errors import UsageError
from bpf.experiment.directory import Experiment
from bpf.extras import need

PORT = 8080


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing of each request; the page asks again every few seconds."""


class _Server(ThreadingMixIn, WSGIServer):
    """Browsers open connections ahead, which would keep a server of one thread waiting."""

    daemon_threads = True


def serve(experiment: Experiment, port: int = PORT, ready: Callable[[str], object] = lambda url: None) -> None:
    """Show the study at `port` (0: any free one), to this machine only, until Ctrl-C.

    `ready` is told the address when it can be opened. A database with several experiments is shown with all of them.
    Raises UsageError if the port is taken, the study cannot be read, or optuna-dashboard is missing.
    """
    dashboard = need("optuna_dashboard", "The dashboard", "optuna-dashboard", "dashboard")
    from bpf.study.trials import check_optuna, viewed

    check_optuna()
    with closing(experiment.read_study()):
        pass  # it can be read
    application = dashboard.wsgi(viewed(experiment.database))
    try:
        server = make_server("127.0.0.1", port, application, _Server, _Quiet)
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        raise UsageError(f"The port {port} cannot be used: {error.strerror}. Give another one with --port.") from error
    with server, suppress(KeyboardInterrupt):
        ready(f"http://127.0.0.1:{server.server_port}/dashboard")
        server.serve_forever()
