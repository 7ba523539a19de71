"""Write the tables of minimax: sweep over roots, dampings and squarings, each from its neighbours.

    python -m tools.minimax.tables --sweeps 3

A sweep takes about 12 minutes on a core. It begins with the tables that are there, so that a sweep more only
ever makes them better.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from dash_shampoo.inverse_root.minimax.ladder import Ladder
from dash_shampoo.inverse_root.minimax.tables import ROOTS, lower_end
from tools.minimax import search

logger = logging.getLogger(__name__)

FOLDER = Path(search.__file__).parents[2] / "dash_shampoo" / "inverse_root" / "minimax" / "tables"
MARGIN = 0.02
DAMPINGS = tuple(10.0**-exponent for exponent in range(2, 9))
SQUARINGS = range(3, 17)
# Below it more squarings are of no use: rounding in float32 is larger.
FLOOR = 1e-6
# An eigenvalue that is off by more is no root; nor is a table of use that takes a product more for nothing.
_WORST, _LEAST_GAIN = 0.95, 0.9

Key = tuple[Fraction, float, int]
Found = dict[Key, tuple[float, Ladder]]


def read() -> Found:
    """The tables that are there, by root, damping and number of squarings."""
    found: Found = {}
    for root in ROOTS:
        path = _path(root)
        if path.exists():
            for epsilon, error, rungs, output in json.loads(path.read_text())["tables"]:
                ladder = Ladder(tuple((a, b, c) for a, b, c in rungs), tuple(output))
                found[root, epsilon, ladder.num_squarings] = (error, ladder)
    return found


def write(found: Found) -> None:
    """Write a file for each root: ten digits, errors measured after rounding, nothing that is of no use."""
    for root in ROOTS:
        rows = []
        for epsilon in DAMPINGS:
            best = 1.0
            for k in SQUARINGS:
                if (root, epsilon, k) not in found:
                    continue
                lower = lower_end(epsilon, MARGIN)
                ladder = _rounded(search.normalized(found[root, epsilon, k][1], lower))
                error = search.max_error(ladder, float(root), lower, 60_001)
                if error > _WORST:
                    continue
                if error >= best or (error < 1e-3 and error > _LEAST_GAIN * best):
                    break
                best = error
                rows.append([epsilon, float(f"{error:.4g}"), ladder.rungs, ladder.output])
        lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows)
        head = f'{{"root": "{root}", "margin": {MARGIN}, "tables": [\n'
        _path(root).write_text(f"{head}{lines}\n]}}\n")


def improve(found: Found, key: Key, seed: int) -> None:
    """Search the ladder of a root, damping and number of squarings from the ladders next to it.

    Args:
        found: All ladders so far; the one of `key` is replaced where a better one is found.
        key: Which.
        seed: Of the random starts and perturbations.
    """
    root, epsilon, k = key
    lower, p = lower_end(epsilon, MARGIN), float(root)
    generator = torch.Generator().manual_seed(1000 * seed + 31 * int(10 * root) + k)
    x = search.nodes(lower, 400)

    def disturbed(theta: Tensor, size: float) -> Tensor:
        noise = torch.randn(len(theta), generator=generator, dtype=torch.float64)
        return theta * (1.0 + size * noise)

    near = _neighbours(found, key, generator)
    starts = [search.to_vector(search.with_best_output(ladder.rungs, x, p)) for ladder in near]
    starts += [disturbed(search.to_vector(ladder), 0.05) for ladder in near[:3]]
    if key in found:
        starts += [disturbed(search.to_vector(found[key][1]), size) for size in (0.02, 0.1)]
    for fold, slope in ((1.1, 0.3), (1.3, 0.0), (1.5, -0.4)):
        rungs = ((5.0, -6.0, 1.0), *((fold, slope, 1.0 - fold),) * (k - 2))
        starts.append(search.to_vector(search.with_best_output(rungs, x, p)))
    if k <= 6:
        nothing = torch.empty(0, 4 * k - 1, dtype=torch.float64)
        starts += list(search.candidates(k, 20, nothing, (), generator))
    theta = torch.stack(starts)
    for norm in search.SEARCH_NORMS:
        theta = search.descend(theta, x, p, norm, 40)
    sizes = search.norm_of(search.errors_of(theta, x, p), math.inf)
    sizes = torch.where(sizes.isfinite(), sizes, math.inf)
    for i in search.distinct(sizes.argsort(), sizes, 2):
        if key in found and float(sizes[i]) > 1.15 * found[key][0]:
            continue
        ladder, error = search.fit(search.to_ladder(theta[i]), p, lower)
        if math.isfinite(error) and (key not in found or error < 0.998 * found[key][0]):
            found[key] = (error, ladder)


def _neighbours(found: Found, key: Key, generator: torch.Generator) -> list[Ladder]:
    """Ladders of near roots and dampings, and those of fewer squarings with a rung repeated."""
    root, epsilon, k = key
    place = DAMPINGS.index(epsilon)
    near = [
        (other, epsilon, k) for other in sorted(ROOTS, key=lambda q: abs(math.log(q / root)))[:4]
    ]
    near += [(root, DAMPINGS[i], k) for i in (place - 1, place + 1) if 0 <= i < len(DAMPINGS)]
    ladders = [found[other][1] for other in near if other in found]

    def repeated(ladder: Ladder, times: int) -> Ladder:
        position = int(torch.randint(len(ladder.rungs), (1,), generator=generator))
        for _ in range(times):
            ladder = search.lengthened(ladder, position, 1.3)
        return ladder

    if (root, epsilon, k - 1) in found:
        ladders += [repeated(found[root, epsilon, k - 1][1], 1) for _ in range(3)]
    if place > 0 and (root, DAMPINGS[place - 1], k - 2) in found:
        ladders.append(repeated(found[root, DAMPINGS[place - 1], k - 2][1], 2))
    return ladders


def _rounded(ladder: Ladder) -> Ladder:
    def short(value: float) -> float:
        return float(f"{value:.10g}")

    rungs = tuple((short(a), short(b), short(c)) for a, b, c in ladder.rungs)
    return Ladder(rungs, tuple(map(short, ladder.output)))


def _path(root: Fraction) -> Path:
    return FOLDER / f"root_{root.numerator}_{root.denominator}.json"


def main() -> None:
    """Sweep, and write the tables after each root and damping."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sweeps", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    found = read()
    for sweep in range(arguments.sweeps):
        for epsilon in DAMPINGS:
            for root in ROOTS:
                for k in SQUARINGS:
                    if found.get((root, epsilon, k - 1), (1.0,))[0] < FLOOR:
                        break
                    improve(found, (root, epsilon, k), arguments.seed + sweep)
                errors = [
                    found[root, epsilon, k][0] for k in SQUARINGS if (root, epsilon, k) in found
                ]
                logger.info("%s %g: %s", root, epsilon, " ".join(f"{e:.2g}" for e in errors))
        write(found)


if __name__ == "__main__":
    main()
