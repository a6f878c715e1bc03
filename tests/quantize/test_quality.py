from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from podquant.quantize.quality import Quality, QualityRows


def rows(signal: list[float], noise: list[float], **others: list[float]) -> QualityRows:
    columns = {"max_error": [0.1], "absmax": [1.0], "zeros": [1.0], "scale_min": [0.5], "scale_max": [0.5]}
    filled = {name: others.get(name, default * len(signal)) for name, default in columns.items()}
    arrays = {name: np.array(values) for name, values in {"signal": signal, "noise": noise, **filled}.items()}
    return QualityRows(**arrays, columns=4)


def test_figures_of_known_rows() -> None:
    first = rows([60.0], [0.5], max_error=[0.25], absmax=[2.0], zeros=[3.0], scale_min=[0.5], scale_max=[4.0])
    second = rows([40.0], [0.5], max_error=[0.5], absmax=[5.0], zeros=[1.0], scale_min=[0.25], scale_max=[1.0])
    quality = Quality.of([first, second])
    assert quality.sqnr_db == pytest.approx(20.0)
    assert replace(quality, sqnr_db=20.0) == Quality(20.0, 0.1, 0.5, 0.25, 4.0)


def test_the_order_of_windows_does_not_matter() -> None:
    windows = [rows([value, 1e-9], [value / 3, 1e-12]) for value in (1e16, 1.0, 0.1, 1e-7)]
    assert len({Quality.of(order) for order in itertools.permutations(windows)}) == 1


def test_an_exact_tensor_has_no_sqnr() -> None:
    assert Quality.of([rows([1.0], [0.0])]).sqnr_db is None


def test_a_tensor_of_zeros() -> None:
    quality = Quality.of([rows([0.0], [0.0], max_error=[0.0], absmax=[0.0], zeros=[4.0])])
    assert (quality.sqnr_db, quality.max_error_ratio, quality.zeros_share) == (None, 0.0, 1.0)
