"""What is harmonic in a network and what it costs, as a table; what its layers keep, as a picture."""

import dataclasses
import io
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from timm.models import get_model_args
from torch import Tensor, nn

from ..layers import dct_frequencies
from .costs import multiply_adds
from .running import uses_of
from .swap import harmonic_layers, reasons_to_skip

_CAPTION = (
    'One map for each layer: row i and column j stand for the DCT function with i sign changes down and j across, the\n'
    'colour how many channels keep it, or mixtures in their place. Below the name: functions of a channel, on average.'
)
_FONTS: Any = {'font.size': 9, 'axes.titlesize': 9, 'axes.labelsize': 9, 'xtick.labelsize': 8, 'ytick.labelsize': 7}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convolution:
    """One convolution of a network. Fields about frequencies are None for a plain one."""

    name: str  # qualified
    kernel_size: tuple[int, ...]
    groups: int
    level: int | None = None  # the paper's lambda, 2k - 1 for all frequencies
    kept: float | None = None  # number of frequencies kept, the mean over input channels or mixtures of them
    frequencies: int | None = None  # number of all frequencies
    channels: list[int] | None = None  # how many keep 0, 1, ... frequencies; None if all keep the same
    mixtures: int | None = None  # of channels, filtered in place of the input channels; None without
    parameters_before: int  # weights of the plain convolution, without bias
    parameters: int  # weights or coefficients, without bias
    energy_kept: float | None = None  # share of the filters' energy that truncation left; None if loaded at a level
    basis: str | None = None  # 'l1' (the authors'), 'ortho' or 'smoothness=S'
    form: str | None = None  # 'dense' or 'separable'
    macs_before: int | None = None  # multiply-adds of the plain convolution for one image; None without images
    macs: int | None = None  # multiply-adds in its form
    ms_before: float | None = None  # milliseconds of the plain convolution, for its batch; None if it was not timed
    ms: float | None = None  # milliseconds in its form; None if it was not timed
    reason: str  # why it has to stay plain; empty if it is or could be harmonic


@dataclasses.dataclass(frozen=True)
class HarmonicReport:
    """All convolutions of a network, in its order. It prints as a table."""

    model: str  # name of the architecture, or of the class
    convolutions: tuple[Convolution, ...]
    parameters_before: int  # of the network, with all frequencies
    parameters: int  # of the network

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as plain values, for JSON."""
        return dataclasses.asdict(self)

    def to_markdown(self) -> str:
        """Returns the report as a Markdown table."""
        return '\n'.join([self.summary(), '', *self._lines(box='MARKDOWN'), ''])

    def __str__(self) -> str:
        return '\n'.join([*self._lines(pad_edge=False, padding=(0, 2, 0, 0)), self.summary()])

    def summary(self) -> str:
        """Returns how much is harmonic, the parameters, and what a question mark in the table means."""
        harmonic = sum(conv.level is not None for conv in self.convolutions)
        unknown = any(conv.level is not None and conv.energy_kept is None for conv in self.convolutions)
        keeping = sum((Counter(dict(enumerate(conv.channels or ()))) for conv in self.convolutions), Counter[int]())
        mean = sum(n * count for n, count in keeping.items()) / max(1, keeping.total())
        counts = ', '.join(f'{count:,} keep {n}' for n, count in sorted(keeping.items()))
        return (
            f'{self.model}: {harmonic} of {len(self.convolutions)} convolutions are harmonic, {self.parameters:,} of '
            f'{self.parameters_before:,} parameters ({self.parameters / max(1, self.parameters_before):.1%}).'
            + f' Input channels with functions of their own keep {mean:.3g} on average: {counts}.' * bool(keeping)
            + ' The energy kept is unknown (?) for coefficients loaded or initialised at a level.' * unknown
        )

    def _lines(self, box: str = '', **style: Any) -> list[str]:
        from rich import box as boxes  # here, because importing it takes as long as the rest of the package
        from rich.console import Console
        from rich.table import Table

        table = Table(box=getattr(boxes, box) if box else None, **style)
        rows = [_cells(conv) for conv in self.convolutions]
        # Only what was counted or timed has a column.
        columns = [title for title in next(iter(rows), {}) if title not in _MEASURED or any(row[title] for row in rows)]
        for title in columns:
            table.add_column(title.partition('.')[0], justify='left' if title in _TEXTS else 'right', no_wrap=True)
        for row in rows:
            table.add_row(*(row[title] for title in columns))
        text = io.StringIO()
        Console(file=text, width=1000, highlight=False, color_system=None).print(table)
        return [line.rstrip() for line in text.getvalue().splitlines() if line.strip()]


_TEXTS = ('convolution', 'basis', 'form', 'stays plain')
_MEASURED = ('mixtures', 'multiply-adds', 'of.macs', 'ms', 'of.ms')


def _cells(conv: Convolution) -> dict[str, str]:
    harmonic = conv.level is not None

    def text(value: Any, form: str = '') -> str:
        return '' if value is None else f'{value:{form}}'

    return {
        'convolution': conv.name,
        'kernel': ' x '.join(map(str, conv.kernel_size)),
        'groups': text(conv.groups),
        'level': text(conv.level),
        'kept': f'{conv.kept:.3g} / {conv.frequencies}' if harmonic else '',
        'mixtures': text(conv.mixtures),
        'parameters': text(conv.parameters, ','),
        'of': text(conv.parameters_before if harmonic else None, ','),
        'energy kept': text(conv.energy_kept, '.2%') or '?' * harmonic,
        'basis': text(conv.basis),
        'form': text(conv.form),
        'multiply-adds': text(conv.macs, ','),
        'of.macs': text(conv.macs_before, ','),
        'ms': text(conv.ms, '.3g'),
        'of.ms': text(conv.ms_before, '.3g'),
        'stays plain': conv.reason if conv.reason or harmonic else 'not selected',
    }


def _numel(parameter: Tensor) -> int:
    """Counts the numbers in a parameter; a lazy layer has none yet."""
    return 0 if isinstance(parameter, nn.UninitializedParameter) else parameter.numel()


def harmonic_report(model: nn.Module, images: Tensor | None = None) -> HarmonicReport:
    """Lists all convolutions of a network, harmonic and plain: print it, or use `to_dict()` or `to_markdown()`.

    With images, an example batch (B, C, H, W), it counts the harmonic layers' multiply-adds. Milliseconds show where
    `deploy`, or `truncate` with cost='time', has timed layers.
    """
    reasons, layers = reasons_to_skip(model), harmonic_layers(model)
    uses = {} if images is None else uses_of(model, images)
    found = []
    for name, module in model.named_modules():
        if name not in layers and name not in reasons:
            continue
        size = _numel(module.weight)
        about: dict[str, Any] = dict(name=name, kernel_size=tuple(module.kernel_size), groups=module.groups)
        about |= dict(parameters_before=size, parameters=size, reason=reasons.get(name, ''))
        if name in layers:
            width, frequencies = module.out_channels // module.groups, module.kernel_size[0] ** 2
            kept, before = size / (width * module.channels), width * module.in_channels * frequencies
            if module.mixtures is not None:
                about |= dict(mixtures=module.channels, parameters=size + module.mixtures.numel())
            about |= dict(level=module.level, kept=kept, frequencies=frequencies, energy_kept=module.energy_kept)
            about |= dict(parameters_before=before, basis=module.named_basis(), form=module.form)
            if module.kept is not None and not module.kept.is_meta:
                about |= dict(channels=module.kept.sum(2).flatten().bincount(minlength=frequencies + 1).tolist())
            if images is not None:
                before *= sum(use.positions for use in uses[name]) // len(images)
                now = multiply_adds(module, module.level, module.form, uses[name]) // len(images)
                about |= dict(macs_before=before, macs=now)
            if module.milliseconds:
                before = module.milliseconds['dense'] if module.mixtures is None else None
                about |= dict(ms_before=before, ms=module.milliseconds.get(module.form))
        found.append(Convolution(**about))
    parameters = sum(map(_numel, model.parameters()))
    dropped = sum(conv.parameters_before - conv.parameters for conv in found)
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    name = get_model_args(model).get('base_model') or cfg.get('architecture') or type(model).__name__
    return HarmonicReport(name, tuple(found), parameters + dropped, parameters)


def draw_truncation(path: Path, model: nn.Module) -> None:
    """Draws a PNG of what harmonic layers keep: for each a map of functions, by the share of channels with them."""
    import matplotlib
    from matplotlib.figure import Figure

    layers, report = harmonic_layers(model), harmonic_report(model)
    columns = min(max(4, math.isqrt(2 * len(layers))), 6)
    row_height = 0.95 + 0.06 * columns  # with room for the text, where a map and its margin are 1 wide
    rows = -(-len(layers) // columns)
    height = max(4.2, 1.2 + 6.7 * rows * row_height / columns)
    with matplotlib.rc_context(_FONTS):
        figure = Figure(figsize=(8, height), layout='constrained')  # no window, whatever backend the user has set
        axes = figure.subplots()
        for number, (name, layer) in enumerate(layers.items()):
            side, (row, column) = layer.kernel_size[0], divmod(number, columns)
            shares = np.zeros((side, side))
            places = tuple(zip(*dct_frequencies(side, layer.level, layer.dc), strict=True))
            kept = np.ones((layer.channels, 1)) if layer.kept is None else layer.kept[0, :, :, 0].cpu().numpy()
            shares[places] = 100 * kept.sum(0) / layer.in_channels
            left, low = column + 0.08, row_height * (row + 1) - 0.11
            image = axes.imshow(shares, cmap='viridis', vmin=0, vmax=100, extent=(left, left + 0.84, low, low - 0.84))
            longest = 114 // columns  # characters that fit
            title = name if len(name) <= longest else f'...{name[3 - longest :]}'
            text = f'{title}\n{shares.sum() / 100:.3g} of {side**2}'
            axes.text(left, low - 0.88, text, fontsize=7, va='bottom')
        axes.set(xlim=(0, columns), ylim=(rows * row_height, 0))
        axes.axis('off')
        axes.set_title(f'{report.model}: {report.parameters:,} of {report.parameters_before:,} parameters')
        label = 'share of input channels that keep a function (%)'
        figure.colorbar(image, ax=axes, label=label, shrink=0.8, pad=0.02, aspect=4 * height)
        figure.supxlabel(_CAPTION, x=0.01, ha='left', fontsize=8, color='0.35')
        figure.savefig(path, format='png', dpi=130)
