"""timm-harmonic predict: the classes that the network gives, for every kind of file, in every format."""

import csv
import json

import numpy as np
import pytest
import reference
import timm
import torch
import yaml
from commands import predict
from PIL import Image

import timm_harmonic_cli as cli
from timm_harmonic.common import InputError
from timm_harmonic.models.checkpoints import CheckpointError

pytestmark = pytest.mark.usefixtures('one_thread')
KWARGS = dict(layers=(1, 1, 1, 1), channels=(8, 16, 32, 64))
CLASSES = ['ash', 'beech', 'cedar']


def network(folder, channels=3, **config):
    """A folder of a harmonic network for images of 48 pixels."""
    torch.manual_seed(0)
    model = timm.create_model('harm_resnet18', in_chans=channels, num_classes=3, **KWARGS)
    reference.randomize_batch_norm(model).eval()
    config = dict(input_size=(channels, 48, 48), crop_pct=0.75, mean=(0.4,) * channels, std=(0.3,) * channels) | config
    names = dict(label_names=CLASSES, pretrained_cfg=config)
    timm.models.save_for_hf(model, str(folder), model_config=names, safe_serialization=True)
    return model


def pixels(height, width, channels, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def probabilities(row):
    return {of['name']: of['probability'] for of in row['classes']}


def expected(model, image):
    with torch.inference_mode():
        return dict(zip(CLASSES, model(image[None]).softmax(-1)[0].tolist(), strict=True))


def test_pictures_as_in_validation(tmp_path):
    """Files and folders, in any mode, in more than one batch."""
    model = network(tmp_path / 'net')
    (tmp_path / 'images' / 'more').mkdir(parents=True)
    paths = [tmp_path / 'images' / f'{i}.png' for i in range(4)] + [tmp_path / 'images' / 'more' / 'gray.jpg']
    for i, path in enumerate(paths):
        array = pixels(60 + i, 80, 3, i)
        Image.fromarray(array if path.suffix == '.png' else array[..., 0]).save(path)
    (tmp_path / 'images' / '.hidden').write_text('')
    rows = predict(str(tmp_path / 'net'), [tmp_path / 'images', paths[0]], batch_size=2)
    assert [row['file'] for row in rows] == [str(path) for path in (*paths, paths[0])]
    loaded = timm.create_model(f'local-dir:{tmp_path / "net"}', pretrained=True)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(loaded), is_training=False)
    for row in rows:
        with Image.open(row['file']) as image:
            found = expected(model, transform(image.convert('RGB')))
        assert probabilities(row) == pytest.approx(found, abs=1e-5)
        assert list(probabilities(row)) == sorted(found, key=found.get, reverse=True)


def test_a_checkpoint_of_a_run(tmp_path):
    """The run's options say how to prepare images."""
    model = network(tmp_path / 'net')
    torch.save(dict(state_dict=model.state_dict(), epoch=1), tmp_path / 'last.pth.tar')
    run = dict(model='harm_resnet18', model_kwargs={k: list(v) for k, v in KWARGS.items()}, img_size=48, crop_pct=0.75)
    (tmp_path / 'args.yaml').write_text(yaml.safe_dump(dict(run, mean=[0.4] * 3, std=[0.3] * 3)))
    Image.fromarray(pixels(60, 80, 3)).save(tmp_path / 'image.png')
    (expected_row,) = predict(str(tmp_path / 'net'), [tmp_path / 'image.png'])
    options = dict(checkpoint=tmp_path / 'last.pth.tar', class_names=CLASSES)
    (row,) = predict('harm_resnet18', [tmp_path / 'image.png'], **options)
    assert probabilities(row) == pytest.approx(probabilities(expected_row), abs=1e-6)
    # The same weights as every command takes, unless the averaged ones are asked for.
    averaged = {key: value * 0 if value.is_floating_point() else value for key, value in model.state_dict().items()}
    torch.save(dict(state_dict=model.state_dict(), state_dict_ema=averaged), tmp_path / 'last.pth.tar')
    (again,) = predict('harm_resnet18', [tmp_path / 'image.png'], **options)
    assert again == row
    (of_averaged,) = predict('harm_resnet18', [tmp_path / 'image.png'], use_ema=True, **options)
    assert list(probabilities(of_averaged).values()) == pytest.approx([1 / 3] * 3)
    torch.save(dict(state_dict_ema=averaged), tmp_path / 'last.pth.tar')
    with pytest.raises(CheckpointError, match=r'averaged weights .* only: take them by --use-ema'):
        predict('harm_resnet18', [tmp_path / 'image.png'], **options)


def test_files_that_cannot_be_taken(tmp_path):
    network(tmp_path / 'net')
    Image.fromarray(pixels(60, 80, 3)).save(tmp_path / 'good.png')
    (tmp_path / 'bad.png').write_text('no image')
    np.save(tmp_path / 'bands.npy', pixels(60, 80, 13))
    paths = [tmp_path / name for name in ('bad.png', 'good.png', 'bands.npy')]
    with pytest.raises(InputError, match=r'2 files cannot be read; pass --skip-bad(.|\n)*bad\.png(.|\n)*13 channels'):
        predict(str(tmp_path / 'net'), paths)
    rows = predict(str(tmp_path / 'net'), paths, skip_bad=True)
    assert ['error' in row for row in rows] == [True, False, True]
    with pytest.raises(InputError, match='does not exist'):
        predict(str(tmp_path / 'net'), [tmp_path / 'nowhere'])
    (tmp_path / 'empty').mkdir()
    with pytest.raises(InputError, match='no files in'):
        predict(str(tmp_path / 'net'), [tmp_path / 'empty'])
    with pytest.raises(InputError, match='got 2 class names for 3 classes'):
        predict(str(tmp_path / 'net'), paths, class_names=['a', 'b'])
    with pytest.raises(InputError, match='harm_resnet18 needs weights: pass --checkpoint FILE or --pretrained'):
        predict('harm_resnet18', paths)


def test_networks_that_cannot_answer(tmp_path):
    """One that gives NaN, one that has no classes, and configs that say nothing that can be done."""
    image = [tmp_path / 'image.png']
    Image.fromarray(pixels(60, 80, 3)).save(image[0])
    model = network(tmp_path / 'net', crop_pct=0.75)
    with torch.no_grad():
        model.fc.bias.fill_(float('nan'))
    timm.models.save_for_hf(model, str(tmp_path / 'nan'), safe_serialization=True)
    with pytest.raises(InputError, match=r'image\.png: the network outputs NaN'):
        predict(str(tmp_path / 'nan'), image)
    with pytest.raises(InputError, match='has no classifier'):
        predict(str(tmp_path / 'net'), image, model_kwargs=dict(features_only=True))
    with pytest.raises(InputError, match='have 3 classes, not 5'):
        predict(str(tmp_path / 'net'), image, model_kwargs=dict(num_classes=5))
    config = json.loads((tmp_path / 'net' / 'config.json').read_text())
    bad = {
        'cannot be created: KeyError': {key: value for key, value in config.items() if key != 'architecture'},
        'does not say how to prepare images': dict(config, pretrained_cfg=config['pretrained_cfg'] | dict(mean='gray')),
        'is not a list of names': dict(config, label_names=dict(a=1, b=2, c=3)),
    }
    for message, changed in bad.items():
        (tmp_path / 'net' / 'config.json').write_text(json.dumps(changed))
        with pytest.raises(InputError, match=message):
            predict(str(tmp_path / 'net'), image)


@pytest.mark.parametrize('form', ['table', 'csv', 'json'])
def test_command(form, tmp_path, capsys, monkeypatch):
    """Names are shown as they are: not as markup, nor as pictures."""
    monkeypatch.setenv('COLUMNS', '500')
    network(tmp_path / 'net')
    Image.fromarray(pixels(60, 80, 3)).save(tmp_path / 'img[copy]:car:.png')
    (tmp_path / 'bad.png').write_text('no image')
    (tmp_path / 'names').write_text('[bold]dog\nbird:car:\n[/b]\n')
    arguments = [str(tmp_path / name) for name in ('net', 'img[copy]:car:.png', 'bad.png')]
    arguments = ['predict', *arguments, '--format', form, '--class-names', str(tmp_path / 'names')]
    assert cli.main(arguments) == 1
    assert 'bad.png' in capsys.readouterr().err
    arguments += ['--skip-bad', '--topk', '2', '--quiet']
    assert cli.main(arguments) == 0
    printed = capsys.readouterr()
    assert cli.main([*arguments, '--out', str(tmp_path / 'out')]) == 0
    text = (tmp_path / 'out').read_text()
    assert text.split() == printed.out.split()
    assert 'img[copy]:car:.png' in text
    if form == 'json':
        assert [len(row.get('classes', ())) for row in json.loads(text)] == [2, 0]
    elif form == 'csv':
        rows = list(csv.DictReader(text.splitlines()))
        assert float(rows[0]['probability_1']) >= float(rows[0]['probability_2'])
        assert rows[1]['error']
    else:
        assert sum(name in text for name in ('[bold]dog', 'bird:car:', '[/b]')) == 2
        assert 'left out' in text
