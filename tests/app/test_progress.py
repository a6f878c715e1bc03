"""Progress where stderr is no terminal: a line at the end, and now and then before."""

from __future__ import annotations

import re

import pytest

from podquant.app import progress as module
from podquant.app.progress import LoadProgress, progress


def test_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LINE_SECONDS", 0.0)
    with progress("converting", 3_000_000) as advance:
        advance(1_000_000)
        advance(2_000_000)
    out, err = capsys.readouterr()
    assert out == ""
    first, second, last = err.splitlines()
    assert re.fullmatch(r"converting: 1\.0 of 3\.0 MB, \d+\.\d\d GB/s, \d+ s left", first)
    assert re.fullmatch(r"converting: 3\.0 of 3\.0 MB, \d+\.\d\d GB/s", second)
    assert re.fullmatch(r"converting: 3\.0 of 3\.0 MB, \d+\.\d\d GB/s", last)


def test_a_load_that_begins_again_is_shown_again(capsys: pytest.CaptureFixture[str]) -> None:
    shown = LoadProgress("loading")
    shown.close()
    assert capsys.readouterr().err == ""
    for done in (0, 5_000_000, 10_000_000, 2_000_000, 10_000_000):
        shown(done, 10_000_000)
    shown.close()
    lines = [line.partition(",")[0] for line in capsys.readouterr().err.splitlines()]
    assert lines == ["loading: 10.0 of 10.0 MB"] * 2
