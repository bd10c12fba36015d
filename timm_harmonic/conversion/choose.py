"""Which levels the layers of a network keep, so that it fits a budget."""

import importlib.util
import math

from ..common import InputError
from .costs import Costs
from .losses import Losses

_LEAST = 1e-12  # share of energy: a layer that keeps nothing is worse than any other, but not infinitely bad
_SECONDS = 10.0  # that the exact search may take

_Choice = dict[str, int]


def choose_levels(losses: Losses, costs: Costs, budget: float) -> _Choice:
    """Levels for all layers together, so that the network costs at most `budget`.

    Each layer passes on what the one before left, so the shares kept multiply: the sum of -ln(1 - loss) is to be small.
    The choice is the best one, by integer programming, where SciPy is installed and finds it in ten seconds; else a
    greedy one. Raises ValueError if the network cannot be made so small.
    """
    harms = {
        name: {level: -math.log(max(1 - lost, _LEAST)) for level, lost in of.items()} for name, of in losses.items()
    }
    top = {name: max(of) for name, of in losses.items()}
    if budget < costs.least:
        raise InputError(
            f'a budget of {costs.text(budget)} is too small: the network has {costs.text(costs.present)}, and '
            f'{costs.text(costs.least)} with every layer at its cheapest level.'
        )
    if costs.present <= budget:
        return top
    greedy = _greedy(harms, costs, budget)
    if importlib.util.find_spec('scipy') is None:
        return greedy
    exact = _exact(harms, costs, budget)
    return greedy if exact is None or _harm(greedy, harms) <= _harm(exact, harms) else exact


def _harm(chosen: _Choice, harms: Losses) -> float:
    return sum(harms[name][level] for name, level in chosen.items())


def _exact(harms: Losses, costs: Costs, budget: float) -> _Choice | None:
    """The best choice, by SciPy; None if it takes too long."""
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array, vstack

    places = [(name, level) for name, of in harms.items() for level in of]
    names = {name: row for row, name in enumerate(harms)}
    rows = np.array([names[name] for name, _ in places])
    one_each = csr_array((np.ones(len(places)), (rows, np.arange(len(places)))))
    cost = np.array([costs.of[name][level] for name, level in places])
    # In shares of the budget, so that rounding does not depend on the unit.
    scale = max(budget - costs.rest, 1e-12)
    limits = LinearConstraint(
        vstack([one_each, csr_array(cost[None] / scale)]), [1] * len(names) + [-np.inf], [1] * len(names) + [1]
    )
    harm = np.array([harms[name][level] for name, level in places])
    options = dict(time_limit=_SECONDS, mip_rel_gap=1e-6)
    found = milp(harm, constraints=limits, integrality=np.ones(len(places)), bounds=Bounds(0, 1), options=options)
    if found.x is None:
        return None
    chosen = {name: level for (name, level), share in zip(places, found.x, strict=True) if share > 0.5}
    return chosen if costs.total(chosen) <= budget else None


def _greedy(harms: Losses, costs: Costs, budget: float) -> _Choice:
    """A good choice without SciPy.

    Each layer has steps to lower levels, along the lower convex hull of its (cost, harm), and of all steps the one with
    the least harm per cost saved comes first. Up to here no choice as cheap does less harm. The last step may save too
    much. What then fits goes back to the layer that gains most, which is a heuristic.
    """
    chosen = {name: max(of) for name, of in harms.items()}
    steps = [
        (slope, place, name, level)
        for place, name in enumerate(harms)
        for slope, level in _hull(costs.of[name], harms[name])
    ]
    for _, _, name, level in sorted(steps, key=lambda step: step[:2]):
        if costs.total(chosen) <= budget:
            break
        chosen[name] = level
    while True:
        left = budget - costs.total(chosen)
        raises = [
            (of[chosen[name]] - harm, name, level)
            for name, of in harms.items()
            for level, harm in of.items()
            if harm < of[chosen[name]] and costs.of[name][level] - costs.of[name][chosen[name]] <= left
        ]
        if not raises:
            return chosen
        _, name, level = max(raises, key=lambda step: step[0])
        chosen[name] = level


def _hull(costs: dict[int, float], harms: dict[int, float]) -> list[tuple[float, int]]:
    """Steps down the lower convex hull from the highest level: (harm per cost saved, level), slopes ascending.

    The last one is to the cheapest level, which need not be the lowest where costs were measured.
    """
    steps, level, last = [], max(costs), -math.inf
    while cheaper := [lv for lv in costs if costs[lv] < costs[level]]:
        slopes = {lv: (harms[lv] - harms[level]) / (costs[level] - costs[lv]) for lv in cheaper}
        level = min(cheaper, key=lambda lv: (slopes[lv], lv))
        last = max(last, slopes[level])  # rounding must not change the order of steps
        steps.append((last, level))
    return steps
