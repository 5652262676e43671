"""What a cluster is to show, by theme. They run in the order in which they are written down, `FIRST` before the others."""

from typing import Callable, NamedTuple


class Scenario(NamedTuple):
    run: Callable[[], None]
    # What it takes on two cores, to tell whether it still fits.
    seconds: int


SCENARIOS = {}
# One or two of each theme: where time is short, they tell most.
FIRST = {"completes", "suspend", "operator_restart", "worker_killed", "slow_node", "refused", "newer", "upgrade"}
# Those that look at nothing but the API server.
ANYWHERE = set()


def scenario(seconds):
    def add(function):
        SCENARIOS[function.__name__] = Scenario(function, seconds)
        return function

    return add


def anywhere(seconds):
    def add(function):
        ANYWHERE.add(function.__name__)
        return scenario(seconds)(function)

    return add


# Each adds its own.
from scenarios import training, faults, adaptation, input, installation, network, placement  # noqa: E402, F401, I001
