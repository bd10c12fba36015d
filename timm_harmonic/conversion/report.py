"""What is harmonic in a network, what is not, and what it costs."""

import dataclasses
from typing import Any

from timm.models import get_model_args
from torch import nn

from .convolutions import harmonic_layers, reasons_to_skip
from .energy import energy_kept


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
        for title in _COLUMNS:
            table.add_column(
                title, justify='left' if title in ('convolution', 'basis', 'stays plain') else 'right', no_wrap=True
            )
        for conv in self.convolutions:
            table.add_row(*_cells(conv))
        console = Console(width=1000, highlight=False, color_system=None)
        with console.capture() as captured:
            console.print(table)
        return [line.rstrip() for line in captured.get().splitlines() if line.strip()]


_COLUMNS = (
    'convolution',
    'kernel',
    'groups',
    'level',
    'kept',
    'parameters',
    'of',
    'energy kept',
    'basis',
    'stays plain',
)


def _cells(conv: Convolution) -> list[str]:
    harmonic = conv.level is not None
    return [
        conv.name,
        ' x '.join(map(str, conv.kernel_size)),
        str(conv.groups),
        str(conv.level) if harmonic else '',
        f'{conv.kept} / {conv.frequencies}' if harmonic else '',
        f'{conv.parameters:,}',
        f'{conv.parameters_before:,}' if harmonic else '',
        ('?' if conv.energy_kept is None else f'{conv.energy_kept:.2%}') if harmonic else '',
        conv.basis or '',
        conv.reason if conv.reason or harmonic else 'not asked for',
    ]


def harmonic_report(model: nn.Module) -> HarmonicReport:
    """Lists all convolutions of a network, harmonic and plain: print it, or take `to_dict()` or `to_markdown()`."""
    reasons, layers = reasons_to_skip(model), harmonic_layers(model)
    found = []
    for name, module in model.named_modules():
        if name not in layers and name not in reasons:
            continue
        size = module.weight.numel()
        about: dict[str, Any] = dict.fromkeys(('level', 'kept', 'frequencies', 'energy_kept', 'basis'))
        about |= dict(parameters_before=size, parameters=size, reason=reasons.get(name, ''))
        if name in layers:
            kept, frequencies = module.weight.shape[2], module.kernel_size[0] ** 2
            about |= dict(level=module.level, kept=kept, frequencies=frequencies, basis=module.named_basis())
            about |= dict(parameters_before=size // kept * frequencies, energy_kept=energy_kept(module))
        found.append(Convolution(name, tuple(module.kernel_size), module.groups, **about))
    parameters = sum(p.numel() for p in model.parameters())
    dropped = sum(conv.parameters_before - conv.parameters for conv in found)
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    name = get_model_args(model).get('base_model') or cfg.get('architecture') or type(model).__name__
    return HarmonicReport(name, tuple(found), parameters + dropped, parameters)
