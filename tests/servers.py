"""A PostgreSQL server of the tests' own: nothing of the machine's servers is used, and nothing stays behind."""

import os
import pwd
import secrets
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

USER = "bpf"
PROGRAMS = ("initdb", "pg_ctl", "postgres")


class PostgresServer:
    """Lives in a directory that it owns and removes; the port and the password stay the same over restarts.

    The path must be short, since a socket's may not exceed a hundred bytes. Where root runs the tests, the server runs
    as another user, who must be able to reach the directory: pytest's temporary directories are closed to others.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port = free_port()
        self.password = secrets.token_hex(16)

    @staticmethod
    def missing() -> str | None:
        """Why no server can run here."""
        try:
            import psycopg  # noqa: F401
        except ImportError as error:
            return f"psycopg cannot be imported: {error}"
        if _programs() is None:
            return f"no directory of PATH and no /usr/lib/postgresql/*/bin has {', '.join(PROGRAMS)}"
        if os.geteuid() == 0 and _other_user() is None:
            return "PostgreSQL refuses to run as root, and there is no user postgres or nobody"
        return None

    def url(self, database: str = USER) -> str:
        return f"postgresql://{USER}:{self.password}@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        """Return once it accepts connections. The first start makes the cluster and the database `bpf`."""
        first = not self._data.exists()
        if first:
            self._initialize()
        # pg_ctl hands these to a shell, where a directory's name could fall apart: the settings are in the file
        self._control("start", "-w", "-l", str(self._log))
        if first:
            self.create_database(USER)

    def stop(self, mode: str = "fast") -> None:
        """`fast` ends the connections and shuts down; `immediate` is a crash that the next start recovers from.

        A signal is no substitute: in a container where nobody reaps the dead, PostgreSQL takes them for alive.
        """
        self._control("stop", "-w", "-m", mode)

    def restart(self, mode: str = "fast") -> None:
        self.stop(mode)
        self.start()

    def create_database(self, name: str) -> None:
        self._execute("CREATE DATABASE {}", name)

    def drop_database(self, name: str) -> None:
        """Whoever is still connected to it is thrown out."""
        self._execute("DROP DATABASE {} WITH (FORCE)", name)

    def close(self) -> None:
        try:
            # asked of pg_ctl, since a test may have stopped the server
            if self._data.exists() and self._run("pg_ctl", "-D", str(self._data), "status").returncode == 0:
                self.stop("immediate")
        finally:
            shutil.rmtree(self.directory)

    @property
    def _data(self) -> Path:
        return self.directory / "data"

    @property
    def _log(self) -> Path:
        return self.directory / "log"

    def _initialize(self) -> None:
        sockets, password = self.directory / "sockets", self.directory / "password"
        sockets.mkdir()
        password.touch(mode=0o600)
        password.write_text(f"{self.password}\n")
        user = _other_user() if os.geteuid() == 0 else None
        if user is not None:
            for path in (self.directory, sockets, password):
                os.chown(path, user.pw_uid, user.pw_gid)
        done = self._run(
            *("initdb", "-D", str(self._data), "--no-sync", "--locale=C", "--encoding=UTF8"),
            *("--auth=scram-sha-256", f"--username={USER}", f"--pwfile={password}"),
        )
        if done.returncode:
            raise RuntimeError(f"initdb failed:\n{done.stdout}")
        password.unlink()
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": str(sockets),
            # a test kills the server at most, never the machine: what was written is with the system already
            "fsync": "off",
            "max_connections": "100",
            "shared_buffers": "32MB",
        }
        with (self._data / "postgresql.conf").open("a") as file:
            file.writelines(f"{name} = '{value}'\n" for name, value in settings.items())

    def _control(self, *arguments: str) -> None:
        done = self._run("pg_ctl", "-D", str(self._data), *arguments)
        if done.returncode:
            log = self._log.read_text(errors="replace") if self._log.exists() else ""
            raise RuntimeError(f"pg_ctl {arguments[0]} failed:\n{done.stdout}\n{log[-5000:]}")

    def _run(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        programs = _programs()
        if programs is None:
            raise RuntimeError(self.missing())
        # PGDATA and the like speak of another server, and messages are to be read in English
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PG")} | {"LC_ALL": "C"}
        become: dict[str, Any] = {}
        if os.geteuid() == 0 and (user := _other_user()) is not None:
            become = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        return subprocess.run(
            [str(programs / program), *arguments],
            cwd=self.directory,  # root's working directory may be closed to the other user
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **become,
        )

    def _execute(self, statement: str, name: str) -> None:
        import psycopg
        from psycopg import sql

        # a database is made and dropped outside any transaction, and from another one
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(sql.SQL(statement).format(sql.Identifier(name)))


def _programs() -> Path | None:
    """The directory of the server's programs; Debian keeps it off PATH, one for each version."""
    places = [Path(place) for place in os.get_exec_path() if place]
    versions = [path for path in Path("/usr/lib/postgresql").glob("*/bin") if path.parent.name.isdecimal()]
    places += sorted(versions, key=lambda path: int(path.parent.name), reverse=True)
    # all of them: where only the client is installed, the directory is there as well
    return next((place for place in places if all(os.access(place / name, os.X_OK) for name in PROGRAMS)), None)


def _other_user() -> pwd.struct_passwd | None:
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    return None


def free_port() -> int:
    """Below the ports that the system gives to outgoing connections.

    While the server is stopped, a client that tries again and again could otherwise be given the server's own port,
    connect to itself and keep the server from coming back.
    """
    while True:
        port = 15_000 + secrets.randbelow(15_000)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as PostgreSQL does
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
