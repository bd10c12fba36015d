"""The README's Python runs, its commands are the ones that work, and its table is the registry's."""

import json
import re
from pathlib import Path

import pytest
import timm
import torch
import yaml

import timm_harmonic
from benchmarks import compression
from timm_harmonic import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / 'README.md').read_text()


def test_python_blocks_run(capsys):
    """In order, in one namespace, as a reader would paste them."""
    torch.manual_seed(0)
    blocks = re.findall(r'^```python\n(.*?)^```', README, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 3
    namespace = {}
    for block in blocks:
        exec(compile(block, 'README.md', 'exec'), namespace)
    assert namespace['logits'].shape == (2, 10)
    x = torch.randn(2, 4, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(namespace['fused'](x), namespace['model'](x), rtol=1e-3, atol=1e-4)
    assert capsys.readouterr().out.split('\n')[0] == '19658792'


def rows():
    """Cells of the table of models."""
    section = README.partition('\n## Models\n')[2].partition('\n## ')[0]
    lines = [line for line in section.splitlines() if re.match(r'\| `\w+`', line)]
    return [[cell.strip() for cell in line.strip('|').split('|')] for line in lines]


def test_table_has_every_row_of_the_paper():
    assert len(rows()) == 12


@pytest.mark.parametrize('row', rows(), ids=lambda row: row[0])
def test_table_is_the_registry(row):
    name, weights = row[0].split('`')[1], row[6]
    parameters = sum(p.numel() for p in timm.create_model(name, device='meta').parameters())
    assert row[2] == f'{parameters / 1e6:.1f}M'
    if 'timm' not in row[0]:
        cfg = timm.get_pretrained_cfg(name)
        assert bool(cfg.url) is bool(weights)
        assert not weights or weights.strip('`') == f'.{cfg.tag}'
        if cfg.notes:
            assert row[4].split(' / ')[0] in cfg.notes[0]


def test_speed_is_the_saved_measurement():
    report = json.loads((ROOT / 'benchmarks' / 'results' / 'cpu.json').read_text())
    setting = dict(precision='fp32', channels_last=False, compiled=False)
    rows = [row for row in report['rows'] if setting.items() <= row.items()]
    found = {(row['model'], row['mode'], row['batch']): row['runs'] for row in rows}
    for name in {row['model'] for row in rows}:
        cells = [found[name, 'eval', batch][key] for batch in (1, 8) for key in ('fused', 'harmonic', 'original')]
        cells += [found[name, 'train', 8][key] for key in ('harmonic', 'original')]
        assert f'| `{name}` | ' + ' | '.join(f'{cell["ratio"]:.2f}' for cell in cells) + ' |' in README
    for mode in ('eval', 'train'):
        again = [row['runs']['plain again']['ratio'] for row in rows if row['mode'] == mode]
        assert f'{min(again):.2f} to {max(again):.2f}' in README


def test_cost_of_truncation_is_the_saved_measurement():
    report = json.loads((ROOT / 'benchmarks' / 'results' / 'compression.json').read_text())
    found = {(row['method'], row['level']): row for row in report['summary']}
    for method, title in compression.METHODS.items():
        rows = [found[method, level] for level in compression.LEVELS]
        cells = [compression.cell(row[w], row[f'{w}_deviation']) for row in rows for w in ('before', 'after')]
        assert f'| {title} | {" | ".join(cells)} |' in README
    whole = found['none', None]
    for when in ('before', 'after'):
        assert compression.cell(whole[when], whole[f'{when}_deviation']) in README
    for level in compression.LEVELS:
        assert f' {100 * found["level", level]["parameters"] / whole["parameters"]:.0f} %: as cut' in README
    assert f'over {report["options"]["seeds"]} seeds' in README


@pytest.mark.parametrize(('name', 'share'), [('resnet50', 61), ('regnety_008', 91)])
def test_networks_that_cannot_become_small(name, share):
    with torch.device('meta'):
        plain, low = timm.create_model(name), timm.create_model('harmonized', base_model=name, level=1)
    left = sum(p.numel() for p in low.parameters()) / sum(p.numel() for p in plain.parameters())
    assert round(100 * left) == share
    assert f'{share} %' in README


def test_cost_of_autoloading_is_the_saved_measurement():
    report = json.loads((ROOT / 'benchmarks' / 'results' / 'imports.json').read_text())
    assert f'takes {report["imports"]["entry_point_ms"]["median"]:.2f} ms' in README.replace('\n', ' ')


def test_commands_that_are_named_exist():
    """Every `timm-harmonic COMMAND ... --option` of the README, to the parser."""
    shown = ' '.join(README.replace('\\\n', ' ').split('\n'))
    for command in ('list', 'compress', 'convert', 'publish', 'quickstart'):
        assert f'timm-harmonic {command}' in shown
    parser = cli._parser()
    for line in README.splitlines():
        if line.startswith('timm-harmonic '):
            assert parser.parse_args(line.split()[1:]).run


def test_models_that_are_named_exist():
    for name in re.findall(r'`(harm\d?_\w+)`', README):
        assert timm.is_model(name), name


def test_citation_file():
    citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text())
    assert citation['preferred-citation']['doi'] in README
    assert citation['version'] == timm_harmonic.__version__


def test_placeholders_are_gone():
    assert not re.findall(r'\b[A-Z]+_RESULTS\b', README)
