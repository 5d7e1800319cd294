"""Rows of a table: named settings within one grid, each with what was published for it."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from bpf.reading import Name
from bpf.spec.values import Frozen

Percent = Annotated[float, Field(ge=0, le=100)]


class Published(Frozen):
    """A number that somebody published: a test error in %, and what is known of how it came about."""

    error: Percent = Field(description="Test error in %: the mean over the runs.")
    std: Percent | None = Field(None, description="Standard deviation over the runs in percentage points.")
    runs: int | None = Field(None, ge=1, description="How many runs it is of; left out where the source does not say.")
    epoch: Literal["last", "best"] | None = Field(
        None, description="Whether it is of the last epoch or of the best one; left out where the source does not say."
    )
    source: str = Field(min_length=1, description="Where it was read: paper and table, or repository and file.")
    read_in: Literal["paper", "slides", "code", "readme"] = Field(description="What kind of text it was read in.")


class Row(Frozen):
    """Settings that differ from those of the grid around them; lists are tuned, and the best cell is the row's."""

    settings: Mapping[str, Any] = Field(description="Fields of a grid, such as algorithm, arch, lr and epochs.")
    published: Published | None = Field(None, description="What this row is compared with.")
    choices: tuple[str, ...] = Field((), description="What the source leaves open, and what was chosen.")


Rows = Mapping[Name, Row]

COMMON = frozenset(
    {
        "dataset",
        "image_size",
        "problem_type",
        "objective",
        "trackers",
        "tracker_every",
        "device",
        "matmul_precision",
        "seed",
        "data_seed",
        "executions_per_trial",
        "allow_unstable",
        "lr_from",
        "rows",
    }
)
"""What all rows of an experiment have in common, so that no row may state it."""
