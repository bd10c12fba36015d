"""Checkpoints that are damaged, odd or hostile: `convert` writes a folder, or prints an error and writes nothing."""

import io
import resource
import struct
import tempfile
from pathlib import Path

import pytest
import reference
import safetensors.torch
import timm
import torch
from hypothesis import strategies as st

import timm_harmonic_cli as cli

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures('one_thread')]

NAME = 'harm_resnet18'
KWARGS = dict(layers=(1, 1, 1, 1), channels=(4, 8, 8, 8))
OPTIONS = ['layers=(1, 1, 1, 1)', 'channels=(4, 8, 8, 8)']


def state_dict():
    torch.manual_seed(0)
    model = timm.create_model(NAME, num_classes=3, **KWARGS)
    return reference.randomize_batch_norm(model).state_dict()


STATE = state_dict()


def saved(content, kind):
    file = io.BytesIO()
    if kind == 'safetensors':
        return safetensors.torch.save(content)
    torch.save(content, file, _use_new_zipfile_serialization=kind == 'zip')
    return file.getvalue()


FILES = {kind: saved(STATE, kind) for kind in ('zip', 'legacy', 'safetensors')}
PLACES = st.floats(0, 1, exclude_max=True)
# The first hundred bytes hold most of what a reader believes.
OFFSETS = st.integers(0, 100) | PLACES
DAMAGE = st.one_of(
    st.tuples(st.just('flip'), OFFSETS, st.integers(0, 7)),
    st.tuples(st.just('cut'), OFFSETS, st.just(0)),
    st.tuples(st.just('zeros'), OFFSETS, st.integers(1, 5000)),
    st.tuples(st.just('insert'), OFFSETS, st.binary(min_size=1, max_size=20)),
    st.tuples(st.just('drop'), OFFSETS, st.integers(1, 200)),
    st.tuples(st.just('size'), st.just(0), st.integers(0, 2**64 - 1)),
)


def damaged(content, damage):
    kind, place, value = damage
    at = place if isinstance(place, int) else int(place * len(content))
    if kind == 'flip':
        return content[:at] + bytes([content[at] ^ (1 << value)]) + content[at + 1 :] if at < len(content) else content
    if kind == 'cut':
        return content[:at]
    if kind == 'zeros':
        return content[:at] + bytes(len(content[at : at + value])) + content[at + value :]
    if kind == 'insert':
        return content[:at] + value + content[at:]
    if kind == 'drop':
        return content[:at] + content[at + value :]
    return struct.pack('<Q', value) + content[8:]


def converts_or_says_why(content, suffix, capsys):
    """What `timm-harmonic convert` makes of a file."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        path, out = folder / f'weights.{suffix}', folder / 'out'
        path.write_bytes(content)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        code = cli.main(['convert', str(path), '--model', NAME, '--out', str(out), '--model-kwargs', *OPTIONS])
        said = capsys.readouterr().err.rpartition('\r')[2]  # behind the progress
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB
        if code == 0:
            model = timm.create_model(f'local-dir:{out}', pretrained=True)
            assert {file.name for file in out.iterdir()} == {'README.md', 'config.json', 'model.safetensors'}
            assert model.state_dict().keys() == STATE.keys()
        else:
            assert code == 1
            assert said.startswith('timm-harmonic: error: ')
            assert len(said) < 2000
            assert list(folder.iterdir()) == [path]


@pytest.mark.filterwarnings('ignore')  # of readers, about what they read
def test_damaged_bytes(search, capsys):
    """Bits turned over, ends cut off, parts lost. What is not seen may only be another number."""

    def check(kind, damages):
        content = FILES[kind]
        for damage in damages:
            content = damaged(content, damage)
        converts_or_says_why(content, 'safetensors' if kind == 'safetensors' else 'pth', capsys)

    search(check, kind=st.sampled_from(list(FILES)), damages=st.lists(DAMAGE, min_size=1, max_size=3))


DTYPES = [
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int8,
    torch.int64,
    torch.bool,
    torch.complex64,
    torch.float8_e4m3fn,
]
CHANGES = {
    'dtype': lambda value, n: value.to(DTYPES[n % len(DTYPES)]),
    'transposed': lambda value, n: value.flip(0).T if value.ndim == 2 else value.flatten(),
    'one more': lambda value, n: value[None],
    'first': lambda value, n: value[:1] if value.ndim else value,
    'none of it': lambda value, n: value[:0] if value.ndim else value,
    'expanded': lambda value, n: torch.zeros(1).expand(tuple(value.shape) or (1,)),
    'huge': lambda value, n: torch.zeros(1).expand(2**16, 2**14, 3, 3),
    'NaN': lambda value, n: torch.full_like(value, float('nan')) if value.is_floating_point() else value,
    'infinite': lambda value, n: torch.full_like(value, float('inf')) if value.is_floating_point() else value,
    'parameter': lambda value, n: torch.nn.Parameter(value.float()),
    'sparse': lambda value, n: value.float().to_sparse(),
    'meta': lambda value, n: value.to('meta'),
    'list': lambda value, n: value.flatten()[:5].tolist(),
    'text': lambda value, n: 'weights',
    'number': lambda value, n: n,
    'nothing': lambda value, n: None,
    'dict': lambda value, n: {'weight': value},
}
NAMES = {
    'gone': lambda key: None,
    'of a wrapper': lambda key: f'module.{key}',
    'of another wrapper': lambda key: f'_orig_mod.{key}',
    'longer': lambda key: f'{key}.more',
    'empty': lambda key: '',
    'bytes': lambda key: key.encode(),
    'integer': lambda key: 3,
    'none': lambda key: None if key is None else key.upper(),
}
WRAPPINGS = {
    'bare': lambda state: state,
    'state_dict': lambda state: dict(state_dict=state, epoch=3),
    'model': lambda state: dict(model=state),
    'params': lambda state: dict(params=state, epoch='many', optimizer=None),
    'averaged': lambda state: dict(state_dict_ema=state, state_dict=None),
    'both': lambda state: dict(state_dict=state, state_dict_ema={}),
    'deep': lambda state: dict(state_dict=dict(state_dict=state)),
    'list': lambda state: [state],
    'tuple': lambda state: (state, 1),
    'wrapped': lambda state: {f'module.{key}' if isinstance(key, str) else key: value for key, value in state.items()},
    'epochs': lambda state: dict(state_dict=state, epoch=[1], arch=5, args={'model': 7}),
}


@pytest.mark.filterwarnings('ignore')  # of torch, about sparse tensors and the like
def test_odd_contents(search, capsys):
    """Whole files of what no training script should save."""
    keys = list(STATE)

    def check(values, names, wrapping, kind):
        state = dict(STATE)
        for index, (change, number) in values.items():
            key = keys[index % len(keys)]
            state[key] = CHANGES[change](state[key], number)
        for index, change in names.items():
            key = keys[index % len(keys)]
            value, name = state.pop(key, None), NAMES[change](key)
            if name is not None:
                state[name] = value
        converts_or_says_why(saved(WRAPPINGS[wrapping](state), kind), 'pth', capsys)

    index = st.integers(0, len(keys) - 1)
    search(
        check,
        values=st.dictionaries(index, st.tuples(st.sampled_from(list(CHANGES)), st.integers(0, 9)), max_size=2),
        names=st.dictionaries(index, st.sampled_from(list(NAMES)), max_size=2),
        wrapping=st.sampled_from(list(WRAPPINGS)),
        kind=st.sampled_from(['zip', 'legacy']),
    )
