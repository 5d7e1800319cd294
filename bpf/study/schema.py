"""Our tables, beside Optuna's in the same database, and how those of an older bpf become these."""

import json
import zlib
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from bpf.errors import UsageError, did_you_mean
from bpf.spec.run import work
from bpf.study import stored
from bpf.study.database import Database

SCHEMA_VERSION = 2
OLDEST_VERSION = 1


class Json(sa.TypeDecorator[Any]):
    """JSON as text: a loss may be NaN, which the databases' own JSON types refuse."""

    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: sa.Dialect) -> str | None:
        return None if value is None else json.dumps(value)

    def process_result_value(self, value: str | None, dialect: sa.Dialect) -> Any:
        return None if value is None else stored.json(value)


class PackedJson(sa.TypeDecorator[Any]):
    """Compressed JSON: curves of many epochs."""

    impl = sa.LargeBinary
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: sa.Dialect) -> bytes | None:
        return None if value is None else zlib.compress(json.dumps(value, separators=(",", ":")).encode(), 1)

    def process_result_value(self, value: bytes | None, dialect: sa.Dialect) -> Any:
        return None if value is None else stored.unpacked(value)


metadata = sa.MetaData()
experiments = sa.Table(
    "bpf_experiment",
    metadata,
    sa.Column("name", sa.String(200), primary_key=True),
    sa.Column("schema_version", sa.Integer, nullable=False),
    sa.Column("settings", Json, nullable=False),
)
rules = sa.Table(
    "bpf_rules",
    metadata,
    sa.Column("experiment", sa.String(200), primary_key=True),
    sa.Column("rule", sa.String(100), primary_key=True),
    sa.Column("study_id", sa.Integer, nullable=False),
    sa.Column("axes", Json, nullable=False),
)
cells = sa.Table(
    "bpf_cells",
    metadata,
    sa.Column("experiment", sa.String(200), primary_key=True),
    sa.Column("key", sa.String(100), primary_key=True),
    sa.Column("rule", sa.String(100), nullable=False),
    sa.Column("structure", sa.String(200), nullable=False),
    sa.Column("params", Json, nullable=False),
    sa.Column("spec", Json, nullable=False),
    sa.Column("ordinal", sa.Integer, nullable=False),
    sa.Column("name", sa.String(100), nullable=False),
    sa.Column("state", sa.String(20), nullable=False),
    sa.Column("cohort", sa.String(100)),
    sa.Column("owner", sa.String(100)),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("trial_id", sa.Integer),
    sa.Column("trial_number", sa.Integer),
    sa.Column("value", sa.Double),
    sa.Column("result", Json),
    sa.Column("error", sa.Text),
    sa.Column("cost", sa.Double, nullable=False, server_default="0"),
    sa.Column("seconds", sa.Double),
    sa.Column("cause", sa.String(20)),
    sa.Column("kills", sa.Integer, nullable=False, server_default="0"),
    sa.Column("reached", sa.Integer, nullable=False, server_default="0"),
    sa.Column("max_runs", sa.Integer),
    sa.UniqueConstraint("experiment", "name"),
    # A claim asks for the first cell of a state, and for the next ones of its structure.
    sa.Index("bpf_cells_by_state", "experiment", "state", "ordinal"),
    sa.Index("bpf_cells_by_structure", "experiment", "structure", "state", "ordinal"),
    # Holds all that `status` adds up, so that it need not read the wide rows; and the best cell of each rule.
    sa.Index("bpf_cells_summary", "experiment", "rule", "state", "cause", "cost", "seconds"),
    sa.Index("bpf_cells_by_value", "experiment", "rule", "state", "value", "ordinal"),
)
histories = sa.Table(
    "bpf_histories",
    metadata,
    sa.Column("experiment", sa.String(200), primary_key=True),
    sa.Column("key", sa.String(100), primary_key=True),
    sa.Column("records", PackedJson, nullable=False),
)
owners = sa.Table(
    "bpf_owners",
    metadata,
    sa.Column("experiment", sa.String(200), primary_key=True),
    sa.Column("token", sa.String(100), primary_key=True),
    sa.Column("machine", sa.String(200), nullable=False),
    sa.Column("pid", sa.Integer, nullable=False),
    sa.Column("lock", sa.Text, nullable=False),
    sa.Column("facts", Json, nullable=False),
    sa.Column("began", sa.Double, nullable=False),
    sa.Column("lease", sa.Double, nullable=False),
)


def add_experiment(connection: sa.Connection, database: Database, name: str, settings: dict[str, Any]) -> None:
    versions = _versions(connection)
    if name in versions:
        raise UsageError(f"The experiment {name!r} exists already in {database}.")
    for version in versions.values():
        _check_version(database, version)
    record = {"name": name, "schema_version": SCHEMA_VERSION, "settings": settings}
    connection.execute(sa.insert(experiments).values(record))


def read_experiment(connection: sa.Connection, database: Database, wanted: str | None) -> tuple[str, int]:
    """The name and the format of an experiment.

    Raises UsageError if there is none of that name, or one that this bpf cannot read.
    """
    if connection.dialect.name == "sqlite":
        made = connection.exec_driver_sql("SELECT name FROM sqlite_master WHERE type IN ('view', 'trigger')").first()
        if made is not None:  # which could do anything, also never end
            raise stored.Damage(f"{made[0]!r} is no table, and nothing else belongs into a study")
    if not sa.inspect(connection).has_table(experiments.name):
        raise UsageError(f"{database} is a database, but no bpf study.")
    versions = _versions(connection)
    name = next(iter(versions)) if wanted is None and len(versions) == 1 else wanted
    if name is None or name not in versions:
        said = "has several experiments" if name is None else f"has no experiment {name!r}"
        raise UsageError(f"{database} {said}." + did_you_mean(name or "", versions))
    _check_version(database, versions[name])
    return name, versions[name]


def holds(connection: sa.Connection, name: str) -> bool:
    return sa.inspect(connection).has_table(experiments.name) and name in _versions(connection)


def read_settings(connection: sa.Connection, name: str) -> dict[str, Any]:
    query = sa.select(experiments.c.settings).where(experiments.c.name == name)
    return stored.settings(connection.execute(query).scalar_one())


def migrate(connection: sa.Connection, logs: Path) -> None:
    """Bring the tables of bpf 0.1 to this format; `logs` is where it kept the histories."""
    present = {column["name"] for column in sa.inspect(connection).get_columns(cells.name)}
    for column in cells.columns:
        if column.name not in present:
            described = str(sa.schema.CreateColumn(column).compile(dialect=connection.dialect))
            connection.exec_driver_sql(f"ALTER TABLE {cells.name} ADD COLUMN {described}")
    metadata.create_all(connection)
    for index in cells.indexes:
        index.create(connection, checkfirst=True)
    for record in connection.execute(sa.select(cells.c.experiment, cells.c.key, cells.c.spec, cells.c.result)).all():
        where = (cells.c.experiment == record.experiment, cells.c.key == record.key)
        stored.word(record.key)
        seconds = record.result and record.result.get("seconds")
        connection.execute(sa.update(cells).where(*where).values(cost=work(record.spec), seconds=seconds))
        log = logs / f"{record.key}.json"
        if log.exists():
            records = stored.older_history(log)
            kept = {"experiment": record.experiment, "key": record.key, "records": records}
            connection.execute(sa.insert(histories).values(kept))
    connection.execute(sa.update(experiments).values(schema_version=SCHEMA_VERSION))


def _versions(connection: sa.Connection) -> dict[str, int]:
    query = sa.select(experiments.c.name, experiments.c.schema_version)
    return dict(stored.experiment(record) for record in connection.execute(query).mappings())


def _check_version(database: Database, version: int) -> None:
    if not OLDEST_VERSION <= version <= SCHEMA_VERSION:
        made_by = "a newer" if version > SCHEMA_VERSION else "an older"
        raise UsageError(
            f"{database} was made by {made_by} bpf (format {version}, this one reads {SCHEMA_VERSION}); "
            "go on with the bpf that made it."
        )
