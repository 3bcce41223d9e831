"""The study of skipping: its drawn videos have the shares that they are drawn for."""

import pytest

from benchmarks.speed import skipping
from dct_qwen2vl.dct.configuration_dct import DCTConfig


@pytest.fixture(scope="module")
def config() -> DCTConfig:
    return DCTConfig.preset("x4")


def test_slides_keep_little_and_lose_nothing(config):
    shares = skipping.shares(skipping.slides(), config)
    assert shares["exact"] == shares["38"] < 10 and shares["empty steps"] > 10 and shares["38 shows"] > 100


def test_a_fade_is_kept_more_often_the_higher_the_threshold(config):
    shares = skipping.shares(skipping.fade(), config)
    assert 25 < shares["33"] < shares["36"] < shares["38"] < shares["40"] < shares["45"] < shares["exact"] == 100


def test_noise_stops_skipping_unless_the_floor_knows_it(config):
    shares = skipping.shares(skipping.with_noise(skipping.talking()[:16], 4), config)
    assert shares["38"] > 80 and shares["38 + floor"] < 30


def test_a_cost_has_both_times(config):
    row = skipping.cost(config, lambda: skipping.encode_file(config, skipping.png_file(skipping.image(112, 112))), 1)
    assert row["encode"] > 0 and row["rule"] > 0 and row["percent"] > 0
