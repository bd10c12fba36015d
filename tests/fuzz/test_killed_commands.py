"""kill -9 at any moment: the folder of a command exists as a whole or not at all, and the command can be run again."""

import multiprocessing
import shutil
import tempfile
import time
from pathlib import Path

import killable
import pytest
import safetensors.torch
import timm
import torch
from hypothesis import strategies as st

# Its processes come from one that has imported everything, and has no threads.
PROCESSES = multiprocessing.get_context('forkserver')
PROCESSES.set_forkserver_preload(['timm_harmonic.export.folder', 'timm_harmonic.small_data.tasks', 'timm_harmonic_cli'])
pytestmark = pytest.mark.slow
SMALL = dict(layers=(1, 1, 1, 1), channels=(4, 8, 8, 8))
BASE = 'base_model=resnet18'
OPTIONS = ['layers=(1, 1, 1, 1)', 'channels=(4, 8, 8, 8)']


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp('weights') / 'weights.pth'
    torch.save(timm.create_model('resnet18', **SMALL).state_dict(), path)
    return path


class Command:
    """A command, to run to its end or to kill."""

    def __init__(self, arguments):
        self.arguments = list(map(str, arguments))

    def start(self, stop_before=None):
        self.changes = PROCESSES.Value('i', 0)
        process = PROCESSES.Process(target=killable.command, args=(self.arguments, self.changes, stop_before))
        process.start()
        return process

    def whole(self):
        """Runs to its end. Returns its seconds and its changes."""
        begun = time.perf_counter()
        process = self.start()
        process.join(120)
        assert process.exitcode == 0
        return time.perf_counter() - begun, self.changes.value

    def killed(self, moment, seconds, changes):
        """Is killed after a share of its time, or of its changes. Returns its exit status."""
        by, share = moment
        process = self.start(int(share * changes) if by == 'changes' else None)
        process.join(share * seconds if by == 'seconds' else 120)
        process.kill()
        process.join()
        return process.exitcode


MOMENTS = st.tuples(st.sampled_from(['changes', 'changes', 'seconds']), st.floats(0, 1))


def network(folder):
    return safetensors.torch.load_file(folder / 'model.safetensors')


def weights_are_equal(folder, reference):
    first, second = network(folder), network(reference)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def images_are_equal(folder, reference):
    return all(
        path.is_dir() or path.read_bytes() == (folder / path.relative_to(reference)).read_bytes()
        for path in reference.rglob('*')
    )


@pytest.mark.parametrize('exists', [False, True], ids=['new', 'into an empty folder'])
@pytest.mark.parametrize(
    ('arguments', 'equal'),
    [
        (['convert', '{checkpoint}', '--model', 'harmonized', '--model-kwargs', BASE, *OPTIONS, '--out'],
         weights_are_equal),
        (['compress', 'resnet18', '--checkpoint', '{checkpoint}', '--level', '2', '--model-kwargs', *OPTIONS, '--out'],
         weights_are_equal),
        (['quickstart', '--train-per-class', '1', '--export'], images_are_equal),
    ],
    ids=['convert', 'compress', 'export'],
)  # fmt: skip
def test_a_folder(search, checkpoint, tmp_path_factory, arguments, equal, exists):
    arguments = [argument.format(checkpoint=checkpoint) for argument in arguments]
    reference = tmp_path_factory.mktemp('whole') / 'out'
    Command([*arguments, reference]).whole()  # everything is imported, and cached
    shutil.rmtree(reference)
    amounts = Command([*arguments, reference]).whole()
    names = sorted(path.relative_to(reference) for path in reference.rglob('*'))
    assert names

    def check(moment):
        with tempfile.TemporaryDirectory() as place:
            out = Path(place) / 'out'
            if exists:
                out.mkdir()
            command = Command([*arguments, out])
            assert command.killed(moment, *amounts) in (0, -9)
            if not out.exists() or not list(out.iterdir()):
                command.whole()
            assert sorted(path.relative_to(out) for path in out.rglob('*')) == names
            assert equal(out, reference)
            left = [path.name for path in Path(place).iterdir() if not path.name.startswith('.timm-harmonic-')]
            assert left == ['out']

    search(check, examples=3, moment=MOMENTS)
