"""Trained networks, cut in several ways by unlabelled pictures: error, words found or read, sizes and times.

    pip install --no-deps -r benchmarks/requirements-detector.txt
    python -m benchmarks.trained detector --out benchmarks/results
    python -m benchmarks.trained detector --time --out benchmarks/results

The networks: a text detector, CRAFT, and the convolutions of a text recognizer. Every way of cutting gets the same
pictures, and its best setting by those of them that are held out. The test pictures share no source with them. Nothing
is trained. The second command times what the first one made, when nothing else runs. Finished rows stay in the report
in --out, what later rows need in --work: after an interruption, the same command continues. On two quiet cores, the
detector takes an hour to half of the multiply-adds, and two and a half in all; times another one.
"""

import argparse
import dataclasses
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timm.models import reparameterize_model
from torch import Tensor, nn
from tqdm import tqdm

from timm_harmonic import deploy, export_onnx, harmonize, truncate
from timm_harmonic.conversion.channels import Choices
from timm_harmonic.conversion.costs import Pairs, costs_of, count_macs
from timm_harmonic.conversion.refit import losses_by_images, refitted
from timm_harmonic.conversion.running import read_images
from timm_harmonic.conversion.swap import harmonic_layers, replace_layers
from timm_harmonic.conversion.timing import times_of
from timm_harmonic.conversion.truncate import budget_of, choose_levels
from timm_harmonic.export.onnx import logits_of

from .craft import craft, f1, words
from .environment import environment
from .files import write
from .least_squares import fitted, with_statistics
from .low_rank import factors, low_rank
from .measure import as_ratios, fresh_processes
from .pages import lines, pages
from .pruning import SETTINGS, pruned_to
from .recognizer import read, recognizer

SHARES = (0.5, 0.7, 0.35)  # of the multiply-adds; the one that matters most comes first
# What each way is called in tables, in their order.
METHODS = {
    'filters': 'levels by energy of the filters',
    'data': 'levels by error on the pictures',
    'levels': 'levels, refitted',
    'channels': 'functions of each channel, refitted',
    'mixtures': 'functions of each mixture, refitted',
    'time': 'functions of each mixture, by time',
    'pruned': 'pruned',
    'pruned, fitted': 'pruned, with least squares',
    'low rank': 'low rank, with least squares',
}
BY_TIME = [('time', 0.6)]  # in ONNX Runtime, so that this is cut when nothing else runs
UNITS = [('none', None), *((method, share) for share in SHARES for method in METHODS if method != 'time'), *BY_TIME]
_OURS = tuple(METHODS)[:6]
OPTIONS = dict(calibration=128, ranges=32, test=128)  # numbers of pictures; those for 8-bit ranges are the first ones
_FITTED = 3  # settings of pruning that least squares tries, those with the least error without it
_BAR = 0.5  # the share of the multiply-adds that the bars are about
_LOOKS = {
    'filters': ('#E69F00', 'v'),
    'data': ('#D55E00', 'o'),
    'levels': ('#56B4E9', '^'),
    'channels': ('#0072B2', 's'),
    'mixtures': ('#CC79A7', '>'),
    'time': ('#CC79A7', 'D'),
    'pruned': ('#999999', 'x'),
    'pruned, fitted': ('#404040', 'P'),
    'low rank': ('#009E73', 'p'),
}

_KINDS = dict(float='float', int8='8 bits')

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Subject:
    """A network to cut."""

    title: str
    about: str  # it, what its error is, and its two scores
    scores: tuple[str, str]  # against the uncut network, and against the truth
    load: Callable[[], nn.Module]
    last: Callable[[Any], nn.Module]  # the layer whose outputs pruning keeps
    pictures: Callable[[str, int], Any]  # of a split, so many, as `pixels`
    assess: Callable[[Tensor, Tensor, Any], dict[str, float]]  # its outputs, those of the uncut network, pictures


def error_of(outputs: Tensor, expected: Tensor, over: tuple[int, ...]) -> float:
    """The root of the squared error over the variance of each channel."""
    deviations = expected - expected.mean(over, keepdim=True)
    return float((outputs - expected).norm() / deviations.norm())


def maps_assessed(maps: Tensor, expected: Tensor, test: Any) -> dict[str, float]:
    """Error of score maps, and F1 of their words against those of the uncut network and those that were drawn."""
    found, uncut = ([words(of) for of in some] for some in (maps, expected))
    drawn = [(ours, boxes) for ours, boxes in zip(found, test.boxes, strict=True) if boxes is not None]
    ours, boxes = ([pair[i] for pair in drawn] for i in range(2))
    return dict(error=error_of(maps, expected, (0, 2, 3)), uncut=f1(found, uncut), truth=f1(ours, boxes))


@torch.inference_mode()
def words_assessed(features: Tensor, expected: Tensor, test: Any) -> dict[str, float]:
    """Error of logits, and the share of words that are those of the uncut network, and those that were drawn."""
    model = recognizer()
    logits, uncut = model.logits(features), model.logits(expected)
    found = read(logits)
    same = [[one == other for one, other in zip(found, of, strict=True)] for of in (read(uncut), test.words)]
    shares = [100 * sum(of) / len(of) for of in same]
    return dict(error=error_of(logits, uncut, (0, 1)), uncut=shares[0], truth=shares[1])


SUBJECTS = dict(
    detector=Subject(
        'CRAFT',
        'CRAFT, a text detector (Baek et al., CVPR 2019), with its released weights. Error: root of the squared error '
        "of both score maps over their variance, against the uncut network. F1 of words, at half of the boxes' union, "
        'in percent: against the words of the uncut network, and against those that were drawn.',
        ('F1 uncut', 'F1 drawn'),
        lambda: craft(),
        lambda model: model.head[-1],
        pages,
        maps_assessed,
    ),
    recognizer=Subject(
        'The recognizer',
        'The convolutions of a recognizer of words in gray pictures (Shi et al., arXiv:1507.05717) with the weights '
        'that EasyOCR releases; the recurrent layers behind them stay, and are not timed. Error: root of the squared '
        'error of the logits over their variance, against the uncut network. Words, in percent: read as the uncut '
        'network reads them, and read as they were drawn.',
        ('as uncut', 'read right'),
        lambda: recognizer().features,
        lambda model: model[-2],
        lines,
        words_assessed,
    ),
)


def kept(path: Path, options: dict[str, int], make: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What was made earlier with the same options, or is made now, and what that took."""
    if not path.exists() or (saved := torch.load(path, weights_only=False))['options'] != options:
        start = time.monotonic()
        value = make()
        saved = dict(options=options, value=value, took=_took(start))
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(saved, path)
    return saved['value'], saved['took']


def _took(start: float) -> dict[str, float]:
    """Minutes since a moment, and the most memory that this process has used so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return dict(minutes=(time.monotonic() - start) / 60, peak_gib=peak)


class Cutting:
    """Ways to cut a network by the calibration pictures. Each returns the network and its setting."""

    def __init__(self, name: str, work: Path, options: dict[str, int]) -> None:
        self.work, self.options, self.subject = work, options, SUBJECTS[name]
        self.model = self.subject.load()
        pixels = self.subject.pictures('calibration', options['calibration']).pixels
        self.ranges = [pixels[: options['ranges']]]
        self.parts = read_images([pixels], next(self.model.parameters()))
        self.images = pixels[:1]
        self.took: dict[str, float] = dict(minutes=0.0, peak_gib=0.0)

    def _kept(self, name: str, make: Callable[[], Any]) -> Any:
        value, took = kept(self.work / f'{name}.pt', self.options, make)
        self.took['minutes'] += took['minutes']
        self.took['peak_gib'] = max(self.took['peak_gib'], took['peak_gib'])
        return value

    def cut(self, method: str, share: float) -> tuple[nn.Module, str]:
        """Cuts to a share of the multiply-adds."""
        if method in _OURS:
            return self._ours(method, share), ''
        if method == 'low rank':
            found = self._kept('factors', lambda: factors(self.model, self.parts))
            return fitted(self.model, *low_rank(self.model, found, self.images, share), self.parts)[0], ''
        return self._pruned(share, method == 'pruned, fitted')

    def _ours(self, method: str, share: float) -> nn.Module:
        """As `truncate` does. What is refitted is weighed in one run for all shares."""
        whole = harmonize(self.model, normalization='ortho')
        if method in ('filters', 'data'):
            data = self.parts if method == 'data' else None
            return truncate(whole, ratio=share, cost='macs', images=self.images, data=data)
        by_time = method == 'time'
        choices, losses = self._kept('weighed', lambda: weighed(whole, self.parts))['mixtures' if by_time else method]
        how = ('time', self.images, 'onnxruntime') if by_time else ('macs', self.images, 'torch')
        costs = costs_of(whole, *how, {name: list(of) for name, of in losses.items()})
        chosen = choose_levels(losses, costs, budget_of(costs, share))
        lower = choices.lowered(chosen)
        for name, layer in lower.items():
            layer.form = costs.of[name][chosen[name]].form
        small = harmonize(self.model, normalization='ortho')
        replace_layers(small, lower)
        return refitted(whole, small, self.parts)

    def _pruned(self, share: float, fit: bool) -> tuple[nn.Module, str]:
        """By the importance with the least error on held-out pictures."""

        def prune(setting: tuple[str, str]) -> Any:
            return pruned_to(self.model, setting, self.parts, share, self.subject.last(self.model))

        def screen() -> dict[tuple[str, str], float]:
            return {of: with_statistics(self.model, prune(of).model, self.parts)[1] for of in SETTINGS}

        errors = self._kept(f'pruned-{share}', screen)
        ranked = sorted(errors, key=lambda of: errors[of])
        if not fit:
            return with_statistics(self.model, prune(ranked[0]).model, self.parts)[0], ', '.join(ranked[0])
        found = {of: fitted(self.model, *prune(of), self.parts) for of in ranked[:_FITTED]}
        best = min(found, key=lambda of: found[of][1])
        return found[best][0], ', '.join(best)


def weighed(whole: nn.Module, parts: list[Tensor]) -> dict[str, tuple[Choices, dict[str, dict[Any, float]]]]:
    """What refitted levels and functions of each channel and mixture lose in each layer, from one run."""
    layers = harmonic_layers(whole)
    choices = [Choices(layers, list(layers), per) for per in ('layer', 'mixture')]
    levels, mixtures = losses_by_images(whole, parts, [of.weighed for of in choices], True)
    # Without mixtures these are the functions of each channel.
    channels = {name: {of: lost for of, lost in found.items() if not _mixed(of)} for name, found in mixtures.items()}
    return dict(levels=(choices[0], levels), channels=(choices[1], channels), mixtures=(choices[1], mixtures))


def _mixed(choice: int | Pairs) -> bool:
    return isinstance(choice, Pairs) and choice.mixtures > 0


def exported(plain: nn.Module, files: dict[str, Path], cutting: Cutting) -> dict[str, dict[str, float]]:
    """Writes a network in float and in 8 bits, and assesses both files by the test pictures."""
    test = cutting.subject.pictures('test', cutting.options['test'])
    expected, _ = kept(cutting.work / 'uncut.pt', cutting.options, lambda: _outputs(cutting.model, test.pixels))
    found = {}
    for kind, file in files.items():
        export_onnx(plain, test.pixels[:1], file, int8=cutting.ranges if kind == 'int8' else None)
        found[kind] = dict(
            cutting.subject.assess(logits_of(file, test.pixels), expected, test), bytes=file.stat().st_size
        )
    return found


@torch.inference_mode()
def _outputs(model: nn.Module, pixels: Tensor) -> Tensor:
    return torch.cat([model(part) for part in pixels.split(8)])


def files_of(method: str, share: float | None, work: Path) -> dict[str, Path]:
    """The ONNX files of a unit."""
    name = method.replace(', ', '_').replace(' ', '_') + (f'-{share:g}' if share else '')
    return {kind: work / f'{name}-{kind}.onnx' for kind in ('float', 'int8')}


def measure(name: str, method: str, share: float | None, work: Path, options: dict[str, int]) -> Row:
    """One row, without times. The files stay in the work folder, and so does a network of ours."""
    work.mkdir(parents=True, exist_ok=True)
    cutting = Cutting(name, work, options)
    start = time.monotonic()
    small, setting = (cutting.model, '') if share is None else cutting.cut(method, share)
    took, earlier = _took(start), cutting.took
    took = dict(minutes=took['minutes'] + earlier['minutes'], peak_gib=max(took['peak_gib'], earlier['peak_gib']))
    plain, files = reparameterize_model(small), files_of(method, share, work)
    if method in _OURS:
        torch.save(small, files['float'].with_suffix('.pt'))
    macs = count_macs(plain, cutting.images) / count_macs(cutting.model, cutting.images)
    return dict(
        method=method, share=share, setting=setting, macs=macs, **took, **exported(plain, files, cutting), time=None
    )


def timed(name: str, row: Row, work: Path, options: dict[str, int]) -> Row:
    """A row with its times. Networks of ours are deployed for that: each layer takes the form that is faster here."""
    files, uncut = files_of(row['method'], row['share'], work), files_of('none', None, work)
    image = SUBJECTS[name].pictures('test', 1).pixels
    if row['method'] in _OURS:
        small = torch.load(files['float'].with_suffix('.pt'), weights_only=False)
        plain = deploy(small, image, runtime='onnxruntime')
        row = dict(row, **exported(plain, files, Cutting(name, work, options)))
    runs = dict(uncut_float=uncut['float'], uncut_int8=uncut['int8'], float=files['float'], int8=files['int8'])
    times = {key: [ms / 1000 for ms in of] for key, of in times_of(runs, image).items()}
    of_int8 = as_ratios({key: times[key] for key in ('uncut_int8', 'int8')})['int8']
    return dict(row, time=dict(as_ratios(times), of_int8=of_int8))


def bars(rows: list[Row]) -> list[str]:
    """What the cut to half of the multiply-adds should reach, and whether it does."""
    at = {row['method']: row for row in rows if row['share'] in (_BAR, None) and row['method'] != 'time'}
    rivals = [of for of in ('levels', 'pruned, fitted', 'low rank') if of in at]
    if 'mixtures' not in at or 'none' not in at:
        return []
    ours, found = at['mixtures'], []

    def bar(text: str, met: bool) -> None:
        found.append(f'- {text}: {"met" if met else "missed"}.')

    for rival in rivals:
        errors = ours['float']['error'], at[rival]['float']['error']
        bar(f'error below that of {METHODS[rival]}, {errors[0]:.3f} against {errors[1]:.3f}', errors[0] < errors[1])
    lost = at['none']['float']['truth'] - ours['float']['truth']
    bar(f'score against the truth at most 1 point below that of the uncut network, {lost:.1f}', lost <= 1)
    if ours['time']:
        for kind, key, most in (('float', 'float', 0.6), ('8 bits', 'of_int8', 0.85)):
            ratio = ours['time'][key]['ratio']
            bar(f'time in {kind} at most {most} of that of the uncut network in {kind}, {ratio:.2f}', ratio <= most)
    return found


def title_of(row: Row) -> str:
    """What a row's method is called."""
    if row['method'] == 'time':
        return f'functions of each mixture, to {row["share"]:.0%} of the time'
    return 'nothing cut' if row['share'] is None else METHODS[row['method']]


def _ratio(row: Row, key: str) -> str:
    run = row['time'][key] if row['time'] else None
    return f'{run["ratio"]:.2f} [{run["low"]:.2f}, {run["high"]:.2f}]' if run else ''


def table(report: Row) -> str:
    """The report as Markdown."""
    env, options, subject = report['environment'], report['options'], SUBJECTS[report['network']]
    header = ['cut to', 'method', 'multiply-adds']
    for kind in _KINDS.values():
        header += [f'{what}, {kind}' for what in ('error', *subject.scores, 'MB', 'time')]
    lines = [
        '# A trained network, cut in several ways',
        '',
        f'Measured on {env["processor"]}, {env["threads"]} threads, torch {env["torch"]}, timm {env["timm"]}, '
        f'{env["date"]}. {subject.about} Nothing is trained. Every way of cutting gets the same '
        f'{options["calibration"]} unlabelled pictures, and chooses ridges and settings by a quarter of them. The '
        f'{options["test"]} test pictures have other photographs, fonts and words. MB: ONNX files, 10^6 bytes. Time: '
        'ONNX Runtime, one picture, as a ratio to the uncut network in float, median [quartiles]; "nothing cut" times '
        'the same file twice: the noise.',
        '',
        'Levels by energy and by error are as cut. In all others statistics of batch normalisation are re-estimated '
        'on the pictures where that is better on the held-out ones. Pruned: by Torch-Pruning, the best of '
        f'{len(SETTINGS)} settings, with least squares of {_FITTED} of them, in all convolutions. Low rank: k x 1 and '
        '1 x k convolutions, ranks chosen for all layers together, the second one by least squares. 8 bits: by ONNX '
        f'Runtime, static, ranges of {options["ranges"]} of the pictures.',
        '',
        f'| {" | ".join(header)} |',
        '|---' * len(header) + '|',
    ]
    for row in report['rows']:
        title = title_of(row) + (f' ({row["setting"]})' if row['setting'] else '')
        budget = '' if row['share'] is None or row['method'] == 'time' else f'{row["share"]:.0%}'
        cells = [budget, title, f'{row["macs"]:.1%}']
        for kind in _KINDS:
            of = row[kind]
            cells += [
                f'{of["error"]:.3f}',
                f'{of["uncut"]:.1f}',
                f'{of["truth"]:.1f}',
                f'{of["bytes"] / 1e6:.1f}',
            ]
            cells.append(_ratio(row, kind))
        lines.append(f'| {" | ".join(cells)} |')
    if found := bars(report['rows']):
        lines += ['', f'Functions of each mixture at {_BAR:.0%} of the multiply-adds:', '', *found]
    spent = [
        f'{title_of(row)} {row["minutes"]:.0f} minutes, {row["peak_gib"]:.1f} GiB'
        for row in report['rows']
        if row['share'] == _BAR and row['method'] != 'time'
    ]
    if spent:
        lines += [
            '',
            f'Cutting to {_BAR:.0%} took: {"; ".join(spent)}. Levels and functions that are refitted share one run.',
        ]
    return '\n'.join(lines) + '\n'


def plot(report: Row, path: Path) -> None:
    """Draws error against time, in float and in 8 bits, or against multiply-adds before anything is timed."""
    from matplotlib.figure import Figure

    rows, some_timed = report['rows'], any(row['time'] for row in report['rows'])
    figure = Figure(figsize=(11, 4.8), layout='constrained')
    for axes, (kind, title) in zip(figure.subplots(1, 2, sharey=True), _KINDS.items(), strict=True):
        for method, (colour, marker) in _LOOKS.items():
            line = sorted(
                (row['time'][kind]['ratio'] if some_timed else row['macs'], row[kind]['error'])
                for row in rows
                if row['method'] == method and (row['time'] or not some_timed)
            )
            if line:
                axes.plot(*zip(*line, strict=True), color=colour, marker=marker, linewidth=1.2, label=METHODS[method])
        for row in rows:
            if row['share'] is None and (row['time'] or not some_timed):
                at = row['time'][kind]['ratio'] if some_timed else row['macs']
                style: Row = dict(markersize=11, linestyle='', label='nothing cut', clip_on=False)
                axes.plot(at, row[kind]['error'], 'k*', **style)
        axes.set(title=title, xlabel=f'{"time" if some_timed else "multiply-adds"} / uncut network in float')
        axes.set_xlim(left=0)
        axes.set_ylim(0, min(1.15, 1.1 * max(row['int8']['error'] for row in rows)))
        axes.grid(color='0.92')
        axes.set_axisbelow(True)
        axes.spines[['top', 'right']].set_visible(False)
    figure.axes[0].set_ylabel('error')
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside lower center', ncols=4, frameon=False, fontsize=9)
    drawn = {row['share'] for row in rows if row['share'] in SHARES and (row['time'] or not some_timed)}
    shares = ', '.join(f'{share:.0%}' for share in sorted(drawn))
    figure.suptitle(
        f'{SUBJECTS[report["network"]].title} cut to {shares} of its multiply-adds, or by time: left and low is better',
        fontsize=10,
    )
    figure.savefig(path, format='png', dpi=140)


def reported(path: Path | None) -> dict[tuple[str, float | None], Row]:
    """Rows of a report that need no new run: same versions and options. Times stay on the same processor."""
    if path is None or not path.exists():
        return {}
    report, here = json.loads(path.read_text()), environment()
    same = all(report['environment'][key] == here[key] for key in ('torch', 'timm', 'timm_harmonic'))
    if not same or report['options'] != OPTIONS:
        return {}
    if report['environment']['processor'] != here['processor']:
        report['rows'] = [dict(row, time=None) for row in report['rows']]
    return {(row['method'], row['share']): row for row in report['rows']}


def main() -> None:
    parser = argparse.ArgumentParser(prog='python -m benchmarks.trained', description=__doc__.partition('\n')[0])
    parser.add_argument('network', choices=SUBJECTS)
    parser.add_argument('--out', type=Path, metavar='DIR', help='folder for NETWORK.json, .md and .png')
    parser.add_argument('--work', type=Path, default=Path('build/trained'), metavar='DIR', help='what was made')
    parser.add_argument('--only', nargs='+', metavar='NAME', help=f'of {", ".join(METHODS)}; 0.5, 0.7, 0.35')
    parser.add_argument('--time', action='store_true', help='time what was made, in place of making more')
    parser.add_argument('--threads', type=int, default=2, help='of the CPU')
    parser.add_argument('--show', type=Path, metavar='JSON', help='run nothing: print (and write) a saved report')
    args = parser.parse_args()
    if args.show:
        write(json.loads(args.show.read_text()), table, args.out, args.network, plot)
        return
    torch.set_num_threads(args.threads)  # here for the environment's sake
    saved, work = args.out / f'{args.network}.json' if args.out else None, args.work / args.network
    rows = reported(saved)

    def report() -> Row:
        return dict(
            network=args.network,
            environment=environment(),
            options=OPTIONS,
            rows=[rows[unit] for unit in UNITS if unit in rows],
        )

    only = set(args.only or ())
    methods, shares = only - {f'{share}' for share in SHARES}, only - {'none', *METHODS}
    wanted = [unit for unit in UNITS if unit[1] is None or not methods or unit[0] in methods]
    wanted = [unit for unit in wanted if unit[1] is None or not shares or f'{unit[1]}' in shares]
    wanted = [unit for unit in wanted if args.time or unit not in BY_TIME]
    wanted = [unit for unit in wanted if (not rows.get(unit, {}).get('time') if args.time else unit not in rows)]
    wanted = [unit for unit in wanted if unit in rows or not args.time or unit in BY_TIME]
    with fresh_processes(args.threads) as fresh:
        for unit in tqdm(wanted, unit='row'):
            if unit not in rows:
                rows[unit] = fresh.apply(measure, (args.network, *unit, work, OPTIONS))
            if args.time:
                rows[unit] = fresh.apply(timed, (args.network, rows[unit], work, OPTIONS))
            if saved:
                saved.parent.mkdir(parents=True, exist_ok=True)
                saved.write_text(json.dumps(report(), indent=1) + '\n')
    write(report(), table, args.out, args.network, plot)


if __name__ == '__main__':
    main()
