"""timm-harmonic list: every registered model and its weights."""

import timm

import timm_harmonic_cli as cli


def test_list(capsys, monkeypatch):
    monkeypatch.setenv('COLUMNS', '80')
    assert cli.main(['list']) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split() for line in lines if line.startswith('harm') and ' M ' in line}
    assert set(rows) == set(timm.list_models('harm*', exclude_filters='harmonized'))
    assert rows['harm_resnet50_progressive'][1:] == ['19.7', 'M']
    assert rows['harm_resnet50'][1:] == ['25.6', 'M', 'ulicny_in1k']
    assert max(len(line.rstrip()) for line in lines if ' M ' in line) <= 80
    assert any('releases/download/0.1.0/harm_resnet50-eec30392.pth' in line for line in lines)
