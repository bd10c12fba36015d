"""Training in several processes, and resuming after one was killed.

Two processes on the CPU, with gloo, against what one process computes on the same images. timm's train.py is in no
package: for the last test the environment variable TIMM_SCRIPTS names a checkout of pytorch-image-models.
"""

import csv
import functools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import distributed_worker as worker
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason='torch was built without distributed'),
    pytest.mark.usefixtures('one_thread'),  # as the processes have it
]

CONFIG = Path(__file__).resolve().parents[2] / 'train_configs' / 'harm_resnet50.yaml'
TIMEOUT = 120  # seconds, for processes that need a few
EXACT = dict(rtol=1e-10, atol=1e-10)  # float64, sums in another order


@contextmanager
def processes(folder: Path, commands: list[tuple], envs: list[dict]) -> Iterator[list[subprocess.Popen]]:
    """Processes side by side, each with its `<number>.log`. Those that still run at the end are killed."""
    common = dict(os.environ, OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
    # Without it gloo looks up the machine's own name.
    loopback = [name for _, name in socket.if_nameindex() if name.startswith('lo')]
    if loopback:
        common['GLOO_SOCKET_IFNAME'] = loopback[0]
    for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT', 'MEETING_POINT'):
        common.pop(name, None)
    started = []
    try:
        for number, (command, env) in enumerate(zip(commands, envs, strict=True)):
            with (folder / f'{number}.log').open('w') as log:
                command = [str(part) for part in command]
                env = dict(common, **env)
                started.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=folder, env=env))
        yield started
    finally:
        for process in started:
            process.terminate()  # lets torchrun end its workers
        for process in started:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def logs(folder: Path) -> str:
    """The end of what each process wrote, for messages."""
    return '\n'.join(f'--- {path.name}\n{path.read_text()[-4000:]}' for path in sorted(folder.glob('*.log')))


def wait(folder: Path, started: list[subprocess.Popen]) -> None:
    """Waits for processes that must all succeed, until the first one fails: the others may be waiting for it."""
    deadline = time.monotonic() + TIMEOUT
    while True:
        codes = [process.poll() for process in started]
        assert not any(codes), f'exit codes {codes} (None: still running)\n{logs(folder)}'
        if None not in codes:
            return
        assert time.monotonic() < deadline, f'exit codes {codes} (None: still running) in {TIMEOUT} s\n{logs(folder)}'
        time.sleep(0.05)


def run(folder: Path, commands: list[tuple], envs: list[dict]) -> None:
    with processes(folder, commands, envs) as started:
        wait(folder, started)


def found(folder: Path) -> list[dict]:
    """What the processes saved, in the order of their ranks."""
    return [torch.load(folder / f'{rank}.pt', weights_only=True) for rank in range(worker.PROCESSES)]


def side_by_side(scenario: str, folder: Path) -> list[dict]:
    """A scenario in two processes, with warnings as errors. They find each other by a file, which needs no port."""
    # Newer torch has another name for the option. Older torch and timm do not know it.
    warnings = ('-W', 'error', '-W', 'ignore:`broadcast_buffers` is deprecated')
    command = (sys.executable, '-X', 'faulthandler', *warnings, worker.__file__, scenario, folder)
    env = dict(WORLD_SIZE=str(worker.PROCESSES), MEETING_POINT=f'file://{folder}/meeting_point')
    run(folder, [command] * worker.PROCESSES, [dict(env, RANK=str(rank)) for rank in range(worker.PROCESSES)])
    return found(folder)


@functools.cache
def averaged(buffers: str) -> list[dict]:
    """What two processes that only average gradients compute: two copies of the network, one after the other.

    Args:
        buffers: 'own', or 'first' for the first copy's before every step, as DistributedDataParallel does by default.
    """
    models = [worker.build() for _ in range(worker.PROCESSES)]
    optimizers = [worker.optimizer(model) for model in models]
    results = [dict(losses=[], gradients=[]) for _ in models]
    for batch in worker.batches():
        if buffers == 'first':
            for mine, first in zip(models[1].buffers(), models[0].buffers(), strict=True):
                mine.copy_(first)
        for rank, (model, result) in enumerate(zip(models, results, strict=True)):
            model.zero_grad()
            images, targets = worker.share(batch, rank)
            loss = F.cross_entropy(model(images), targets)
            loss.backward()
            result['losses'].append(loss.detach())
        for parameters in zip(*(model.parameters() for model in models), strict=True):
            mean = sum(parameter.grad for parameter in parameters) / len(parameters)
            for parameter in parameters:
                parameter.grad = mean.clone()
        for model, sgd, result in zip(models, optimizers, results, strict=True):
            sgd.step()
            result['gradients'].append({key: parameter.grad.clone() for key, parameter in model.named_parameters()})
    return [dict(result, state=model.state_dict()) for model, result in zip(models, results, strict=True)]


@pytest.fixture(scope='module')
def joined():
    """One process on the joined batches, with the network as it is."""
    model = worker.build()
    explicit = worker.count_explicit(model.conv1)
    losses = worker.train(model, worker.batches())
    assert not explicit
    gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
    return dict(state=model.state_dict(), gradients=gradients, losses=losses)


@pytest.fixture(scope='module')
def synchronised(tmp_path_factory):
    return side_by_side('synchronised', tmp_path_factory.mktemp('synchronised'))


def parameters_of(state: dict) -> dict:
    return {key: value for key, value in state.items() if 'running_' not in key and 'num_batches' not in key}


def statistics_of(state: dict) -> dict:
    return {key: value for key, value in state.items() if 'running_' in key}


def largest_difference(one: dict, other: dict) -> float:
    assert one.keys() == other.keys()
    return max((one[key] - other[key]).abs().max().item() for key in one)


@pytest.mark.parametrize('convert', worker.CONVERSIONS.values(), ids=worker.CONVERSIONS)
def test_synchronisation_finds_every_batch_norm(convert):
    """Also the stem's, which has no scale and shift. Statistics and parameters stay the same tensors."""
    model = worker.build()
    before = {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    state = model.state_dict(keep_vars=True)
    converted = convert(model)
    assert converted is model
    after = {name: module for name, module in model.named_modules() if isinstance(module, nn.SyncBatchNorm)}
    assert 'conv1.bn' in before
    assert after.keys() == before.keys()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    for name, module in after.items():
        for option in ('num_features', 'eps', 'momentum', 'affine', 'track_running_stats', 'training'):
            assert getattr(module, option) == getattr(before[name], option)
    assert not after['conv1.bn'].affine
    now = model.state_dict(keep_vars=True)
    assert now.keys() == state.keys()
    assert all(now[key] is state[key] for key in state)


@pytest.mark.parametrize('conversion', worker.CONVERSIONS)
def test_two_processes_are_one_on_the_joined_batch(synchronised, joined, conversion):
    """DistributedDataParallel with synchronised batch-norms: parameters, gradients and running statistics."""
    results = [process[conversion] for process in synchronised]
    for result in results:
        assert result['explicit'] == worker.STEPS
        assert all(gradient is not None and gradient.any() for gradient in result['gradients'].values())
        torch.testing.assert_close(result['gradients'], joined['gradients'], **EXACT)
        torch.testing.assert_close(result['state'], joined['state'], **EXACT)
        assert result['state']['conv1.bn.num_batches_tracked'] == worker.STEPS
    mean = sum(torch.stack(result['losses']) for result in results) / len(results)
    torch.testing.assert_close(mean, torch.stack(joined['losses']), **EXACT)
    torch.testing.assert_close(results[0]['state'], results[1]['state'], rtol=0, atol=0)


def test_unsynchronised_training_is_told_apart(joined):
    """Three steps move every parameter, and unsynchronised batch-norms end elsewhere: the comparison can fail."""
    start = worker.build().state_dict()
    for key, value in joined['state'].items():
        if key.endswith('basis_name'):
            continue
        assert (value - start[key]).abs().max() > 1e-4
    for result in averaged('own'):
        assert largest_difference(parameters_of(result['state']), parameters_of(joined['state'])) > 1e-3
        stem = {key: value for key, value in statistics_of(result['state']).items() if key.startswith('conv1.bn.')}
        assert len(stem) == 2
        assert largest_difference(stem, {key: joined['state'][key] for key in stem}) > 1e-3


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        return listener.getsockname()[1]


def test_two_nodes_are_two_processes(synchronised, tmp_path):
    """Two torchrun agents on the loopback, each as one of two machines."""
    meeting_point = ('--master_addr', '127.0.0.1', '--master_port', free_port())
    agent = (sys.executable, '-m', 'torch.distributed.run', '--nnodes', 2, '--nproc-per-node', 1)
    commands = [
        (*agent, '--node_rank', node, *meeting_point, worker.__file__, 'synchronised', tmp_path) for node in range(2)
    ]
    run(tmp_path, commands, [{}] * 2)
    for rank, (node, process) in enumerate(zip(found(tmp_path), synchronised, strict=True)):
        place = dict(WORLD_SIZE='2', GROUP_RANK=str(rank), LOCAL_RANK='0', LOCAL_WORLD_SIZE='1')
        assert {key: node[key] for key in place} == place
        for conversion in worker.CONVERSIONS:
            torch.testing.assert_close(node[conversion]['state'], process[conversion]['state'], rtol=0, atol=1e-12)


def test_statistics_of_one_process_each(tmp_path):
    """`--dist-bn reduce`: on all processes the mean of their own running statistics, the stem's included."""
    results = side_by_side('statistics', tmp_path)
    for buffers, name in ((False, 'own'), (True, 'first')):
        first, second = (process[buffers] for process in results)
        expected = averaged(name)
        for rank, process in enumerate((first, second)):
            assert process['explicit'] == 0  # the stem is dense
            torch.testing.assert_close(process['own'], expected[rank]['state'], **EXACT)
        own = [statistics_of(process['own']) for process in (first, second)]
        for key in ('conv1.bn.running_mean', 'conv1.bn.running_var', 'layer4.0.bn1.running_mean'):
            assert (own[0][key] - own[1][key]).abs().max() > 1e-3
        for key in own[0]:
            mean = (own[0][key] + own[1][key]) / 2
            for process in (first, second):
                torch.testing.assert_close(process['reduce'][key], mean, rtol=1e-14, atol=0)
                torch.testing.assert_close(process['broadcast'][key], own[0][key], rtol=0, atol=0)
        # Parameters are the same ones everywhere and remain so.
        for process in (first, second):
            for how in ('own', 'reduce', 'broadcast'):
                torch.testing.assert_close(parameters_of(process[how]), parameters_of(first['own']), rtol=0, atol=0)


@pytest.fixture(scope='module')
def sharded(tmp_path_factory):
    return side_by_side('sharded', tmp_path_factory.mktemp('sharded'))


@pytest.mark.parametrize('start', ['in memory', 'on meta'])
def test_sharded_network(sharded, start):
    """FSDP2: outputs, whole gradients, parameters and the saved state are those of networks that are not sharded."""
    expected = averaged('own')
    whole = dict(worker.build().named_parameters())
    for rank, (process, wanted) in enumerate(zip(sharded, expected, strict=True)):
        result = process[start]
        assert result['explicit'] == 0
        # Half of the stem's filters. Of the five classes, three and two.
        assert result['shards']['conv1.weight'] == (whole['conv1.weight'].shape[0] // 2, 3, 49, 1)
        assert result['shards']['fc.weight'] == ((3, 2)[rank], 64)
        torch.testing.assert_close(result['losses'], wanted['losses'], **EXACT)
        for step in range(worker.STEPS):
            torch.testing.assert_close(result['gradients'][step], wanted['gradients'][step], **EXACT)
        torch.testing.assert_close(result['state'], wanted['state'], **EXACT)
        model = worker.build()
        model.load_state_dict(wanted['state'])
        with torch.no_grad():
            torch.testing.assert_close(result['outputs'], model.eval()(worker.batches()[0][0]), **EXACT)
    saved = sharded[0][start]['saved']
    torch.testing.assert_close(saved, expected[0]['state'], **EXACT)
    assert not any(key.endswith('.basis') for key in saved)
    timm.create_model('harm_resnet18', **worker.ARGS).load_state_dict(saved)


def test_a_saved_state_is_all_that_training_needs(joined, tmp_path):
    """Stopped after a step, and resumed from a file by a new network: the same to the last bit as without a stop."""
    model, data = worker.build(), worker.batches()
    sgd = worker.optimizer(model)
    worker.train(model, data[:1], sgd)
    torch.save(dict(model=model.state_dict(), optimizer=sgd.state_dict()), tmp_path / 'saved.pt')
    saved = torch.load(tmp_path / 'saved.pt', weights_only=True)
    model = timm.create_model('harm_resnet18', **worker.ARGS).train()
    model.load_state_dict(saved['model'])
    sgd = worker.optimizer(model)
    sgd.load_state_dict(saved['optimizer'])
    worker.train(model, data[1:], sgd)
    torch.testing.assert_close(model.state_dict(), joined['state'], rtol=0, atol=0)


class Training:
    """timm's train.py, the image folder that the quickstart exports, and one folder for each run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.script = folder / 'scripts' / 'train.py'
        self.script.parent.mkdir()
        # Beside a checkout's scripts Python would find its timm instead of the installed one.
        shutil.copy(Path(os.environ['TIMM_SCRIPTS']) / 'train.py', self.script)
        self.images = folder / 'images'
        (folder / 'export').mkdir()
        run(folder / 'export', [(sys.executable, '-m', 'timm_harmonic', 'quickstart', '--export', self.images)], [{}])
        classes = sorted((self.images / 'validation').iterdir())
        self.num_classes = len(classes)
        for patch in (patch for images in classes for patch in sorted(images.iterdir())[2:]):
            patch.unlink()

    def command(self, name: str, epochs: int, *options: object) -> tuple:
        """A run whose learning rate and momentum at the second epoch are not those of a fresh start."""
        return (
            *(sys.executable, self.script, '-c', CONFIG, '--model', 'harm_resnet18', '--epochs', epochs),
            *('--model-kwargs', 'layers=(1,1,1,1)', '--num-classes', self.num_classes, '--img-size', 64),
            *('--lr', 0.02, '--decay-epochs', 1, '--decay-rate', 0.5, '--batch-size', 8, '--workers', 0),
            *('--device', 'cpu', '--log-interval', 1, '--data-dir', self.images),
            *('--output', self.folder, '--experiment', name, *options),
        )

    def checkpoint(self, name: str) -> dict:
        return torch.load(self.folder / name / 'last.pth.tar', map_location='cpu', weights_only=False)

    def log_folder(self, name: str) -> Path:
        folder = self.folder / f'logs_{name}'
        folder.mkdir()
        return folder


def check_same_bits(one: dict, other: dict, epoch: int) -> None:
    """That two checkpoints of timm's hold the same weights, statistics, momenta and rates."""
    assert (one['epoch'], other['epoch']) == (epoch, epoch)
    assert len(one['optimizer']['state']) > 20
    for part in ('state_dict', 'optimizer'):
        torch.testing.assert_close(one[part], other[part], rtol=0, atol=0)


def measured(folder: Path) -> list[dict]:
    """The rows of summary.csv, without what depends on the clock."""
    with (folder / 'summary.csv').open() as file:
        return [{key: value for key, value in row.items() if 'time' not in key} for row in csv.DictReader(file)]


@pytest.mark.skipif(
    not os.environ.get('TIMM_SCRIPTS'),
    reason='TIMM_SCRIPTS names no checkout of pytorch-image-models; its train.py is in no package',
)
def test_killed_in_the_second_epoch_and_resumed(tmp_path):
    """Resuming gives the same bits, whether the run was killed in the second epoch or had ended after the first."""
    training = Training(tmp_path)
    logs_1 = training.log_folder('first')
    commands = [training.command('killed', 3), training.command('regular', 1)]
    with processes(logs_1, commands, [{}] * 2) as (killed, regular):
        deadline = time.monotonic() + TIMEOUT
        while 'Train: 1 [   3/' not in (logs_1 / '0.log').read_text():
            assert killed.poll() is None, f'ended before it was killed\n{logs(logs_1)}'
            assert time.monotonic() < deadline, f'no second epoch in {TIMEOUT} s\n{logs(logs_1)}'
            time.sleep(0.02)
        killed.kill()
        assert killed.wait(10) == -signal.SIGKILL, f'ended before it was killed\n{logs(logs_1)}'
        log = (logs_1 / '0.log').read_text()
        last, steps = re.findall(r'Train: 1 \[ *(\d+)/(\d+) ', log)[-1]
        assert 3 <= int(last) < int(steps) - 1, 'killed when the epoch was over'
        wait(logs_1, [regular])
    before = training.checkpoint('killed')
    check_same_bits(before, training.checkpoint('regular'), epoch=0)
    assert measured(tmp_path / 'killed') == measured(tmp_path / 'regular')

    logs_2 = training.log_folder('second')
    names = ('killed', 'regular')
    resumed = [training.command(name, 3, '--resume', tmp_path / name / 'last.pth.tar') for name in names]
    run(logs_2, resumed, [{}] * 2)
    for number in range(2):
        assert re.search(r'Train: (\d+) \[ *(\d+)/', (logs_2 / f'{number}.log').read_text()).groups() == ('1', '0')
    after = training.checkpoint('killed')
    check_same_bits(after, training.checkpoint('regular'), epoch=2)
    assert measured(tmp_path / 'killed') == measured(tmp_path / 'regular')
    # Training went on from there: other weights, and the rate of the third epoch.
    assert largest_difference(before['state_dict'], after['state_dict']) > 1e-3
    assert [group['lr'] for group in after['optimizer']['param_groups']] == [pytest.approx(0.02 / 4)]
    model = timm.create_model('harm_resnet18', layers=(1, 1, 1, 1), num_classes=training.num_classes)
    model.load_state_dict(after['state_dict'])
