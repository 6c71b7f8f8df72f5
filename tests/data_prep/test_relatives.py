"""Relatives are found as by comparing every text with every other."""

import random

import numpy as np

from data_prep.relatives import has_relative


def test_relatives_are_those_of_the_plain_definition() -> None:
    generator = random.Random(0)
    draw = lambda count: [  # noqa: E731
        "".join(generator.choices("弹幕前方", k=generator.randint(0, 7))) for _ in range(count)
    ]
    for texts, others in [(draw(200), draw(25)), (draw(20), draw(3)), (["一"], []), ([], ["一"])]:
        expected = [any(t in other or other in t for other in others) for t in texts]
        found = has_relative(texts, others)
        assert found.dtype == bool and found.shape == (len(texts),)
        np.testing.assert_array_equal(found, np.array(expected, dtype=bool))
    assert 0.2 < has_relative(draw(200), [text for text in draw(25) if len(text) > 3]).mean() < 0.9
