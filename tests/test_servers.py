"""The tests' own PostgreSQL server does what the tests of a study in PostgreSQL rely on."""

import pytest
import sqlalchemy
from sqlalchemy.exc import OperationalError

from servers import PostgresServer

pytestmark = pytest.mark.slow


def engine_of(url: str, **changed: str) -> sqlalchemy.Engine:
    return sqlalchemy.create_engine(sqlalchemy.make_url(url).set(drivername="postgresql+psycopg", **changed))


# twice: the second finds nothing of the first
@pytest.mark.parametrize("time", [1, 2])
def test_a_fresh_database_is_empty(time: int, postgres_url: str) -> None:
    engine = engine_of(postgres_url)
    assert sqlalchemy.inspect(engine).get_table_names() == []
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text("CREATE TABLE numbers AS SELECT 1 AS number"))
    assert sqlalchemy.inspect(engine).get_table_names() == ["numbers"]
    engine.dispose()


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_a_restart_drops_connections_and_keeps_the_data(mode: str, postgres_own_server: PostgresServer) -> None:
    engine = engine_of(postgres_own_server.url())
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text("CREATE TABLE numbers AS SELECT 1 AS number"))
    read = sqlalchemy.text("SELECT number FROM numbers")
    with engine.connect() as connection:
        assert connection.scalar(read) == 1
        postgres_own_server.restart(mode)
        with pytest.raises(OperationalError):
            connection.scalar(read)
    with engine.connect() as connection:
        assert connection.scalar(read) == 1
    engine.dispose()


def test_a_stopped_server_is_not_there_until_it_starts(postgres_own_server: PostgresServer) -> None:
    engine = engine_of(postgres_own_server.url())
    postgres_own_server.stop()
    with pytest.raises(OperationalError, match="refused"):
        engine.connect()
    postgres_own_server.start()
    with engine.connect() as connection:
        assert connection.scalar(sqlalchemy.text("SELECT current_database()")) == "bpf"
    engine.dispose()


def test_a_wrong_password_is_refused(postgres_url: str) -> None:
    engine = engine_of(postgres_url, password="wrong")
    with pytest.raises(OperationalError, match="password authentication failed"):
        engine.connect()
    engine.dispose()
