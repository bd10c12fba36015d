"""kill -9 at any moment: what a command was to make is there as a whole or not at all, and it can be run again."""

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
PROCESSES.set_forkserver_preload(['timm_harmonic_cli.compress', 'timm_harmonic.export.publish', 'timm_harmonic_cli'])
SMALL = dict(layers=(1, 1, 1, 1), channels=(4, 8, 8, 8))
BASE = 'base_model=resnet18'
OPTIONS = ['layers=(1, 1, 1, 1)', 'channels=(4, 8, 8, 8)']
TOKEN = 'hf_' + 'S3cret' * 6


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp('weights') / 'weights.pth'
    torch.save(timm.create_model('resnet18', **SMALL).state_dict(), path)
    return path


class Command:
    """A command that is run whole, and killed."""

    def __init__(self, arguments, **variables):
        self.arguments, self.variables = list(map(str, arguments)), variables

    def start(self, stop_before=None):
        self.changes = PROCESSES.Value('i', 0)
        arguments = (self.arguments, self.variables, self.changes, stop_before)
        process = PROCESSES.Process(target=killable.command, args=arguments)
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
        """Is killed after that share of its time, or of its changes. Returns its exit status."""
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
    ('arguments', 'equal', 'last'),
    [
        (['convert', '{checkpoint}', '--model', 'harmonized', '--model-kwargs', BASE, *OPTIONS, '--out'],
         weights_are_equal, 'config.json'),
        (['compress', 'resnet18', '--checkpoint', '{checkpoint}', '--level', '2', '--model-kwargs', *OPTIONS, '--out'],
         weights_are_equal, 'config.json'),
        (['quickstart', '--train-per-class', '1', '--export'], images_are_equal, 'train'),
    ],
    ids=['convert', 'compress', 'export'],
)  # fmt: skip
def test_a_folder(search, checkpoint, tmp_path_factory, arguments, equal, last, exists):
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
            code = command.killed(moment, *amounts)
            assert code in (0, -9)
            seen = sorted(path.relative_to(out) for path in out.rglob('*')) if out.exists() else []
            shown = [name for name in seen if not name.parts[0].startswith('.')]
            complete = out.exists() and (not exists or (out / last).exists())
            if shown and complete:
                assert shown == names
                assert equal(out, reference)
            elif not exists:
                assert not out.exists()
            if not shown:
                command.whole()
                assert sorted(path.relative_to(out) for path in out.rglob('*')) == names
                assert equal(out, reference)
                assert [path.name for path in Path(place).iterdir()] == ['out']

    search(check, examples=3, moment=MOMENTS)


def test_publishing(search, hub, checkpoint, tmp_path):
    """In the repository there is all or nothing, and what was begun is finished by the same command."""
    repo_id = 'org/net'
    folder = tmp_path / 'folder'
    arguments = ['convert', checkpoint, '--model', 'harmonized', '--model-kwargs', BASE, *OPTIONS]
    Command([*arguments, '--repo', repo_id, '--out', folder]).whole()
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    command = Command(['publish', folder, '--repo', repo_id], HF_TOKEN=TOKEN)
    command.whole()
    hub.reset()
    amounts = command.whole()

    def check(moment):
        hub.reset()
        command.killed(moment, *amounts)
        repository = hub.repositories.get(repo_id)
        if repository is not None and len(repository.branches['main']) > 1:
            assert {name: repository.branches['main'].get(name) for name in files} == files
        command.whole()
        held = hub.repositories[repo_id].branches['main']
        assert {name: held.get(name) for name in files} == files

    search(check, examples=3, moment=MOMENTS)
