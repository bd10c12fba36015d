"""What test_distributed.py runs in several processes: a scenario by name, which saves what each process found.

The network, the data and the training are here, and the test computes with the same ones what it expects.
"""

import datetime
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import reference
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.utils import distribute_bn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import timm_harmonic

PROCESSES = 2
STEPS = 3
ARGS = dict(layers=(1, 1, 1, 1), channels=(8, 16, 32, 64), num_classes=5, smoothness=1, dtype=torch.float64)
PAIRS = {'layer1.0.conv2': 30, 'layer3.0.conv1': 60}  # of channel and function, in layers that keep these
CONVERSIONS = {
    'torch': nn.SyncBatchNorm.convert_sync_batchnorm,
    'timm': timm.layers.convert_sync_batchnorm,
}
TIMEOUT = datetime.timedelta(seconds=60)  # for one collective: a process whose peer is gone ends by itself

Batch = tuple[Tensor, Tensor]


def make(**options: Any) -> nn.Module:
    """A new network. One layer with pairs computes in separable form."""
    model = timm.create_model('harm_resnet18', **ARGS, **options)
    model = timm_harmonic.harmonize(model, pairs=PAIRS, inplace=True)
    model.layer3[0].conv1.form = 'separable'
    return model.train()


def build() -> nn.Module:
    """The same network in every process. No gradient is zero: a new ResNet would have zero scales."""
    torch.manual_seed(0)
    return reference.randomize_batch_norm(make())


def batches() -> list[Batch]:
    """One batch of eight images for each step."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(STEPS, 8, 3, 64, 64, generator=generator, dtype=torch.float64)
    # The shares differ in brightness and contrast: the statistics of one share are not those of the batch.
    images[:, 1::PROCESSES] = 2 * images[:, 1::PROCESSES] + 1
    return list(zip(images, torch.randint(5, (STEPS, 8), generator=generator), strict=True))


def share(batch: Batch, rank: int) -> Batch:
    """What one process gets of a batch."""
    return batch[0][rank::PROCESSES], batch[1][rank::PROCESSES]


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)


def train(
    model: nn.Module,
    data: Iterable[Batch],
    sgd: torch.optim.Optimizer | None = None,
    after_step: Callable[[], None] = lambda: None,
) -> list[Tensor]:
    """One SGD step on each batch; returns the losses, and leaves the last gradients."""
    if sgd is None:
        sgd = optimizer(model)
    losses = []
    for images, targets in data:
        sgd.zero_grad()
        loss = F.cross_entropy(model(images), targets)
        loss.backward()
        sgd.step()
        losses.append(loss.detach())
        after_step()
    return losses


def count_explicit(stem: timm_harmonic.HarmonicBlock2d) -> list[int]:
    """A list that grows by one whenever the stem computes its responses, as in its explicit form."""
    responses, calls = stem.responses, []

    def counted(x):
        calls.append(len(calls))
        return responses(x)

    stem.responses = counted
    return calls


class _Sum(torch.autograd.Function):
    """Sum over all processes. Backwards, each process gets the sum of all gradients."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient


def synchronised_forward(self: nn.SyncBatchNorm, x: Tensor) -> Tensor:
    """nn.SyncBatchNorm in training by its definition. Its own forward refuses tensors on the CPU."""
    assert self.training
    dims, shape = (0, 2, 3), (1, -1, 1, 1)
    count = _Sum.apply(x.new_tensor(x.numel() // x.shape[1]))
    mean = _Sum.apply(x.sum(dims)) / count
    centred = x - mean.reshape(shape)
    var = _Sum.apply(centred.square().sum(dims)) / count
    with torch.no_grad():
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var * count / (count - 1), self.momentum)
    y = centred * torch.rsqrt(var + self.eps).reshape(shape)
    return y * self.weight.reshape(shape) + self.bias.reshape(shape) if self.affine else y


def synchronised(rank: int) -> dict:
    """DistributedDataParallel with synchronised batch-norms, converted by torch's function and by timm's."""
    nn.SyncBatchNorm.forward = synchronised_forward
    # DistributedDataParallel's own refusal of such modules on the CPU.
    DistributedDataParallel._passing_sync_batchnorm_handle = lambda self, module: None
    found = {}
    for name, convert in CONVERSIONS.items():
        model = convert(build())
        explicit = count_explicit(model.conv1)
        # It raises in the next step if a parameter had no gradient.
        parallel = DistributedDataParallel(model, find_unused_parameters=False)
        losses = train(parallel, (share(batch, rank) for batch in batches()))
        gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
        found[name] = dict(state=model.state_dict(), gradients=gradients, losses=losses, explicit=len(explicit))
    return found


def statistics(rank: int) -> dict:
    """DistributedDataParallel, with own statistics in each process, then timm's --dist-bn reduce and broadcast."""
    model = build()
    explicit = count_explicit(model.conv1)
    parallel = DistributedDataParallel(model, broadcast_buffers=False)
    train(parallel, (share(batch, rank) for batch in batches()))
    found = dict(explicit=len(explicit), own={k: v.clone() for k, v in model.state_dict().items()})
    for how in ('reduce', 'broadcast'):
        model.load_state_dict(found['own'])
        distribute_bn(parallel, PROCESSES, reduce=how == 'reduce')
        found[how] = {k: v.clone() for k, v in model.state_dict().items()}
    return found


def sharded(rank: int) -> dict:
    """FSDP2, on a network in memory, on one that gets storage and then weights once it is sharded, or both at once."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh('cpu', (PROCESSES,))
    whole = StateDictOptions(full_state_dict=True)
    found = {}
    for start in ('in memory', 'on meta', 'assigned'):
        model = build() if start == 'in memory' else make(device='meta')
        explicit = count_explicit(model.conv1)
        for module in (model.conv1, *model.layer1, *model.layer2, *model.layer3, *model.layer4, model):
            fully_shard(module, mesh=mesh)
        if start == 'on meta':
            model.to_empty(device='cpu')
        if start != 'in memory':
            set_model_state_dict(model, build().state_dict(), options=whole)
        shards = {key: tuple(parameter.to_local().shape) for key, parameter in model.named_parameters()}
        gradients = []
        losses = train(
            model,
            (share(batch, rank) for batch in batches()),
            # Whole gradients: every process takes part in putting them together.
            after_step=lambda model=model, gradients=gradients: gradients.append(
                {key: parameter.grad.full_tensor() for key, parameter in model.named_parameters()}
            ),
        )
        # Each process has the parameters whole here; the statistics are its own.
        parameters = {key: parameter.full_tensor().detach() for key, parameter in model.named_parameters()}
        buffers = {key: value.clone() for key, value in model.state_dict().items() if key not in parameters}
        # torch gives the whole state to the first process only.
        saved = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        with torch.no_grad():
            outputs = model.eval()(batches()[0][0])
        found[start] = dict(
            explicit=len(explicit),
            shards=shards,
            losses=losses,
            gradients=gradients,
            state=dict(parameters, **buffers),
            saved=saved,
            outputs=outputs,
        )
    return found


SCENARIOS = dict(synchronised=synchronised, statistics=statistics, sharded=sharded)


def main(scenario: str, folder: str) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ['RANK'])
    dist.init_process_group(
        'gloo',
        init_method=os.environ['MEETING_POINT'],
        rank=rank,
        world_size=int(os.environ['WORLD_SIZE']),
        timeout=TIMEOUT,
    )
    assert dist.get_world_size() == PROCESSES
    try:
        found = SCENARIOS[scenario](rank)
        torch.save(found, Path(folder) / f'{rank}.pt')
        dist.barrier()  # the first process keeps the store that the others may still ask
    finally:
        dist.destroy_process_group()


if __name__ == '__main__':
    main(*sys.argv[1:])
