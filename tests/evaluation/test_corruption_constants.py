"""The published constants, spot-checked against the paper's released generators, and their lookup."""

from __future__ import annotations

import numpy as np
import pytest

from hf_robust.evaluation.corruption_constants import (
    CONSTANTS,
    CORRUPTIONS,
    EXTRA,
    SEVERITIES,
    check_corruption,
    constant_of,
)


def test_15_corruptions_of_the_benchmark_and_4_extra_ones_in_both_tables() -> None:
    assert len(CORRUPTIONS) == 15 and len(EXTRA) == 4 and SEVERITIES == (1, 2, 3, 4, 5)
    for table in CONSTANTS.values():
        assert sorted(table) == sorted(CORRUPTIONS + EXTRA)
        assert {len(values) for values in table.values()} == {5}


@pytest.mark.parametrize(
    ("table", "name", "values"),
    [
        ("cifar", "gaussian_noise", (0.04, 0.06, 0.08, 0.09, 0.10)),
        ("cifar", "jpeg_compression", (80, 65, 58, 50, 40)),
        ("cifar", "defocus_blur", ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))),
        ("cifar", "fog", ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))),
        ("cifar", "contrast", (0.75, 0.5, 0.4, 0.3, 0.15)),
        ("imagenet", "gaussian_noise", (0.08, 0.12, 0.18, 0.26, 0.38)),
        ("imagenet", "shot_noise", (60, 25, 12, 5, 3)),
        ("imagenet", "motion_blur", ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))),
        ("imagenet", "pixelate", (0.6, 0.5, 0.4, 0.3, 0.25)),
    ],
)
def test_constants_are_those_published(table: str, name: str, values: tuple[object, ...]) -> None:
    assert CONSTANTS[table][name] == values
    assert tuple(constant_of(table, name, severity) for severity in SEVERITIES) == values


def test_elastic_lengths_are_fractions_of_the_side_they_were_published_for() -> None:
    assert np.array(CONSTANTS["cifar"]["elastic_transform"][1]) * 32 == pytest.approx([1.6, 6.4, 2.24])
    assert np.array(CONSTANTS["imagenet"]["elastic_transform"][0]) * 224 == pytest.approx([488, 170.8, 24.4])


def test_an_unknown_name_gets_the_nearest_ones_and_all() -> None:
    with pytest.raises(ValueError, match="no corruption 'gausian_noise': did you mean 'gaussian_noise'.*There are"):
        check_corruption("gausian_noise", 1)
    with pytest.raises(ValueError, match="no corruption 'xyz': There are gaussian_noise, .* extra: speckle_noise"):
        check_corruption("xyz", 1)


@pytest.mark.parametrize("severity", [0, 6, -1, 2.0, True, "3"])
def test_a_severity_is_a_whole_number_from_1_to_5(severity: object) -> None:
    with pytest.raises(ValueError, match=f"from 1 .mild. to 5 .strong., got {severity!r}"):
        check_corruption("fog", severity)  # type: ignore[arg-type]
    check_corruption("fog", np.int64(5))  # type: ignore[arg-type]


def test_an_unknown_table_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="constants must be one of 'cifar', 'imagenet', got 'mnist'"):
        constant_of("mnist", "fog", 1)
