"""A stranger's config.json: `predict` uses the folder's own weights or prints an error, and reads no other file."""

import json
import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
import reference
import timm
import torch
from hypothesis import strategies as st
from PIL import Image

import timm_harmonic_cli as cli

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures('one_thread')]

SMALL = dict(layers=(1, 1, 1, 1), channels=(4, 8, 8, 8), num_classes=3)
SOURCES = {
    'harm_resnet18': SMALL,
    'harmonized': dict(SMALL, base_model='resnet18', levels={'layer4.*': 2}),
}
DECOY = 'a file of the reader'
# No large numbers: by width and depth a config can ask for any amount of memory, in every network of timm.
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 40)
    | st.floats(-2, 40)
    | st.sampled_from([math.nan, math.inf])
    | st.text(max_size=8)
    | st.sampled_from([DECOY, 'harm_resnet18', 'harmonized', 'resnet18', 'local-dir:.', 'l1', 'ortho', 'x' * 5000]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8) | st.just('layer4.*'), inner),
    max_leaves=6,
)
FIELDS = {
    (): [
        'architecture', 'num_classes', 'num_features', 'global_pool', 'label_names', 'label_descriptions', 'model_args',
        'pretrained_cfg', 'url', 'file',
    ],
    ('model_args',): [
        'layers', 'channels', 'num_classes', 'in_chans', 'global_pool', 'base_model', 'level', 'levels', 'include',
        'exclude', 'normalization', 'smoothness', 'form', 'harmonic_stem', 'harmonic_blocks', 'stem_pool', 'drop_rate',
        'features_only', 'out_indices', 'checkpoint_path', 'pretrained', 'pretrained_cfg', 'pretrained_cfg_overlay',
        'cache_dir', 'scriptable', 'block', 'unknown',
    ],
    ('pretrained_cfg',): [
        'url', 'file', 'state_dict', 'hf_hub_id', 'hf_hub_filename', 'source', 'architecture', 'tag', 'custom_load',
        'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode', 'fixed_input_size', 'num_classes', 'label_offset',
        'label_names', 'pool_size', 'first_conv', 'classifier', 'license', 'notes', 'paper_ids', 'unknown',
    ],
}  # fmt: skip
PLACES = st.sampled_from([(*place, name) for place, names in FIELDS.items() for name in names])


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """By name, the files of a folder as timm saves it, and their weights."""
    found = {}
    for name, kwargs in SOURCES.items():
        torch.manual_seed(0)
        model = reference.randomize_batch_norm(timm.create_model(name, **kwargs))
        place = tmp_path_factory.mktemp(name)
        config = dict(pretrained_cfg=dict(input_size=(3, 32, 32)), label_names=['a', 'b', 'c'], model_args=kwargs)
        timm.models.save_for_hf(model, str(place), model_config=config, safe_serialization=True)
        found[name] = {path.name: path.read_bytes() for path in place.iterdir()}, model.state_dict()
    return found


def changed(config, changes, decoy):
    """A config with other values in some places. None takes the field away."""
    for (*place, name), value in changes:
        inside = config
        for key in place:
            inside = inside.get(key) if isinstance(inside, dict) else None
        if not isinstance(inside, dict):
            continue
        if value is None:
            inside.pop(name, None)
        else:
            inside[name] = decoy if value == DECOY else value
    return config


@pytest.mark.filterwarnings('ignore')  # about fields that are not known
def test_config_json(search, folders, capsys):
    """`predict` with a folder whose config says something else in a few places."""

    def check(source, changes):
        files, weights = folders[source]
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            decoy = folder / 'decoy.pth'
            torch.save({key: torch.zeros_like(value) for key, value in weights.items()}, decoy)
            net = folder / 'net'
            net.mkdir()
            for name, content in files.items():
                (net / name).write_bytes(content)
            config = changed(json.loads(files['config.json']), changes, str(decoy))
            (net / 'config.json').write_text(json.dumps(config))
            image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(image).save(folder / 'image.png')
            code = cli.main(['predict', str(net), str(folder / 'image.png'), '--format', 'json'])
            printed = capsys.readouterr()
            if code == 0:
                (row,) = json.loads(printed.out)
                assert all(0 <= of['probability'] <= 1 for of in row['classes'])
                loaded = timm.create_model(f'local-dir:{net}', pretrained=True).state_dict()
                same = [key for key in weights if key in loaded and loaded[key].shape == weights[key].shape]
                assert len(same) > len(weights) / 2
                assert all(torch.equal(loaded[key], weights[key]) for key in same if not key.startswith('fc.'))
            else:
                assert code == 1
                assert printed.err.rpartition('\r')[2].startswith('timm-harmonic: error: ')

    search(
        check,
        source=st.sampled_from(list(SOURCES)),
        changes=st.lists(st.tuples(PLACES, VALUES), min_size=1, max_size=3),
    )


@pytest.mark.filterwarnings('ignore')
def test_other_json(search, folders, capsys):
    """config.json is some other JSON, or none."""

    def check(content):
        with tempfile.TemporaryDirectory() as place:
            net = Path(place) / 'net'
            net.mkdir()
            files, _ = folders['harm_resnet18']
            (net / 'model.safetensors').write_bytes(files['model.safetensors'])
            (net / 'config.json').write_bytes(content)
            assert cli.main(['predict', str(net), place]) == 1
            assert capsys.readouterr().err.rpartition('\r')[2].startswith('timm-harmonic: error: ')

    search(check, content=st.binary(max_size=40) | VALUES.map(lambda value: json.dumps(value).encode()))
