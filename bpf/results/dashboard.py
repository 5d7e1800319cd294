"""optuna-dashboard on the study of an experiment, in this process: so a password is on no command line."""

import errno
import re
from collections.abc import Callable, Iterable
from contextlib import closing, suppress
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from bpf.errors import UsageError
from bpf.experiment.directory import Experiment
from bpf.extras import need

PORT = 8080
_LOCAL = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:[0-9]{1,5})?", re.IGNORECASE)
"""Names of this machine, at any port: it may be another one at the other end of a tunnel."""


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing of each request; the page asks again every few seconds."""


class _Server(ThreadingMixIn, WSGIServer):
    """Browsers open connections ahead, which would keep a server of one thread waiting."""

    daemon_threads = True


class Guarded:
    """A WSGI application for pages of this machine only.

    A web page elsewhere can send requests here through its reader's browser: under another host's name that leads here
    (DNS rebinding), or with another origin. What deletes a study must not be asked by those.
    """

    def __init__(self, application: Callable[..., Iterable[bytes]]) -> None:
        self._application = application

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        host, origin = environ.get("HTTP_HOST", ""), environ.get("HTTP_ORIGIN")
        if _LOCAL.fullmatch(host) and origin in (None, f"http://{host}"):
            return self._application(environ, start_response)
        told = b"This page is for this machine only: open it as http://127.0.0.1:PORT/dashboard.\n"
        start_response("403 Forbidden", [("Content-Type", "text/plain"), ("Content-Length", str(len(told)))])
        return [told]


def serve(experiment: Experiment, port: int = PORT, ready: Callable[[str], object] = lambda url: None) -> None:
    """Show the study at `port` (0: any free one), to this machine only, until Ctrl-C.

    Requests that come from pages of others are refused. `ready` is told the address when it can be opened. A database
    with several experiments is shown with all of them. Raises UsageError if the port is taken, the study cannot be
    read, or optuna-dashboard is missing.
    """
    dashboard = need("optuna_dashboard", "The dashboard", "optuna-dashboard", "dashboard")
    from bpf.study.trials import check_optuna, viewed

    check_optuna()
    with closing(experiment.read_study()):
        pass  # it can be read
    application = Guarded(dashboard.wsgi(viewed(experiment.database)))
    try:
        server = make_server("127.0.0.1", port, application, _Server, _Quiet)
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        raise UsageError(f"The port {port} cannot be used: {error.strerror}. Give another one with --port.") from error
    with server, suppress(KeyboardInterrupt):
        ready(f"http://127.0.0.1:{server.server_port}/dashboard")
        server.serve_forever()
