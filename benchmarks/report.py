"""A saved measurement as a Markdown table and as a plot."""

from pathlib import Path
from typing import Any

from .measure import Setting

__all__ = ['plot', 'table']

_COLUMNS = ('plain again', 'fused', 'harmonic', 'original')


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    env = report['environment']
    lines = [
        '# Harmonic networks against their plain twins and the original formulation',
        '',
        f'Measured on {env["processor"]} ({env["device"]}, {env["threads"]} threads), torch {env["torch"]}, timm '
        f'{env["timm"]}, {env["date"]}. CUDA: {env["cuda"]}.',
        '',
        'Ratios of time to the plain twin (the same network with nothing harmonic) of the same round: median',
        '[quartiles]. "Plain again" times a second plain network: the noise. "Original" is the formulation of the',
        'original in the same network; "original / ours" is how many times longer it takes than the fused network',
        'and the harmonic one. Peak: most memory that a training step uses, as a ratio to the plain twin: harmonic',
        '(plain again).',
        '',
    ]
    settings = list(dict.fromkeys(_setting(row) for row in report['rows']))
    for setting in settings:
        lines += [
            f'## {setting}',
            '',
            f'| network | mode | batch | plain, ms | {" | ".join(_COLUMNS)} | original / ours | peak |',
            '|---' * 10 + '|',
            *(_line(row) for row in report['rows'] if _setting(row) == setting),
            '',
        ]
    if report['growth']:
        lines += [
            f'## How cost grows: {report["growth"][0]["model"]}, {_setting(report["growth"][0])}',
            '',
            '| mode | batch | side | plain, ms | fused | harmonic | original |',
            '|---|---|---|---|---|---|---|',
        ]
        for row in report['growth']:
            cells = [row['mode'], row['batch'], row['size'], f'{1000 * row["runs"]["plain"]["seconds"]:.1f}']
            cells += [_ratio(row['runs'].get(key)) for key in _COLUMNS[1:]]
            lines.append('| ' + ' | '.join(map(str, cells)) + ' |')
        lines.append('')
    return '\n'.join(lines)


def _setting(row: dict[str, Any]) -> Setting:
    return Setting(row['device'], row['precision'], row['channels_last'], row['compiled'])


def _ratio(run: dict[str, float] | None) -> str:
    return f'{run["ratio"]:.2f} [{run["low"]:.2f}, {run["high"]:.2f}]' if run else ''


def _line(row: dict[str, Any]) -> str:
    runs = row['runs']
    cells = [row['model'], row['mode'], row['batch'], f'{1000 * runs["plain"]["seconds"]:.1f}']
    cells += [_ratio(runs.get(key)) for key in _COLUMNS]
    theirs, ours = runs.get('original'), [key for key in ('fused', 'harmonic') if key in runs]
    cells.append(' / '.join(f'{theirs["ratio"] / runs[key]["ratio"]:.2f}' for key in ours) if theirs else '')
    peaks = [runs[key].get('peak_bytes') for key in ('plain', 'harmonic', 'plain again')]
    cells.append(f'{peaks[1] / peaks[0]:.3f} ({peaks[2] / peaks[0]:.3f})' if all(peaks) else '')
    return '| ' + ' | '.join(map(str, cells)) + ' |'


def plot(report: dict[str, Any], path: Path) -> None:
    """Bars of the ratios of every network, and the ratios as batch and image grow."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    colors = {'fused': '#2a9d8f', 'harmonic': '#264653', 'original': '#e76f51'}
    first = _setting(report['rows'][0])
    rows = [row for row in report['rows'] if _setting(row) == first]
    names = list(dict.fromkeys(row['model'] for row in rows))
    panels = list(dict.fromkeys((row['mode'], row['batch']) for row in rows))
    curves = list(dict.fromkeys((row['mode'], axis) for row in report['growth'] for axis in ('batch', 'size')))
    columns = max(len(panels), len(curves))
    figure, axes = plt.subplots(
        2 if curves else 1, columns, figsize=(4.2 * columns, 7.6 if curves else 4), squeeze=False
    )
    for axis, (mode, batch) in zip(axes[0], panels, strict=False):
        for shift, (key, color) in enumerate(colors.items()):
            found = [next(r for r in rows if (r['model'], r['mode'], r['batch']) == (n, mode, batch)) for n in names]
            runs = [row['runs'].get(key) for row in found]
            if all(runs):
                places = [i + 0.27 * (shift - 1) for i in range(len(names))]
                spread = [[r['ratio'] - r['low'] for r in runs], [r['high'] - r['ratio'] for r in runs]]
                axis.barh(places, [r['ratio'] for r in runs], 0.25, xerr=spread, color=color, label=key)
        axis.axvline(1, color='gray', linewidth=1)
        axis.set_yticks(range(len(names)), [n.removeprefix('harm_') for n in names], fontsize=8)
        axis.invert_yaxis()
        axis.set_title(f'{"evaluation" if mode == "eval" else "training step"}, batch {batch}', fontsize=10)
        axis.set_xlabel('time / plain twin: lower is faster')
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc='upper right', ncols=3, fontsize=8)
    for axis, (mode, along) in zip(axes[-1] if curves else [], curves, strict=False):
        other = 'size' if along == 'batch' else 'batch'
        common = max(
            {row[other] for row in report['growth']},
            key=lambda v: sum(row[other] == v and row['mode'] == mode for row in report['growth']),
        )
        of_curve = {r[along]: r for r in report['growth'] if r['mode'] == mode and r[other] == common}
        line = [of_curve[key] for key in sorted(of_curve)]
        for key, color in colors.items():
            runs = [row['runs'].get(key) for row in line]
            if all(runs):
                at = [row[along] for row in line]
                axis.plot(at, [r['ratio'] for r in runs], marker='o', color=color, label=key)
                axis.fill_between(at, [r['low'] for r in runs], [r['high'] for r in runs], color=color, alpha=0.2)
        axis.axhline(1, color='gray', linewidth=1)
        axis.set_xscale('log', base=2)
        axis.set_xticks([row[along] for row in line], [str(row[along]) for row in line])
        axis.set_title(f'{line[0]["model"]}, {mode}, {other} {common}: along {along}', fontsize=10)
        axis.set_ylabel('time / plain twin: lower is faster')
    for axis in [*axes[0][len(panels) :], *(axes[-1][len(curves) :] if curves else [])]:
        axis.set_axis_off()
    env = report['environment']
    figure.suptitle(f'{env["processor"]}, {first}, torch {env["torch"]}', fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
