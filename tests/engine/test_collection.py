"""What a full garbage collection goes through beside an engine."""

from __future__ import annotations

import gc

from podquant.engine.collection import sparing_what_is_there


def test_what_is_there_is_left_alone_while_it_lasts() -> None:
    before: list[list[object]] = [[]]
    with sparing_what_is_there():
        made: list[list[object]] = [[]]
        seen = {id(each) for each in gc.get_objects()}
        assert (id(before) in seen, id(made) in seen) == (False, True)
    assert id(before) in {id(each) for each in gc.get_objects()}
