"""timm-harmonic list: every registered model and its weights."""

import json

import timm

import timm_harmonic_cli as cli


def test_list(capsys, monkeypatch):
    monkeypatch.setenv('COLUMNS', '80')
    assert cli.main(['list']) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split() for line in lines if line.startswith('harm') and ' M ' in line}
    assert set(rows) == set(timm.list_models('harm*', exclude_filters='harmonized'))
    assert rows['harm_resnet50_progressive'][1:] == ['19.7', 'M', '7x7/2', 'avg', 'all', 'all', '3', '2']
    assert rows['harm_resnet50'][1:] == ['25.6', 'M', '7x7/4', 'all', 'ulicny_in1k']
    assert max(len(line.rstrip()) for line in lines if ' M ' in line) <= 80
    assert any('releases/download/0.1.0/harm_resnet50-eec30392.pth' in line for line in lines)


def test_list_as_json(capsys):
    assert cli.main(['list', '--json']) == 0
    entries = {entry['model']: entry for entry in json.loads(capsys.readouterr().out)}
    assert entries['harm_resnet50_progressive']['parameters'] == 19658792
    assert entries['harm_resnet50_progressive']['levels'] == [None, None, 3, 2]
    assert entries['harm0_resnet50'] == dict(
        model='harm0_resnet50', parameters=25557032, stem='7x7/4 plain', levels=[], weights=[]
    )
    (weights,) = entries['harm_resnet101']['weights']
    assert weights['url'].endswith('harm_resnet101-62e185b1.pth')
