"""docs/tutorial.ipynb runs, and is stored without outputs."""

import json
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

TUTORIAL = Path(__file__).resolve().parents[2] / 'docs' / 'tutorial.ipynb'


@pytest.fixture
def notebook():
    return nbformat.read(TUTORIAL, as_version=4)


def test_it_is_stored_without_outputs(notebook):
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == 'code':
            assert cell.outputs == []
            assert cell.execution_count is None


@pytest.mark.slow
def test_it_runs(notebook, tmp_path, monkeypatch):
    """With the interpreter of the tests, whatever kernels the user has, in an empty folder."""
    spec = dict(argv=[sys.executable, '-m', 'ipykernel_launcher', '-f', '{connection_file}'])
    spec |= dict(display_name='Python', language='python')
    kernel, work = tmp_path / 'kernels' / 'of-the-tests', tmp_path / 'work'
    for folder in (kernel, work):
        folder.mkdir(parents=True)
    (kernel / 'kernel.json').write_text(json.dumps(spec))
    monkeypatch.setenv('JUPYTER_PATH', str(tmp_path))
    resources = dict(metadata=dict(path=str(work)))
    NotebookClient(notebook, kernel_name=kernel.name, timeout=300, resources=resources).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == 'code']
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    printed = ''.join(output.get('text', '') for cell in code for output in cell.outputs)
    assert 'onnxruntime gives the same outputs' in printed
    assert any('image/png' in output.get('data', {}) for cell in code for output in cell.outputs)
    accuracies = [line.split()[2] for line in printed.splitlines() if line.startswith('epoch ')]
    assert float(accuracies[-1]) > 25  # chance is 5.9
