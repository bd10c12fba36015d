"""The search for faults, which is slow: how long it lasts, and what it has tried."""

import itertools
import os
import random
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.stateful import run_state_machine_as_test

_SECONDS = 4  # of each search without --fuzz


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by marker
def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker('slow')
    config.stash[_SEARCHES] = sum('search' in getattr(item, 'fixturenames', ()) for item in items)


_SEARCHES = pytest.StashKey[int]()


class Search:
    """Repeats rounds of examples until its time is over. It counts the examples."""

    def __init__(self, seconds, first_seed, phases):
        self.seconds, self.first_seed, self.tried = seconds, first_seed, 0
        self.options = dict(deadline=None, database=None, phases=phases, suppress_health_check=list(HealthCheck))

    def rounds(self):
        """Seeds, until the time is over."""
        end = time.monotonic() + self.seconds
        for number in itertools.count(self.first_seed):
            yield number
            if time.monotonic() > end:
                return

    def __call__(self, check, examples=20, **strategies):
        """Checks so many examples a round, of strategies by keyword."""

        def counted(**example):
            self.tried += 1
            check(**example)

        for number in self.rounds():
            seed(number)(settings(max_examples=examples, **self.options)(given(**strategies)(counted)))()

    def machine(self, machine):
        """Runs a state machine of hypothesis. Each sequence of steps is an example."""

        def counted():
            self.tried += 1
            return machine()

        for number in self.rounds():
            counted._hypothesis_internal_use_seed = number
            run_state_machine_as_test(counted, settings=settings(max_examples=20, **self.options))


@pytest.fixture
def search(request):
    """A search, by the same examples each time, by others with --fuzz."""
    minutes = request.config.getoption('--fuzz')
    if minutes is None:
        found = Search(_SECONDS, 0, [Phase.generate])
    else:
        workers = int(os.environ.get('PYTEST_XDIST_WORKER_COUNT', '1'))
        seconds = 60 * minutes * workers / request.config.stash[_SEARCHES]
        found = Search(seconds, random.SystemRandom().getrandbits(32), [Phase.generate, Phase.shrink])
    yield found
    request.node.user_properties.append(('tried', found.tried))


def pytest_terminal_summary(terminalreporter):
    for report in terminalreporter.getreports(''):  # of setting up and tearing down
        if report.when == 'teardown' and (tried := dict(report.user_properties).get('tried')) is not None:
            terminalreporter.write_line(f'{report.nodeid}: {tried} tried')
