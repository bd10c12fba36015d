"""What is harmonic in a network, what is not, and what it costs."""

import dataclasses
from pathlib import Path
from typing import Any

from timm.models import get_model_args
from torch import Tensor, nn

from .choose import choose_levels
from .costs import parameter_costs
from .energy import energy_kept
from .figure import draw
from .forms import multiply_adds
from .losses import losses_by_filters
from .running import uses_of
from .swap import harmonic_layers, reasons_to_skip


@dataclasses.dataclass(frozen=True)
class Convolution:
    """One convolution of a network. What is about frequencies is None for a plain one."""

    name: str  # qualified
    kernel_size: tuple[int, ...]
    groups: int
    level: int | None  # the paper's lambda, 2k - 1 for all frequencies
    kept: int | None  # frequencies that the layer keeps
    frequencies: int | None  # frequencies that there are
    parameters_before: int  # weights of the plain convolution, without bias
    parameters: int  # weights or coefficients, without bias
    energy_kept: float | None  # share of the filters' energy; None too for coefficients loaded at their level
    basis: str | None  # 'l1' (the authors'), 'ortho' or 'smoothness=S'
    form: str | None  # 'dense' or 'separable'
    macs_before: int | None  # multiply-adds of the plain convolution for one image; None without images
    macs: int | None  # multiply-adds in its form
    ms_before: float | None  # milliseconds of the plain convolution, for the batch that it was timed with
    ms: float | None  # milliseconds in its form; None if it was not timed
    reason: str  # why it stays plain; empty if it is harmonic or could be


@dataclasses.dataclass(frozen=True)
class HarmonicReport:
    """All convolutions of a network, in its order. Prints as a table."""

    model: str  # name of the architecture, or of the class
    convolutions: tuple[Convolution, ...]
    parameters_before: int  # of the network, with all frequencies
    parameters: int  # of the network

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, for JSON."""
        return dataclasses.asdict(self)

    def to_markdown(self) -> str:
        """The report as a Markdown table."""
        return '\n'.join([self._summary(), '', *self._lines(box='MARKDOWN'), ''])

    def __str__(self) -> str:
        return '\n'.join([*self._lines(pad_edge=False, padding=(0, 2, 0, 0)), self._summary()])

    def _summary(self) -> str:
        harmonic = sum(conv.level is not None for conv in self.convolutions)
        return (
            f'{self.model}: {harmonic} of {len(self.convolutions)} convolutions are harmonic, {self.parameters:,} of '
            f'{self.parameters_before:,} parameters ({self.parameters / max(1, self.parameters_before):.1%}).'
        )

    def _lines(self, box: str = '', **style: Any) -> list[str]:
        from rich import box as boxes  # here, because it takes as long to import as the rest of the package
        from rich.console import Console
        from rich.table import Table

        table = Table(box=getattr(boxes, box) if box else None, **style)
        rows = [_cells(conv) for conv in self.convolutions]
        # What nobody counted or timed has no column.
        columns = [title for title in _COLUMNS if title not in _MEASURED or any(row[title] for row in rows)]
        for title in columns:
            table.add_column(title.partition('.')[0], justify='left' if title in _TEXTS else 'right', no_wrap=True)
        for row in rows:
            table.add_row(*(row[title] for title in columns))
        console = Console(width=1000, highlight=False, color_system=None)
        with console.capture() as captured:
            console.print(table)
        return [line.rstrip() for line in captured.get().splitlines() if line.strip()]


_TEXTS = ('convolution', 'basis', 'form', 'stays plain')
_MEASURED = ('multiply-adds', 'of.macs', 'ms', 'of.ms')
_COLUMNS = (
    *('convolution', 'kernel', 'groups', 'level', 'kept', 'parameters', 'of', 'energy kept', 'basis', 'form'),
    *_MEASURED,
    'stays plain',
)


def _cells(conv: Convolution) -> dict[str, str]:
    harmonic = conv.level is not None
    kept = '?' if conv.energy_kept is None else f'{conv.energy_kept:.2%}'
    cells = (
        conv.name,
        ' x '.join(map(str, conv.kernel_size)),
        str(conv.groups),
        str(conv.level) if harmonic else '',
        f'{conv.kept} / {conv.frequencies}' if harmonic else '',
        f'{conv.parameters:,}',
        f'{conv.parameters_before:,}' if harmonic else '',
        kept if harmonic else '',
        conv.basis or '',
        conv.form or '',
        *('' if macs is None else f'{macs:,}' for macs in (conv.macs, conv.macs_before)),
        *('' if ms is None else f'{ms:.3g}' for ms in (conv.ms, conv.ms_before)),
        conv.reason if conv.reason or harmonic else 'not asked for',
    )
    return dict(zip(_COLUMNS, cells, strict=True))


def _numel(parameter: Tensor) -> int:
    """Numbers in a parameter; none yet in one of a lazy layer."""
    return 0 if isinstance(parameter, nn.UninitializedParameter) else parameter.numel()


def harmonic_report(model: nn.Module, images: Tensor | None = None) -> HarmonicReport:
    """Lists all convolutions of a network, harmonic and plain: print it, or take `to_dict()` or `to_markdown()`.

    With images, an example batch (B, C, H, W), multiply-adds of the harmonic layers are counted. Milliseconds are there
    if layers were timed, as `truncate` with cost='time' and `deploy` do.
    """
    reasons, layers = reasons_to_skip(model), harmonic_layers(model)
    positions: dict[str, int] = {}
    if images is not None:
        uses = uses_of(model, images)
        positions = {name: sum(use.positions for use in of) // len(images) for name, of in uses.items()}
    found = []
    for name, module in model.named_modules():
        if name not in layers and name not in reasons:
            continue
        size = _numel(module.weight)
        about: dict[str, Any] = dict.fromkeys(('level', 'kept', 'frequencies', 'energy_kept', 'basis', 'form'))
        about |= dict.fromkeys(('macs', 'macs_before', 'ms', 'ms_before'))
        about |= dict(parameters_before=size, parameters=size, reason=reasons.get(name, ''))
        if name in layers:
            kept, frequencies = module.weight.shape[2], module.kernel_size[0] ** 2
            about |= dict(level=module.level, kept=kept, frequencies=frequencies, basis=module.named_basis())
            about |= dict(parameters_before=size // kept * frequencies, energy_kept=energy_kept(module))
            about |= dict(form=module.form)
            if name in positions:
                forms = ('dense', module.form)
                before, now = (multiply_adds(module, module.level, form, positions[name]) for form in forms)
                about |= dict(macs_before=before, macs=now)
            if module.milliseconds:
                about |= dict(ms_before=module.milliseconds['dense'], ms=module.milliseconds.get(module.form))
        found.append(Convolution(name, tuple(module.kernel_size), module.groups, **about))
    parameters = sum(map(_numel, model.parameters()))
    dropped = sum(conv.parameters_before - conv.parameters for conv in found)
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    name = get_model_args(model).get('base_model') or cfg.get('architecture') or type(model).__name__
    return HarmonicReport(name, tuple(found), parameters + dropped, parameters)


def draw_truncation(path: Path, whole: nn.Module, small: nn.Module) -> None:
    """Draws the levels of a truncated network, and the mean energy kept at other budgets."""
    report, losses, costs = harmonic_report(small), losses_by_filters(whole), parameter_costs(whole)

    def mean_kept(levels: dict[str, int]) -> float:
        return 1 - sum(losses[name][level] for name, level in levels.items()) / len(levels)

    levels = {name: layer.level for name, layer in harmonic_layers(small).items()}
    present, least = round(costs.present), round(costs.least)
    curve = {}
    for budget in {least + round((present - least) * i / 39) for i in range(40)}:
        chosen = choose_levels(losses, costs, budget)
        curve[round(costs.total(chosen))] = mean_kept(chosen)
    title = f'{report.model}: {report.parameters:,} of {report.parameters_before:,} parameters'
    times = {conv.name: (conv.ms_before, conv.ms) for conv in report.convolutions if conv.ms_before and conv.ms}
    draw(path, title, losses, levels, sorted(curve.items()), (report.parameters, mean_kept(levels)), times)
