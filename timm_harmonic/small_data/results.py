"""Results of a comparison: statistics with intervals, the table, the picture, and the files."""

import dataclasses
import json
import platform
import statistics
import tempfile
import textwrap
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from ..common import explained
from ..common.files import write_text, write_whole
from .protocol import Protocol
from .training import MEANINGS

_CONFIDENCE = 0.95
_EDGE = 0.15  # share of a range, in logarithms, that is its edge: the outermost of eight trials are in it
Runs = Sequence[dict[str, Any]]
# What results depend on, and its modules. The photographs are files of the last two.
_PACKAGES = dict(timm_harmonic='timm_harmonic', torchvision='torchvision', timm='timm')
_PACKAGES |= dict(scikit_image='skimage', scikit_learn='sklearn')
# Of Okabe and Ito: colour-blind readers can tell them apart.
_COLOURS = ('#404040', '#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9')
_FONTS: Any = {'font.size': 9, 'axes.titlesize': 9, 'axes.labelsize': 9, 'xtick.labelsize': 8, 'ytick.labelsize': 8}


def difference(values: Sequence[float], baseline: Sequence[float], overlap: float = 0.0) -> dict[str, Any]:
    """Mean of the paired differences with its 95 % interval by Student's t; a single pair has no interval.

    Seeds that split the same images are not independent: for them `overlap` is the number of test images per training
    image of a split, which corrects the variance of the mean (Nadeau and Bengio 2003).
    """
    pairs = [ours - theirs for ours, theirs in zip(values, baseline, strict=True)]
    mean, low, high = statistics.mean(pairs), None, None
    if len(pairs) > 1:
        from scipy.stats import t  # here, because it takes long to import

        error = statistics.stdev(pairs) * (1 / len(pairs) + overlap) ** 0.5
        low, high = (mean + sign * error * t.ppf((1 + _CONFIDENCE) / 2, len(pairs) - 1) for sign in (-1, 1))
    return dict(pairs=pairs, mean=mean, low=low, high=high)


def over_images(correct: Sequence[str], baseline: Sequence[str]) -> list[float]:
    """95 % interval of the mean difference over other test images like these, by a paired bootstrap.

    `correct` and `baseline` have a digit for each test image, a text for each seed.
    """
    ours, theirs = (np.mean([list(map(int, of)) for of in texts], 0) for texts in (correct, baseline))
    drawn = np.random.default_rng(0).multinomial(len(ours), np.full(len(ours), 1 / len(ours)), 2000)
    means = 100 * (drawn @ (ours - theirs)) / len(ours)
    return np.quantile(means, [(1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2]).tolist()


def report(
    comparison: Protocol, runs: Mapping[str, Runs], baseline: str, covers: str, same_test: bool = False, **data: Any
) -> dict[str, Any]:
    """What results.json holds of a comparison: statistics of the runs, one per seed, paired with the baseline's.

    `covers` says what the intervals of the differences cover, and `data` more about the images. With `same_test`, all
    seeds have the same test images, see `over_images`.
    """
    train, test = comparison.draw(0)
    chance = 100 * max(test.labels.bincount().tolist()) / len(test)
    overlap = len(test) / len(train) if comparison.nested else 0.0
    measured = {name: {key: [run[key] for run in of] for key in of[0]} for name, of in runs.items()}
    networks = {}
    for net in comparison.networks:
        of, base = measured[net.name], measured[baseline]
        images = dict(over_images=over_images(of['correct'], base['correct'])) if same_test else {}
        networks[net.name] = dict(
            **images,
            accuracy_mean=statistics.mean(of['accuracy']),
            accuracy_deviation=statistics.stdev(of['accuracy']) if len(of['accuracy']) > 1 else None,
            accuracy=of['accuracy'],
            accuracy_as_trained=of['accuracy_as_trained'],
            difference=difference(of['accuracy'], base['accuracy'], overlap),
            parameters=of['parameters'][0],
            **comparison.chosen(net),
        )
    packages = {name: version(name) for name, module in _PACKAGES.items() if find_spec(module)}
    here = dict(torch=torch.__version__, python=platform.python_version(), threads=torch.get_num_threads())
    return dict(
        note='Measured by this run on this machine; accuracies are percentages of the test images.',
        recipe=dataclasses.asdict(comparison.recipe),
        environment=packages | here,
        baseline=baseline,
        covers=covers,
        data=dict(train=len(train), test=len(test), chance=chance, classes=comparison.classes, **data),
        networks=networks,
    )


def interval(of: dict[str, Any]) -> str:
    """A difference as text: +3.1 (+1.2 to +5.0)."""
    return f'{of["mean"]:+.1f}' + ('' if of['low'] is None else f' ({of["low"]:+.1f} to {of["high"]:+.1f})')


def accuracy(of: dict[str, Any]) -> str:
    """A network's accuracy as text: 53.0 ± 2.1."""
    spread = of['accuracy_deviation']
    return f'{of["accuracy_mean"]:.1f}' + ('' if spread is None else f' ± {spread:.1f}')


def table(results: dict[str, Any], about: str) -> Table:
    """The table of a comparison, a row per network; `about` says on what."""
    baseline, networks, chance = results['baseline'], results['networks'], results['data']['chance']
    seeds, trials = (len(networks[baseline][key]) for key in ('accuracy', 'trials'))
    title = f'Measured here: {seeds} seed{"s" * (seeds > 1)}, {about}, chance (largest class) {chance:.1f} %'
    caption = (
        'mean ± standard deviation; as trained: before batch-norm statistics were re-estimated; differences are paired '
        f'by seed, with their 95 % interval, which covers {results["covers"]}'
        + f'; settings are the best of {trials} for each network'
        * (trials > 0)
    )
    images = ['over images'] if 'over_images' in networks[baseline] else []
    lines = Table(title=title, caption=caption, pad_edge=False)
    lines.add_column('network')
    for name in ('test accuracy, %', 'as trained, %', f'minus {baseline}', *images, 'parameters'):
        lines.add_column(name, justify='right')
    for name, of in networks.items():
        gains = [interval(of['difference']), *('{:+.1f} to {:+.1f}'.format(*of['over_images']) for _ in images)]
        gains = [''] * len(gains) if name == baseline else gains
        as_trained = f'{statistics.mean(of["accuracy_as_trained"]):.1f}'
        lines.add_row(name, accuracy(of), as_trained, *gains, f'{of["parameters"]:,}')
    return lines


def at_edge(value: float, bounds: Sequence[float]) -> bool:
    """Whether a chosen value is at the edge of what was searched."""
    low, high = np.log(bounds)
    return not _EDGE < (np.log(value) - low) / (high - low) < 1 - _EDGE


def advice(found: dict[str, Any]) -> list[str]:
    """Which chosen settings of a comparison are at the edge of what was searched."""
    lines = []
    for key, bounds in found['search']['ranges'].items():
        chosen = [(name, choice[key]) for name, of in found['networks'].items() for choice in of['chosen']]
        edge = [f'{name} {value:.2g}' for name, value in chosen if at_edge(value, bounds)]
        if edge:
            share = f'{len(edge)} of {len(chosen)} choices: {", ".join(dict.fromkeys(edge))}'
            span = f'{bounds[0]:g} to {bounds[1]:g}'
            lines.append(f'The best {key} is at the edge of the search in {share} (searched: {span}).')
    return lines


def open_folder(folder: Path) -> None:
    """Makes a folder for results. Raises InputError if it cannot be written, before hours of training."""
    with explained(f'cannot write results to {folder}', OSError):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass


def write_results(folder: Path, picture: str, results: dict[str, Any], title: str) -> None:
    """Writes results.json and a picture, see `draw`, and prints where they are."""
    write_whole(folder / 'results.json', lambda path: write_text(path, json.dumps(results, indent=1) + '\n'))
    write_whole(folder / picture, lambda path: draw(results, title, path))
    print(f'Wrote {folder / "results.json"} and {folder / picture}.')


def draw(results: dict[str, Any], title: str, path: Path) -> None:
    """Draws a comparison as a PNG: accuracies with their deviation, and the differences paired by seed."""
    import matplotlib
    from matplotlib.figure import Figure

    networks, baseline = results['networks'], results['baseline']
    with matplotlib.rc_context(_FONTS):
        figure = Figure(figsize=(11, 2 + 0.6 * len(networks)), layout='constrained')
        left, right = figure.subplots(1, 2, sharey=True)
        for place, (name, of) in enumerate(networks.items()):
            deviation, gain = of['accuracy_deviation'] or 0, of['difference']
            _draw_row(left, place, of['accuracy'], of['accuracy_mean'], [deviation, deviation], accuracy(of))
            around = [0 if gain[key] is None else abs(gain[key] - gain['mean']) for key in ('low', 'high')]
            _draw_row(right, place, gain['pairs'], gain['mean'], around, '' if name == baseline else interval(gain))
        for axes in (left, right):
            axes.grid(color='0.92', axis='x')
            axes.set_axisbelow(True)
            axes.spines[['top', 'right', 'left']].set_visible(False)
        names = [textwrap.fill(f'{name}: {MEANINGS[name]}' if name in MEANINGS else name, 24) for name in networks]
        left.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.6))
        left.set_title(f'{title}\nA dot per seed, mean and standard deviation', loc='left')
        left.set_xlabel('test accuracy (%); dotted: chance')
        left.axvline(results['data']['chance'], color='0.5', linestyle=':', linewidth=1)
        right.set_title(f'Minus {baseline}\nPaired by seed, mean and 95 % interval', loc='left')
        right.set_xlabel('percentage points (right is better)')
        right.axvline(0, color='0.5', linestyle=':', linewidth=1)
        figure.savefig(path, format='png', dpi=160)


def _draw_row(axes: Any, place: int, values: Sequence[float], mean: float, reach: Sequence[float], text: str) -> None:
    """Draws a network's values, their mean, how far its interval reaches to both sides, and a text."""
    look: Any = dict(color=_COLOURS[place % len(_COLOURS)])
    axes.scatter(values, [place + 0.15] * len(values), s=12, alpha=0.6, linewidths=0, **look)
    marker = 'os^DvPX'[place % 7]
    axes.errorbar(mean, place, xerr=[[side] for side in reach], marker=marker, capsize=4, linewidth=1.6, **look)
    axes.annotate(text, (mean, place), (0, 8), textcoords='offset points', ha='center')
