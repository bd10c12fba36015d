"""From a checkpoint to the Hub and back, by the real client and a stand-in for the Hub."""

import json
import re
import shutil
import sys

import PIL.Image
import pytest
import reference
import safetensors.torch
import timm
import tiny_models
import torch
import yaml
from huggingface_hub import ModelCard
from tiny_models import FILE, ID, NAME, create, same

import timm_harmonic_cli as cli
from timm_harmonic.common import InputError
from timm_harmonic.export.folder import convert, count
from timm_harmonic.export.publish import publish
from timm_harmonic.models import download
from timm_harmonic.models.checkpoints import CheckpointError

TOKEN = 'hf_' + 'S3cret' * 6


@pytest.fixture(autouse=True)
def _token(monkeypatch):
    monkeypatch.setenv('HF_TOKEN', TOKEN)


@pytest.fixture
def released(tmp_path):
    path = tmp_path / FILE
    path.write_bytes(tiny_models.CHECKPOINT)
    return path


@pytest.fixture
def folder(released, tmp_path):
    convert(released, NAME, tmp_path / 'folder')
    return tmp_path / 'folder'


@pytest.fixture
def run(tmp_path):
    """The files of a training run of timm: 4 channels, 5 classes, 96 x 96 images, averaged weights."""
    path = tmp_path / 'run'
    path.mkdir()
    models = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        kwargs = dict(layers=(1, 1, 1, 1), levels=(None, None, 3, 2), stem_pool='avg')
        models.append(
            reference.randomize_batch_norm(timm.create_model('harm_resnet18', in_chans=4, num_classes=5, **kwargs))
        )
    options = dict(
        model='harm_resnet18',
        model_kwargs=dict(layers=[1, 1, 1, 1], levels=[None, None, 3, 2], stem_pool='avg'),
        in_chans=4,
        num_classes=5,
        img_size=96,
        mean=[0.1, 0.2, 0.3, 0.4],
        std=[0.5, 0.5, 0.5, 0.5],
        interpolation='bicubic',
        crop_pct=0.9,
        model_ema=True,
        data_dir='/home/somebody/flowers',
    )
    (path / 'args.yaml').write_text(yaml.safe_dump(options))
    (path / 'summary.csv').write_text(
        'epoch,train_loss,eval_loss,eval_top1,eval_top5,lr\n6,2,1.6,50,90,0.1\n7,1,1.5,61.8034,98.5,0.1\n'
    )
    states = [model.eval().state_dict() for model in models]
    content = dict(
        epoch=7, arch='harm_resnet18', state_dict=states[0], state_dict_ema=states[1], optimizer={}, metric=61.8
    )
    torch.save(content, path / 'model_best.pth.tar')
    return path, models


def test_folder_of_a_released_weight(folder, released):
    assert [path.name for path in sorted(folder.iterdir())] == ['README.md', 'config.json', 'model.safetensors']
    source = create(pretrained_cfg_overlay=dict(file=str(released)))
    assert same(create(f'local-dir:{folder}'), source)
    config = json.loads((folder / 'config.json').read_text())
    assert config['architecture'] == NAME
    assert config['pretrained_cfg']['license'] == 'bsd-3-clause'
    assert config['pretrained_cfg']['tag'] == 'ulicny_in1k'
    assert config['pretrained_cfg']['interpolation'] == 'bilinear'
    assert len(config['label_names']) == 1000
    assert config['label_names'][0] == 'n01440764'


def test_card_of_a_released_weight(folder, released):
    card = ModelCard.load(folder / 'README.md')
    front = card.data.to_dict()
    assert front['license'] == 'bsd-3-clause'
    assert front['library_name'] == 'timm'
    assert front['datasets'] == ['imagenet-1k']
    assert front['tags'][:2] == ['image-classification', 'timm']
    text = card.text
    assert f'# Model card for {NAME}.ulicny_in1k' in text
    assert f'releases/download/0.1.0/{FILE}' in text
    assert download.sha256_of(released) in text
    assert "the figures are the paper's\n  - paper: nothing" in text
    model = create(pretrained_cfg_overlay=dict(file=str(released)))
    assert f'Params (M): {sum(p.numel() for p in model.parameters()) / 1e6:.2f}' in text
    for heading in ('Model Details', 'Model Usage', 'Feature maps', 'Embeddings', 'Model Comparison', 'Citation'):
        assert f'# {heading}\n' in text
    assert 'harm_resnet101.ulicny_in1k | paper: top-1 error 21.48 %' in text
    assert 'Compressed' not in text
    assert 'Reduced' not in text


def test_multiply_adds_are_those_of_the_originals():
    """Counted on the authors' networks at 224 x 224, which compute the stem's responses one by one."""
    for name, original, responses in (
        ('harm_resnet50', 4.02, 3 * 49 * 7 * 7 * 56 * 56),
        ('harm_resnet50_avgpool', 4.18, 3 * 49 * 7 * 7 * 112 * 112),
        ('harm_vgg16_bn', 15.48, 3 * 9 * 3 * 3 * 224 * 224),
    ):
        model = timm.create_model(name, device='meta')
        assert (count(model)['macs'] + responses) / 1e9 == pytest.approx(original, abs=0.006)


def test_activations_are_those_that_timm_states():
    """11.1 million for a ResNet-50, by its model card (https://huggingface.co/timm/resnet50.a1_in1k)."""
    found = count(timm.create_model('harm_resnet50', stem_pool='max', device='meta'))
    assert found['activations'] == pytest.approx(11.1e6, abs=0.05e6)


@pytest.mark.parametrize('averaged', [False, True])
def test_folder_of_a_run(run, tmp_path, averaged):
    path, models = run
    files = convert(
        path / 'model_best.pth.tar', 'harm_resnet18', tmp_path / 'flowers', repo_id='me/flowers', use_ema=averaged
    )
    assert {f.name for f in files} == {
        'README.md',
        'config.json',
        'model.safetensors',
        'summary.csv',
        'train_hparams.yaml',
    }
    assert (tmp_path / 'flowers' / 'summary.csv').read_text() == (path / 'summary.csv').read_text()
    assert (tmp_path / 'flowers' / 'train_hparams.yaml').read_text() == (path / 'args.yaml').read_text()
    loaded = create(f'local-dir:{tmp_path / "flowers"}')
    assert same(loaded, models[averaged], 4)
    cfg = timm.data.resolve_model_data_config(loaded)
    assert tuple(cfg['input_size']) == (4, 96, 96)
    assert tuple(cfg['mean']) == (0.1, 0.2, 0.3, 0.4)
    assert cfg['interpolation'] == 'bicubic'
    assert cfg['crop_pct'] == 0.9
    assert loaded.pretrained_cfg.get('tag') is None
    assert not loaded.pretrained_cfg.get('notes')

    text = (tmp_path / 'flowers' / 'README.md').read_text()
    assert 'eval_top1: 61.803' in text
    assert 'measured by the run itself' in text
    assert ('these are not the weights in this repository' in text) is not averaged
    assert ('averaged weights (EMA)' in text) is averaged
    assert 'images of 4 channels' in text
    assert '**Compressed:**' in text
    assert 'paper' not in text.partition('## Model Usage')[0].replace('Papers:', '')
    assert "create_model('hf-hub:me/flowers'" in text


def test_options_in_the_checkpoint_itself(run, tmp_path):
    """As newer train.py scripts save them. No other class than that of the options is loaded."""
    from argparse import Namespace

    path, models = run
    content = torch.load(path / 'model_best.pth.tar', weights_only=True)
    content['args'] = Namespace(**yaml.safe_load((path / 'args.yaml').read_text()))
    torch.save(content, tmp_path / 'alone.pth.tar')
    convert(tmp_path / 'alone.pth.tar', 'harm_resnet18', tmp_path / 'out')
    assert same(create(f'local-dir:{tmp_path / "out"}'), models[0], 4)


def test_options_by_hand_and_class_names(run, tmp_path):
    _, models = run
    torch.save(models[0].state_dict(), tmp_path / 'weights.pth')
    (tmp_path / 'classes.txt').write_text('a\nb\nc\nd\ne\n')
    arguments = [str(tmp_path / 'weights.pth'), '--model', 'harm_resnet18', '--out', str(tmp_path / 'out')]
    options = ['--model-kwargs', 'layers=[1,1,1,1]', 'levels=[None,None,3,2]', 'stem_pool=avg']
    more = ['--class-names', str(tmp_path / 'classes.txt'), '--license', 'mit', '--dataset', 'me/flowers']
    assert cli.main(['convert', *arguments, *options, *more]) == 0
    assert same(create(f'local-dir:{tmp_path / "out"}'), models[0], 4)
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert config['label_names'] == ['a', 'b', 'c', 'd', 'e']
    assert config['pretrained_cfg']['license'] == 'mit'
    front = ModelCard.load(tmp_path / 'out' / 'README.md').data.to_dict()
    assert (front['license'], front['datasets']) == ('mit', ['me/flowers'])


def test_convert_says_what_it_wrote(released, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv('TQDM_DISABLE', raising=False)
    monkeypatch.setattr(sys.stderr, 'isatty', lambda: True)
    assert cli.main(['convert', str(released), '--model', NAME, '--out', str(tmp_path / 'out')]) == 0
    printed = capsys.readouterr()
    assert 'gives the outputs of' in printed.out
    assert 'model.safetensors' in printed.out
    assert 'compare: 100%' in printed.err  # the progress bar


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (('nowhere.pth', '--model', NAME), 'no checkpoint at'),
        ((FILE, '--model', 'resnet18'), "'resnet18' is not a harmonic model"),
        ((FILE, '--model', 'harm_resnet'), "'harm_resnet' is not a harmonic model"),
        ((FILE, '--model', 'harm_vgg11'), 'it is not a harm_vgg11'),
        ((FILE, '--model', 'harm_resnet50'), 'does not fit the model'),
        ((FILE, '--model', NAME, '--use-ema'), 'no averaged weights'),
        ((FILE, '--model', NAME, '--model-kwargs', 'num_classes=3'), 'has num_classes=1000, not 3'),
        ((FILE, '--model', NAME, '--model-kwargs', 'levls=3'), "'levls'"),
        ((FILE, '--model', NAME, '--class-names', FILE), 'codec'),
        (('page.pth', '--model', NAME), 'is a web page'),
        (('half.pth', '--model', NAME), 'truncated or damaged'),
        (('nan.pth', '--model', NAME), 'not finite'),
        (('run/model_best.pth.tar', '--model', 'harm_resnet34'), 'was trained as harm_resnet18'),
        (('damaged/weights.pth', '--model', NAME), 'args.yaml is damaged'),
        (('list/weights.pth', '--model', NAME), 'holds no options, but a list'),
    ],
)
def test_nothing_half_written(released, run, tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'page.pth').write_text('<!doctype html><html></html>')
    (tmp_path / 'half.pth').write_bytes(tiny_models.CHECKPOINT[:5000])
    model = create(pretrained_cfg_overlay=dict(file=str(released)))
    state = model.state_dict()
    for name, text in (('damaged', '{model: ['), ('list', '- 1')):
        (tmp_path / name).mkdir()
        torch.save(state, tmp_path / name / 'weights.pth')
        (tmp_path / name / 'args.yaml').write_text(text)
    torch.save(dict(state, **{'fc.bias': torch.full_like(state['fc.bias'], float('nan'))}), tmp_path / 'nan.pth')
    before = sorted(tmp_path.iterdir())
    assert cli.main(['convert', *arguments, '--out', str(tmp_path / 'out')]) == 1
    assert words in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_other_outputs_are_an_error(released, tmp_path, monkeypatch):
    def damaging(model, folder, **kwargs):
        timm.models.save_for_hf(model, folder, **kwargs)
        state = safetensors.torch.load_file(f'{folder}/model.safetensors')
        state['fc.bias'][0] += 1e-4 * state['fc.bias'].abs().max()
        safetensors.torch.save_file(state, f'{folder}/model.safetensors')

    monkeypatch.setattr('timm_harmonic.export.folder.save_for_hf', damaging)
    with pytest.raises(InputError, match='gives other outputs than the checkpoint'):
        convert(released, NAME, tmp_path / 'out')
    assert list(tmp_path.iterdir()) == [released]


def test_folders_are_not_overwritten(folder, released):
    with pytest.raises(InputError, match='exists and is not an empty folder'):
        convert(released, NAME, folder)
    with pytest.raises(InputError, match='exists and is not an empty folder'):
        convert(released, NAME, released)
    shutil.rmtree(folder)
    folder.mkdir()
    assert convert(released, NAME, folder)


def test_publish_and_load(hub, folder, released, capsys):
    """By the Hub's id and by name, through timm's own functions: the same numbers to the last bit."""
    assert cli.main(['publish', str(folder), '--repo', ID]) == 0
    digest = download.sha256_of(folder / 'model.safetensors')
    assert capsys.readouterr().out == f'{hub.url}/{ID}\nto pin it, a note in the config of the model: sha256:{digest}\n'
    assert hub.repositories[ID].branches['main'].keys() == {
        '.gitattributes',
        'README.md',
        'config.json',
        'model.safetensors',
    }
    assert len([path for path in hub.paths('POST') if '/commit/' in path]) == 1
    assert not hub.repositories[ID].private

    source = create(pretrained_cfg_overlay=dict(file=str(released)))
    by_id, by_name = create(f'hf-hub:{ID}'), create()
    assert same(by_id, source)
    assert same(by_name, source)
    assert by_id.pretrained_cfg['source'] == 'hf-hub'
    assert by_id.pretrained_cfg['hf_hub_id'] == by_name.pretrained_cfg['hf_hub_id'] == ID
    assert not any('state_dict' in m.pretrained_cfg for m in (by_id, by_name))


@pytest.mark.parametrize('name', [NAME, f'hf-hub:{ID}'])
def test_adapted_from_the_hub(hub, folder, released, name):
    publish(folder, ID)
    for kwargs in (dict(num_classes=10), dict(in_chans=1), dict(in_chans=1, num_classes=10), dict(features_only=True)):
        loaded = create(name, **kwargs)
        expected = create(pretrained_cfg_overlay=dict(file=str(released)), **kwargs)
        for key, value in expected.state_dict().items():
            assert key.startswith('fc.') or torch.equal(loaded.state_dict()[key], value), (kwargs, key)
    assert same(create(name, num_classes=0), create(pretrained_cfg_overlay=dict(file=str(released)), num_classes=0))
    assert not any('state_dict' in getattr(module, 'pretrained_cfg', {}) for module in loaded.modules())


def test_a_released_name_from_the_hub(hub, tmp_path):
    """The real architecture. The name finds nothing here until its repository is published."""
    torch.manual_seed(0)
    model = reference.randomize_batch_norm(timm.create_model('harm_resnet50')).eval()
    torch.save(model.state_dict(), tmp_path / 'weights.pth')
    convert(
        tmp_path / 'weights.pth', 'harm_resnet50', tmp_path / 'out', repo_id='timm-harmonic/harm_resnet50.ulicny_in1k'
    )
    with pytest.raises(RuntimeError, match='are at neither place'):
        create('harm_resnet50')
    publish(tmp_path / 'out', 'timm-harmonic/harm_resnet50.ulicny_in1k')
    assert same(create('harm_resnet50'), model)
    assert same(create('harm_resnet50.ulicny_in1k'), model)


def test_snippets_of_the_card(hub, folder, tmp_path, monkeypatch, capsys):
    publish(folder, ID)
    monkeypatch.chdir(tmp_path)
    PIL.Image.new('RGB', (300, 260), 'teal').save('image.jpg')
    run_snippets((folder / 'README.md').read_text())
    assert capsys.readouterr().out.count('torch.Size') == 4


def test_snippets_of_a_card_of_four_channels(hub, run, tmp_path, monkeypatch):
    convert(run[0] / 'model_best.pth.tar', 'harm_resnet18', tmp_path / 'flowers', repo_id='me/flowers')
    publish(tmp_path / 'flowers', 'me/flowers')
    scope = run_snippets((tmp_path / 'flowers' / 'README.md').read_text())
    assert scope['classes'].shape == (1, 5)


def run_snippets(text):
    scope = {}
    blocks = [block.partition('```')[0] for block in text.split('```python\n')[1:]]
    assert len(blocks) == 4
    for block in blocks:
        exec(block, scope)
    assert not any(hasattr(module, 'fuse') for module in scope['plain'].modules())
    return scope


def test_a_whole_training_run_on_the_hub(hub, run, tmp_path):
    path, models = run
    convert(path / 'model_best.pth.tar', 'harm_resnet18', tmp_path / 'flowers', repo_id='me/flowers')
    publish(tmp_path / 'flowers', 'me/flowers', private=True)
    assert hub.repositories['me/flowers'].private
    assert same(create('hf-hub:me/flowers'), models[0], 4)
    fine_tuned = create('hf-hub:me/flowers', num_classes=3, in_chans=1)
    assert fine_tuned(torch.rand(1, 1, 96, 96)).shape == (1, 3)


def test_dry_run_writes_nothing(hub, folder, capsys):
    assert cli.main(['publish', str(folder), '--repo', ID, '--dry-run']) == 0
    assert 'dry run: nothing was uploaded' in capsys.readouterr().out
    assert hub.repositories == {}
    assert set(hub.paths('POST') + hub.paths('PUT')) == {'/api/validate-yaml'}


def test_publish_twice(hub, folder):
    publish(folder, ID)
    before = hub.repositories[ID].commits
    assert publish(folder, ID) == f'{hub.url}/{ID}'  # the same again is no conflict
    assert hub.repositories[ID].commits == before

    (folder / 'README.md').write_text((folder / 'README.md').read_text() + '\nMore.\n')
    with pytest.raises(InputError, match=r'holds other files: README\.md\. Nothing was uploaded'):
        publish(folder, ID)
    assert publish(folder, ID, create_pr=True) == f'{hub.url}/{ID}/discussions/1'
    assert b'More.' not in hub.repositories[ID].branches['main']['README.md']
    publish(folder, ID, force=True)
    assert b'More.' in hub.repositories[ID].branches['main']['README.md']


def test_repository_with_other_files(hub, folder):
    hub.add(ID, {'pytorch_model.bin': b'somebody else'})
    with pytest.raises(InputError, match=r'holds other files: pytorch_model\.bin'):
        publish(folder, ID)
    assert hub.repositories[ID].branches['main'].keys() == {'.gitattributes', 'pytorch_model.bin'}
    publish(folder, ID, force=True)
    assert hub.repositories[ID].branches['main']['pytorch_model.bin'] == b'somebody else'  # never deleted


def test_revision(hub, folder, released):
    publish(folder, ID, revision='v2')
    assert 'model.safetensors' not in hub.repositories[ID].branches['main']
    assert 'model.safetensors' in hub.repositories[ID].branches['v2']
    source = create(pretrained_cfg_overlay=dict(file=str(released)))
    assert same(create(f'hf-hub:{ID}@v2'), source)
    assert same(create(pretrained_cfg_overlay=dict(hf_hub_id=f'{ID}@v2')), source)
    assert publish(folder, ID, revision='v2')  # again


def test_private_does_not_make_a_public_repository_private(hub, folder):
    hub.add(ID, {})
    with pytest.raises(InputError, match='exists and is public'):
        publish(folder, ID, private=True)


def change(name, old, new):
    def apply(folder):
        path = folder / name
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    return apply


BAD_FOLDERS = {
    'no folder': (shutil.rmtree, 'is not a folder'),
    'no weights': (lambda f: (f / 'model.safetensors').unlink(), r'lacks model\.safetensors'),
    'no card': (lambda f: (f / 'README.md').unlink(), r'lacks README\.md'),
    'a pickle': (lambda f: (f / 'model.pth').write_bytes(b''), r'holds model\.pth; only'),
    'secrets': (lambda f: (f / '.env').write_text('HF_TOKEN=x'), r'holds \.env; only'),
    'damaged config': (lambda f: (f / 'config.json').write_text('{'), r'config\.json or README\.md .* is damaged'),
    'damaged weights': (lambda f: (f / 'model.safetensors').write_bytes(b'0' * 100), 'truncated or damaged'),
    'another model': (change('config.json', NAME, 'harm_resnet18'), 'does not fit the model'),
    'an unknown model': (change('config.json', NAME, 'harm_resnet19'), r'Unknown model \(harm_resnet19\)'),
    'licences': (
        change('README.md', 'license: bsd-3-clause', 'license: mit'),
        "says licence 'bsd-3-clause', README.md 'mit'",
    ),
    'another place': (
        change('README.md', f'hf-hub:{ID}', 'hf-hub:me/mine'),
        r'README\.md loads hf-hub:me/mine, but .* --repo',
    ),
    'another place in double quotes': (
        lambda f: (f / 'README.md').write_text((f / 'README.md').read_text() + '\ncreate_model("hf-hub:me/mine").\n'),
        r'README\.md loads hf-hub:me/mine, but',
    ),
    'a part of a network': (
        change('config.json', '"model_args": {', '"model_args": {"features_only": true, '),
        r'cannot run on an image as its config\.json says|no network can be made',
    ),
    'front matter': (
        lambda f: [change(name, 'bsd-3-clause', 'nonsense')(f) for name in ('README.md', 'config.json')],
        'the Hub does not accept the front matter .*known licences',
    ),
}


@pytest.mark.parametrize('what', BAD_FOLDERS)
def test_folders_that_are_not_published(hub, folder, what):
    damage, words = BAD_FOLDERS[what]
    damage(folder)
    with pytest.raises((InputError, CheckpointError, RuntimeError), match=words):
        publish(folder, ID)
    assert hub.repositories == {}


def test_places_that_a_card_may_name(hub, folder):
    """In double quotes, and at the end of a sentence."""
    text = (folder / 'README.md').read_text()
    (folder / 'README.md').write_text(f'{text}\ncreate_model("hf-hub:{ID}"). It is hf-hub:{ID}.\n')
    publish(folder, ID)


def test_messages_name_the_users_folder(hub, folder):
    (folder / '.DS_Store').touch()
    with pytest.raises(InputError, match=re.escape(f'{str(folder)!r} holds .DS_Store')):
        publish(folder, ID)


def test_list(capsys, monkeypatch):
    monkeypatch.setenv('COLUMNS', '80')
    assert cli.main(['list']) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split() for line in lines if line.startswith('harm') and ' M ' in line}
    assert set(rows) == set(timm.list_models('harm*', exclude_filters='harmonized'))
    assert rows['harm_resnet50_progressive'][1:] == ['19.7', 'M', '7x7/2', 'avg', 'all', 'all', '3', '2']
    assert rows['harm_resnet50'][1:] == ['25.6', 'M', '7x7/4', 'all', 'ulicny_in1k']
    assert max(len(line.rstrip()) for line in lines if ' M ' in line) <= 80
    assert '  timm-harmonic/harm_resnet50.ulicny_in1k on the Hugging Face Hub,' in lines


def test_list_as_json(capsys):
    assert cli.main(['list', '--json']) == 0
    entries = {entry['model']: entry for entry in json.loads(capsys.readouterr().out)}
    assert entries['harm_resnet50_progressive']['parameters'] == 19658792
    assert entries['harm_resnet50_progressive']['levels'] == [None, None, 3, 2]
    assert entries['harm0_resnet50'] == dict(
        model='harm0_resnet50', parameters=25557032, stem='7x7/4 plain', levels=[], weights=[]
    )
    (weights,) = entries['harm_resnet101']['weights']
    assert weights['hub'] == 'timm-harmonic/harm_resnet101.ulicny_in1k'
    assert weights['url'].endswith('harm_resnet101-62e185b1.pth')
    assert weights['pinned'] is False


def test_a_run_that_began_from_another_file(run, tmp_path):
    """Its checkpoint is what is published, whatever the run's options name."""
    path, models = run
    copy = tmp_path / 'copy'
    shutil.copytree(path, copy)
    torch.save(dict(state_dict=models[1].state_dict()), copy / 'other.pth')
    options = yaml.safe_load((copy / 'args.yaml').read_text())
    options['model_kwargs']['checkpoint_path'] = str(copy / 'other.pth')
    (copy / 'args.yaml').write_text(yaml.safe_dump(options))
    convert(copy / 'model_best.pth.tar', 'harm_resnet18', tmp_path / 'out')
    assert same(create(f'local-dir:{tmp_path / "out"}'), models[0], 4)
    assert 'checkpoint_path' not in (tmp_path / 'out' / 'config.json').read_text()
    kwargs = dict(checkpoint_path=str(copy / 'other.pth'))
    with pytest.raises(InputError, match='checkpoint_path is no option of a network'):
        convert(copy / 'model_best.pth.tar', 'harm_resnet18', tmp_path / 'again', model_kwargs=kwargs)


def test_runs_with_slips(run, tmp_path):
    """A row of summary.csv that is too long, a pool that timm does not know, and a link."""
    path, _ = run
    copy = tmp_path / 'copy'
    shutil.copytree(path, copy)
    (copy / 'summary.csv').write_text('epoch,eval_top1\n7,61.8,3,4\n')
    convert(copy / 'model_best.pth.tar', 'harm_resnet18', tmp_path / 'out')
    assert 'eval_top1: 61.800' in (tmp_path / 'out' / 'README.md').read_text()
    for text, words in (
        ('epoch,eval_top1\n7,91.2%\n', r'summary\.csv has a figure that is no number in epoch 7'),
        (f'epoch,eval_top1\n7,{"9" * 200_000}\n', r'summary\.csv is damaged'),
    ):
        (copy / 'summary.csv').write_text(text)
        with pytest.raises(InputError, match=words):
            convert(copy / 'model_best.pth.tar', 'harm_resnet18', tmp_path / 'again')
    shutil.copyfile(path / 'summary.csv', copy / 'summary.csv')
    options = (copy / 'args.yaml').read_text()
    (copy / 'args.yaml').write_text(options + 'input_size: [4, 64, 64]\n')  # as from the command line; img_size is 96
    convert(copy / 'model_best.pth.tar', 'harm_resnet18', tmp_path / 'sized')
    assert create(f'local-dir:{tmp_path / "sized"}').pretrained_cfg['input_size'] == (4, 64, 64)
    for line, words in (
        ('model_kwargs: [depth=10]\n', r'args\.yaml has model_kwargs .*NAME: VALUE'),
        ('x: 2024-13-45\n', r'args\.yaml is damaged'),
    ):
        (copy / 'args.yaml').write_text(options + line)
        with pytest.raises(InputError, match=words):
            convert(copy / 'model_best.pth.tar', 'harm_resnet18', tmp_path / 'again')
    (copy / 'args.yaml').write_text(options)
    with pytest.raises(InputError, match='leave features_only out'):
        convert(copy / 'model_best.pth.tar', 'harm_resnet18', tmp_path / 'again', model_kwargs=dict(features_only=True))
    (copy / 'args.yaml').write_text((copy / 'args.yaml').read_text() + 'gp: zzz\n')
    with pytest.raises(InputError, match=r"harm_resnet18 cannot be built with .*global_pool='zzz'"):
        convert(copy / 'model_best.pth.tar', 'harm_resnet18', tmp_path / 'again')
    shutil.copyfile(path / 'args.yaml', copy / 'args.yaml')
    (copy / 'summary.csv').rename(tmp_path / 'elsewhere.csv')
    (copy / 'summary.csv').symlink_to(tmp_path / 'elsewhere.csv')
    with pytest.raises(InputError, match=r'summary\.csv is a symbolic link'):
        convert(copy / 'model_best.pth.tar', 'harm_resnet18', tmp_path / 'again')
    assert not (tmp_path / 'again').exists()


def test_no_licence_that_nobody_chose(run, tmp_path):
    """And without --repo the card loads the folder itself."""
    path, _ = run
    convert(path / 'model_best.pth.tar', 'harm_resnet18', tmp_path / 'flowers')
    card = ModelCard.load(tmp_path / 'flowers' / 'README.md')
    assert card.data.license is None
    assert 'icense' not in card.text
    assert "create_model('local-dir:flowers'" in card.text
    assert 'hf-hub' not in card.text
    assert json.loads((tmp_path / 'flowers' / 'config.json').read_text())['pretrained_cfg'].get('license') is None


def test_a_card_without_classes_and_of_an_odd_place(tmp_path):
    """Its Python parses, and takes what the network gives."""
    model = timm.create_model(NAME, num_classes=0, channels=(8, 8, 8, 8))
    torch.save(model.state_dict(), tmp_path / 'features.pth')
    out = tmp_path / "it's"
    convert(tmp_path / 'features.pth', NAME, out, model_kwargs=dict(channels=(8, 8, 8, 8)))
    text = ModelCard.load(out / 'README.md').text
    blocks = re.findall(r'```python\n(.*?)```', text, re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        compile(block, 'card', 'exec')
    assert 'softmax' not in text
