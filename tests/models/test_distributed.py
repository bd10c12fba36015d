"""Training in two processes on the CPU, with gloo, against what one process computes on the same images."""

import functools
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import distributed_worker as worker
import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason='torch was built without distributed'),
    pytest.mark.usefixtures('one_thread'),  # as the processes have it
]

TIMEOUT = 120  # seconds, for processes that need a few
EXACT = dict(rtol=1e-10, atol=1e-10)  # float64, sums in another order


def side_by_side(scenario: str, folder: Path) -> list[dict]:
    """What two processes find in a scenario, with warnings as errors. They meet by a file, which needs no port."""
    # Newer torch has another name for the option, which older torch and timm do not know. It also warns of itself.
    own = ('`broadcast_buffers` is deprecated', '`_get_pg_default_device` will be', 'Multiple backends are registered')
    warnings = ('-W', 'error', *(option for text in own for option in ('-W', f'ignore:{text}')))
    command = [sys.executable, '-X', 'faulthandler', *warnings, worker.__file__, scenario, str(folder)]
    env = {name: value for name, value in os.environ.items() if not name.startswith('MASTER_')}
    env |= dict(OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='', MEETING_POINT=f'file://{folder}/meeting_point')
    # Without it gloo looks up the machine's own name.
    loopback = [name for _, name in socket.if_nameindex() if name.startswith('lo')]
    env |= dict(GLOO_SOCKET_IFNAME=loopback[0]) if loopback else {}
    env |= dict(WORLD_SIZE=str(worker.PROCESSES))
    started, logs = [], [folder / f'{rank}.log' for rank in range(worker.PROCESSES)]
    try:
        for rank, path in enumerate(logs):
            with path.open('w') as log:
                started.append(
                    subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, env=dict(env, RANK=str(rank)))
                )
        deadline = time.monotonic() + TIMEOUT
        # Until the first one fails: the other may be waiting for it.
        while None in (codes := [process.poll() for process in started]) and not any(codes):
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert codes == [0] * len(codes), f'{codes}\n' + '\n'.join(path.read_text()[-4000:] for path in logs)
    return [torch.load(folder / f'{rank}.pt', weights_only=True) for rank in range(worker.PROCESSES)]


@functools.cache
def averaged() -> list[dict]:
    """What two processes that only average gradients compute: two copies of the network, one after the other."""
    models = [worker.build() for _ in range(worker.PROCESSES)]
    optimizers = [worker.optimizer(model) for model in models]
    results = [dict(losses=[], gradients=[]) for _ in models]
    for batch in worker.batches():
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


@pytest.mark.parametrize('convert', worker.CONVERSIONS.values(), ids=worker.CONVERSIONS)
def test_synchronisation_finds_every_batch_norm(convert):
    """Also the stem's, which has no scale and shift. Statistics and parameters stay the same tensors."""
    model = worker.build()
    before = {name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    state = model.state_dict(keep_vars=True)
    assert convert(model) is model
    after = {name for name, module in model.named_modules() if isinstance(module, nn.SyncBatchNorm)}
    assert 'conv1.bn' in before
    assert after == before
    assert not model.conv1.bn.affine
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


def test_statistics_of_one_process_each(tmp_path):
    """`--dist-bn reduce`: on all processes the mean of their own running statistics, the stem's included."""
    processes = side_by_side('statistics', tmp_path)
    for process, expected in zip(processes, averaged(), strict=True):
        assert process['explicit'] == 0  # the stem is dense
        torch.testing.assert_close(process['own'], expected['state'], **EXACT)
    own = [statistics_of(process['own']) for process in processes]
    assert (own[0]['conv1.bn.running_mean'] - own[1]['conv1.bn.running_mean']).abs().max() > 1e-3
    for process in processes:
        for key in own[0]:
            torch.testing.assert_close(process['reduce'][key], (own[0][key] + own[1][key]) / 2, rtol=1e-14, atol=0)
            torch.testing.assert_close(process['broadcast'][key], own[0][key], rtol=0, atol=0)
        # Parameters are the same ones everywhere and remain so.
        for how in ('own', 'reduce', 'broadcast'):
            torch.testing.assert_close(parameters_of(process[how]), parameters_of(processes[0]['own']), rtol=0, atol=0)


@pytest.fixture(scope='module')
def sharded(tmp_path_factory):
    return side_by_side('sharded', tmp_path_factory.mktemp('sharded'))


@pytest.mark.parametrize('start', ['in memory', 'on meta', 'assigned'])
def test_sharded_network(sharded, start):
    """FSDP2: outputs, whole gradients, parameters and the saved state are those of networks that are not sharded."""
    expected = averaged()
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
    worker.make().load_state_dict(saved)


def test_a_saved_state_is_all_that_training_needs(joined, tmp_path):
    """Stopped after a step, and resumed from a file by a new network: the same to the last bit as without a stop."""
    model, data = worker.build(), worker.batches()
    sgd = worker.optimizer(model)
    worker.train(model, data[:1], sgd)
    torch.save(dict(model=model.state_dict(), optimizer=sgd.state_dict()), tmp_path / 'saved.pt')
    saved = torch.load(tmp_path / 'saved.pt', weights_only=True)
    model = worker.make()
    model.load_state_dict(saved['model'])
    sgd = worker.optimizer(model)
    sgd.load_state_dict(saved['optimizer'])
    worker.train(model, data[1:], sgd)
    torch.testing.assert_close(model.state_dict(), joined['state'], rtol=0, atol=0)
