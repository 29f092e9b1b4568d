from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from reroute import Schedule
from reroute.core.solver import solve
from reroute.errors import RerouteError
from reroute.schedule_file import ScheduleFile, is_file

SCHEDULE = Schedule((2, 4, 8), solve("pyramid", (2, 4, 8), 12, 1 / 3))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "schedule.json"


def test_what_was_written_is_read(file: Path) -> None:
    ScheduleFile(file, SCHEDULE, 12).write({"action": "route"})
    found = json.loads(file.read_text())
    assert (found["num_layers"], found["action"]) == (12, "route")
    assert found["keep"] == pytest.approx(1 / 3, abs=1e-12)
    read = ScheduleFile.read(str(file))
    assert read == ScheduleFile(file, SCHEDULE, 12)
    for keep in (None, 1 / 3, 0.3333):
        assert read.for_model(12, keep) == SCHEDULE
    assert [path.name for path in file.parent.iterdir()] == ["schedule.json"]


def test_what_a_schedule_wrote_is_read(file: Path) -> None:
    file.write_text(SCHEDULE.to_json())
    read = ScheduleFile.read(file)
    assert (read.schedule, read.num_layers) == (SCHEDULE, None)
    assert read.for_model(12, 1 / 3) == SCHEDULE
    with pytest.raises(RerouteError, match=r"has the budget keep=0\.25, not 0\.333"):
        read.for_model(20, 0.333)  # the same ratios are less of more layers
    with pytest.raises(RerouteError, match="Routing layer 8 does not exist"):
        read.for_model(8)


@pytest.mark.parametrize("keep", [0.3, 0.34, 0.33, 1])
def test_another_budget_is_refused(file: Path, keep: float) -> None:
    with pytest.raises(RerouteError, match=rf"{file} has the budget keep=0\.3333, not {keep:g}\. Leave keep out"):
        ScheduleFile(file, SCHEDULE, 12).for_model(12, keep)


def test_another_depth_is_refused(file: Path) -> None:
    with pytest.raises(RerouteError, match="is for 12 layers, and the model has 32"):
        ScheduleFile(file, SCHEDULE, 12).for_model(32)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "holds no schedule (Expecting property name"),
        ("[1]", "holds no schedule (it is not a JSON object)"),
        ("{}", "Not a schedule"),
        ('{"schedule": {"layers": [2], "ratios": [0.5]}}', "holds a schedule of version None"),
        ('{"version": 2, "schedule": {"layers": [2], "ratios": [0.5]}}', "of version 2; this release knows version 1"),
        ('{"version": 1, "schedule": {"layers": [2], "ratios": [0.5]}}', "num_layers is missing"),
        ('{"version": 1, "num_layers": 9, "schedule": {"layers": [2], "ratios": [5]}}', "Ratios must be"),
    ],
)
def test_what_is_no_schedule_is_refused(file: Path, text: str, said: str) -> None:
    file.write_text(text)
    with pytest.raises(RerouteError, match=re.escape(said)):
        ScheduleFile.read(file)


def test_a_file_that_is_not_there(file: Path) -> None:
    with pytest.raises(RerouteError, match=r"schedule\.json cannot be read: No such file"):
        ScheduleFile.read(file)


def test_json_itself_names_no_file() -> None:
    assert is_file("a.json")
    assert is_file(Path("a.json"))
    assert not is_file(SCHEDULE.to_json())
    assert not is_file(SCHEDULE)
    assert not is_file(None)
