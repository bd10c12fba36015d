"""What is harmonic in a network, what is not, and what it costs."""

import dataclasses
from typing import Any

from torch import nn

from .swap import harmonic_layers, why_not

__all__ = ['Convolution', 'HarmonicReport', 'harmonic_report']


@dataclasses.dataclass(frozen=True)
class Convolution:
    """One convolution of a network, plain or harmonic.

    Attributes:
        name: Qualified name.
        kernel_size: Sides of the filters.
        groups: Number of groups.
        level: The paper's lambda of a harmonic layer, 2k - 1 for all frequencies; None if it is plain.
        kept: Frequencies kept; None if it is plain.
        frequencies: Frequencies that there are; None if it is plain.
        parameters_before: Weights of the plain convolution, without bias.
        parameters: Weights or coefficients, without bias.
        energy_kept: Share of the filters' energy that truncation left; None if it is plain, or unknown because the
            coefficients were loaded or initialised at their level.
        reason: Why it was left alone; empty for a harmonic layer, and for a plain one that could be harmonic.
    """

    name: str
    kernel_size: tuple[int, ...]
    groups: int
    level: int | None
    kept: int | None
    frequencies: int | None
    parameters_before: int
    parameters: int
    energy_kept: float | None
    reason: str


@dataclasses.dataclass(frozen=True)
class HarmonicReport:
    """All convolutions of a network. Prints as a table.

    Attributes:
        model: Name of the architecture, or of the class.
        convolutions: In the network's order.
        parameters_before: Of the network, with all frequencies.
        parameters: Of the network.
    """

    model: str
    convolutions: tuple[Convolution, ...]
    parameters_before: int
    parameters: int

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, for JSON."""
        return dataclasses.asdict(self)

    def to_markdown(self) -> str:
        """The report as a Markdown table."""
        rows = [_COLUMNS, ['---'] * len(_COLUMNS), *map(_cells, self.convolutions)]
        lines = [f'| {" | ".join(row)} |' for row in rows]
        return '\n'.join([self._summary(), '', *lines, ''])

    def _summary(self) -> str:
        harmonic = sum(conv.level is not None for conv in self.convolutions)
        return (
            f'{self.model}: {harmonic} of {len(self.convolutions)} convolutions are harmonic, {self.parameters:,} of '
            f'{self.parameters_before:,} parameters ({self.parameters / max(1, self.parameters_before):.1%}).'
        )

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), caption_justify='left')
        for title in _COLUMNS:
            table.add_column(title, justify='left' if title in ('convolution', 'left alone') else 'right', no_wrap=True)
        for conv in self.convolutions:
            table.add_row(*_cells(conv))
        console = Console(width=200, highlight=False, color_system=None)
        with console.capture() as captured:
            console.print(table)
        return '\n'.join([*(line.rstrip() for line in captured.get().splitlines()), self._summary()])


_COLUMNS = ['convolution', 'kernel', 'groups', 'level', 'kept', 'parameters', 'of', 'energy kept', 'left alone']


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
        conv.reason if conv.reason or harmonic else 'not asked for',
    ]


def harmonic_report(model: nn.Module) -> HarmonicReport:
    """Lists all convolutions of a network, harmonic and plain.

    Args:
        model: Network, harmonic or not.

    Returns:
        The report: print it, or take `to_dict()` or `to_markdown()`.
    """
    reasons, layers = why_not(model), harmonic_layers(model)
    found = []
    for name, module in model.named_modules():
        if name in layers:
            kept, side = module.weight.shape[2], module.kernel_size[0]
            before = module.weight.numel() // kept * side * side
            level = module.level or module.full_level
            numbers = (level, kept, side * side, before, module.weight.numel(), module.energy_kept)
        elif name in reasons:
            size = module.weight.numel()
            numbers = (None, None, None, size, size, None)
        else:
            continue
        found.append(Convolution(name, tuple(module.kernel_size), module.groups, *numbers, reasons.get(name, '')))
    parameters = sum(p.numel() for p in model.parameters())
    dropped = sum(conv.parameters_before - conv.parameters for conv in found)
    return HarmonicReport(_name(model), tuple(found), parameters + dropped, parameters)


def _name(model: nn.Module) -> str:
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    base = getattr(model, '_model_args', {}).get('base_model')
    return base or cfg.get('architecture') or type(model).__name__
