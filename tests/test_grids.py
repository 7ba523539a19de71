import itertools

from tests.grids import pairwise


def test_every_pair_occurs():
    options = {"a": [1, 2, 3], "b": "xy", "c": [True, False], "d": range(4)}
    cases = pairwise(options)
    assert len(cases) < 3 * 2 * 2 * 4
    for one, two in itertools.combinations(options, 2):
        found = {(case[one], case[two]) for case in cases}
        assert found == set(itertools.product(options[one], options[two]))
    assert cases == pairwise(options)
