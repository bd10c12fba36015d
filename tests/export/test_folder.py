"""Folders of Hub repositories: from checkpoints and networks, loaded again, and what is refused."""

import json
import os
import re
import resource
import shutil
import sys
from argparse import Namespace

import PIL.Image
import pytest
import reference
import safetensors.torch
import timm
import tiny_models
import torch
import yaml
from huggingface_hub import ModelCard
from timm.layers import DropPath
from tiny_models import FILE, NAME, create, same

import timm_harmonic_cli as cli
from timm_harmonic.common import InputError
from timm_harmonic.common.images import noted_scale
from timm_harmonic.common.progress import progress
from timm_harmonic.export.card import Provenance, model_card
from timm_harmonic.export.folder import FILES, convert, load_network, write_folder
from timm_harmonic.models.checkpoints import CheckpointError
from timm_harmonic.models.weights import sha256_of


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
        kwargs = dict(layers=(1, 1, 1, 1), channels=(8, 16, 16, 16), levels=(None, None, 3, 2), stem_pool='avg')
        models.append(
            reference.randomize_batch_norm(timm.create_model('harm_resnet18', in_chans=4, num_classes=5, **kwargs))
        )
    options = dict(
        model='harm_resnet18',
        model_kwargs=dict(layers=[1, 1, 1, 1], channels=[8, 16, 16, 16], levels=[None, None, 3, 2], stem_pool='avg'),
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
    assert sha256_of(released) in text
    assert "the figures are the paper's\n  - paper: nothing" in text
    model = create(pretrained_cfg_overlay=dict(file=str(released)))
    assert f'Params (M): {sum(p.numel() for p in model.parameters()) / 1e6:.2f}' in text
    for heading in ('Model Details', 'Model Usage', 'Feature maps', 'Embeddings', 'Citation'):
        assert f'# {heading}\n' in text
    assert 'Compressed' not in text


@pytest.mark.parametrize(
    ('name', 'original', 'responses'),
    [
        ('harm_resnet50', 4.02, 3 * 49 * 7 * 7 * 56 * 56),
        ('harm_resnet50_avgpool', 4.18, 3 * 49 * 7 * 7 * 112 * 112),
    ],
)
def test_multiply_adds_are_those_of_the_originals(name, original, responses):
    """Counted on the authors' networks at 224 x 224, which compute the stem's responses one by one."""
    text = model_card(timm.create_model(name, device='meta'), 'hf-hub:a/b', Provenance()).text
    gmacs = float(re.search(r'GMACs: ([\d.]+)', text).group(1))
    assert gmacs + responses / 1e9 == pytest.approx(original, abs=0.011)


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
    assert ('averaged weights (EMA)' in text) is averaged
    assert 'images of 4 channels' in text
    assert '**Compressed:**' in text
    assert 'paper' not in text.partition('## Model Usage')[0].replace('Papers:', '')
    assert "create_model('hf-hub:me/flowers'" in text


def test_options_in_the_checkpoint_itself(run, tmp_path):
    """As newer train.py scripts save them. No other class than that of the options is loaded."""
    path, models = run
    content = torch.load(path / 'model_best.pth.tar', weights_only=True)
    content['args'] = Namespace(**yaml.safe_load((path / 'args.yaml').read_text()))
    torch.save(content, tmp_path / 'alone.pth.tar')
    convert(tmp_path / 'alone.pth.tar', 'harm_resnet18', tmp_path / 'out')
    assert same(create(f'local-dir:{tmp_path / "out"}'), models[0], 4)


SMALL = dict(layers=(1, 1, 1, 1), channels=(8, 16, 16, 16))
MOBILE = dict(base_model='mobilenetv3_small_050')
OPTIONS = {  # of train.py: the network, its model_kwargs, other options, and what train.py makes of those
    'bn_eps': ('harmonized', MOBILE, dict(bn_eps=0.01, bn_momentum=0.02), dict(bn_eps=0.01, bn_momentum=0.02)),
    'bn_tf': ('harmonized', MOBILE, dict(bn_tf=True), dict(bn_eps=1e-3, bn_momentum=0.01)),
    'plain': ('mobilenetv3_small_050', {}, dict(bn_eps=0.01), dict(bn_eps=0.01)),
    'gp': ('harm_resnet18', SMALL, dict(gp='max'), dict(global_pool='max')),
    'drop': ('harm_resnet18', SMALL, dict(drop=0.3, drop_path=0.2), dict(drop_rate=0.3, drop_path_rate=0.2)),
    'model_kwargs': ('harm_resnet18', dict(SMALL, act_layer='silu', output_stride=8), {}, {}),
    'input_size': ('harm_resnet18', SMALL, dict(input_size=[4, 32, 48], img_size=64), dict(in_chans=4)),
}


@pytest.mark.parametrize(
    ('what', 'saved_args'), [*((key, False) for key in OPTIONS), ('gp', True), ('input_size', True)]
)
def test_every_option_of_a_run_reaches_the_network(tmp_path, what, saved_args):
    """In convert, and in the loader of predict and compress."""
    name, model_kwargs, options, kwargs = OPTIONS[what]
    torch.manual_seed(0)
    trained = timm.create_model(name, **model_kwargs, **kwargs, num_classes=3)
    reference.randomize_batch_norm(trained).eval()
    defaults = dict(num_classes=3, drop=0.0, gp=None, bn_eps=None, scale=[0.08, 1.0], split_bn=False)
    args = {**defaults, 'model': name, 'model_kwargs': json.loads(json.dumps(model_kwargs)), **options}
    content = dict(state_dict=trained.state_dict(), **(dict(args=Namespace(**args)) if saved_args else {}))
    torch.save(content, tmp_path / 'last.pth.tar')
    if not saved_args:
        (tmp_path / 'args.yaml').write_text(yaml.safe_dump(args))
    networks = [load_network(name, tmp_path / 'last.pth.tar')[1]]
    if name.startswith('harm'):
        convert(tmp_path / 'last.pth.tar', name, tmp_path / 'folder')
        networks.append(create(f'local-dir:{tmp_path / "folder"}'))
    for network in networks:
        assert same(network, trained, kwargs.get('in_chans', 3))
        assert norms(network) == norms(trained)
    assert drops(networks[0]) == drops(trained)  # timm leaves them out of folders: the next training run sets its own
    if what == 'input_size':
        assert tuple(networks[-1].pretrained_cfg['input_size']) == (4, 32, 48)


def norms(network):
    return [(m.eps, m.momentum) for m in network.modules() if hasattr(m, 'running_var')]


def drops(network):
    return network.drop_rate, [m.drop_prob for m in network.modules() if isinstance(m, DropPath)]


def test_options_that_contradict_the_checkpoint(run, tmp_path):
    path, models = run
    options = yaml.safe_load((path / 'args.yaml').read_text())
    for changes, words in (
        (dict(num_classes=7), 'has num_classes=5, not 7'),
        (dict(model='local-dir:elsewhere'), 'was trained as local-dir:elsewhere'),
        (dict(bn_eps=0.1), 'cannot be created with .*bn_eps=0.1'),
        (dict(std=[0.0, 1, 1, 1]), 'std must be finite numbers above 0'),
        (dict(std='a'), "std must be finite numbers above 0, got 'a'"),
        (dict(img_size='64'), 'does not say how to prepare images'),
        (dict(img_size=0), 'cannot be saved for such images'),
        (dict(mean=[0.1, 0.2]), r'mean has 2 values, the network takes 4 channels'),
    ):
        (path / 'args.yaml').write_text(yaml.safe_dump({**options, **changes}))
        with pytest.raises(InputError, match=words):
            convert(path / 'model_best.pth.tar', 'harm_resnet18', tmp_path / 'out')
    (path / 'args.yaml').write_text(yaml.safe_dump({**options, 'split_bn': True}))
    state = timm.layers.convert_splitbn_model(models[0]).state_dict()
    torch.save(dict(state_dict=state), path / 'split.pth.tar')
    with pytest.raises(CheckpointError, match=r'unexpected: .*aux_bn.* trained with --split-bn: save it without'):
        convert(path / 'split.pth.tar', 'harm_resnet18', tmp_path / 'out')


def test_the_config_is_that_of_the_tag(tmp_path):
    """Its crop and interpolation were used in training."""
    torch.save(dict(state_dict=timm.create_model('resnet18', num_classes=3).state_dict()), tmp_path / 'last.pth.tar')
    (tmp_path / 'args.yaml').write_text('model: resnet18.tv_in1k\n')
    for name in ('resnet18', 'resnet18.tv_in1k'):
        cfg = load_network(name, tmp_path / 'last.pth.tar')[1].pretrained_cfg
        assert (cfg['interpolation'], cfg['crop_pct']) == ('bilinear', 0.875)


def test_a_state_dict_of_ones_own_loop(tmp_path, capsys):
    """How its images were prepared is said on the command line, and stays with the folder."""
    torch.manual_seed(0)
    model = reference.randomize_batch_norm(timm.create_model('harm_resnet18', **SMALL, in_chans=2, num_classes=3))
    torch.save({f'net.{key}': value for key, value in model.eval().state_dict().items()}, tmp_path / 'own.pth')
    (tmp_path / 'classes.txt').write_text('a\nb\nc\n')
    command = ['convert', str(tmp_path / 'own.pth'), '--model', 'harm_resnet18', '--out', str(tmp_path / 'out')]
    command += ['--model-kwargs', 'layers=(1,1,1,1)', 'channels=(8,16,16,16)']
    images = ['--mean', '0.2', '--std', '0.1', '0.3', '--img-size', '48', '--scale', '10000']
    for wrong, words in (
        (['--mean', '1', '2', '3'], 'mean has 3 values, the network takes 2 channels'),
        (['--std', '0'], 'std must be finite numbers above 0, got [0.0]'),
        (['--mean', 'nan'], 'must be finite'),
    ):
        assert cli.main([*command, *images, *wrong]) == 1
        assert words in capsys.readouterr().err
        assert not (tmp_path / 'out').exists()
    assert cli.main([*command, *images, '--class-names', str(tmp_path / 'classes.txt')]) == 0
    assert 'Images: 48 x 48, crop 1.0, mean [0.2, 0.2], std [0.1, 0.3] scale: 10000.0' in capsys.readouterr().out
    loaded = create(f'local-dir:{tmp_path / "out"}')
    assert same(loaded, model, 2)
    cfg = loaded.pretrained_cfg
    assert (*cfg['mean'], *cfg['std']) == (0.2, 0.2, 0.1, 0.3)
    assert (tuple(cfg['input_size']), cfg['crop_pct']) == ((2, 48, 48), 1.0)
    assert noted_scale(cfg['notes']) == 10000
    assert cfg['label_names'] == ['a', 'b', 'c']
    assert 'Image values: divided by 10000' in (tmp_path / 'out' / 'README.md').read_text()
    # Other weights for the folder, and a folder from the folder: the scale stays.
    source, again = load_network(str(tmp_path / 'out'), tmp_path / 'own.pth')
    write_folder(again, tmp_path / 'again', source, progress(total=3))
    assert noted_scale(create(f'local-dir:{tmp_path / "again"}').pretrained_cfg['notes']) == 10000


def test_arguments_replace_the_options_of_a_run(run, tmp_path):
    path, _ = run
    with (path / 'args.yaml').open('a') as file:
        file.write('input_size: [4, 64, 96]\n')
    images = dict(mean=0.5, img_size=80, scale=255.0)
    convert(path / 'model_best.pth.tar', 'harm_resnet18', tmp_path / 'out', data_config=images)
    cfg = create(f'local-dir:{tmp_path / "out"}').pretrained_cfg
    assert tuple(cfg['input_size']) == (4, 80, 80)
    assert (*cfg['mean'], *cfg['std']) == (0.5,) * 8
    assert cfg['crop_pct'] == 0.9
    assert noted_scale(cfg['notes']) == 255


def test_files_for_everyone(run, tmp_path):
    """As far as the umask allows."""
    path, _ = run
    for mask, mode in ((0o022, 0o644), (0o027, 0o640)):
        before = os.umask(mask)
        try:
            files = convert(path / 'model_best.pth.tar', 'harm_resnet18', tmp_path / str(mask))
        finally:
            os.umask(before)
        assert {file.stat().st_mode & 0o777 for file in files} == {mode}
        assert (tmp_path / str(mask)).stat().st_mode & 0o777 == 0o777 & ~mask


CLAIMS = ('license', 'origin_url', 'url', 'hf_hub_id', 'tag', 'paper_ids', 'paper_name', 'description', 'notes')


@pytest.mark.parametrize(
    ('name', 'kwargs'),
    [('harm_resnet18', SMALL), ('harmonized', MOBILE), ('harmonized', dict(SMALL, base_model='resnet18.tv_in1k'))],
)
def test_own_weights_claim_nothing_of_others(tmp_path, name, kwargs):
    model = timm.create_model(name, num_classes=3, **kwargs)
    torch.save(model.state_dict(), tmp_path / 'own.pth')
    convert(tmp_path / 'own.pth', name, tmp_path / 'converted', model_kwargs=kwargs)
    write_folder(model.eval(), tmp_path / 'written', Provenance(base='a test'), progress(total=3))
    with pytest.warns(UserWarning, match='random weights'):
        random = load_network(name, model_kwargs=kwargs, random_weights=True)[1]
    for folder in ('converted', 'written'):
        config = json.loads((tmp_path / folder / 'config.json').read_text())
        assert not [key for key in CLAIMS if config['pretrained_cfg'].get(key)]
        assert 'releases' not in (tmp_path / folder / 'README.md').read_text()
    assert not [key for key in CLAIMS if random.pretrained_cfg.get(key)]


def test_claims_of_weights_with_a_licence_stay(tmp_path):
    """Those of timm's weights, which a caller hands on with their licence."""
    model = timm.create_model('resnet18', **SMALL).eval()
    write_folder(
        model, tmp_path / 'out', Provenance(base="resnet18 (timm's weights)"), progress(total=3), license='mit'
    )
    cfg = json.loads((tmp_path / 'out' / 'config.json').read_text())['pretrained_cfg']
    assert (cfg['license'], cfg['tag']) == ('mit', 'a1_in1k')


UNUSUAL = {
    'plain': ('resnet18', SMALL),
    'harm0': ('harm_resnet18', dict(SMALL, stem_pool='max', harmonic_stem=False, harmonic_blocks=False)),
    'blocks': ('harm_resnet18', dict(SMALL, stem_pool='max', harmonic_stem=False)),
    'stem': ('harm_resnet18', dict(SMALL, stem_pool='max', harmonic_blocks=False)),
}


@pytest.mark.parametrize('what', UNUSUAL)
def test_networks_without_a_file(tmp_path, what):
    """With any number of channels, image size and preparation; the card says how to install and run each."""
    name, options = UNUSUAL[what]
    model = timm.create_model(name, num_classes=3, in_chans=5, **options)
    reference.randomize_batch_norm(model).eval()
    images = dict(img_size=32, mean=[0.1] * 5, std=[0.2] * 5, scale=2.5)
    about = dict(class_names=['a', 'b', 'c'], data_config=images)
    write_folder(model, tmp_path / 'best', Provenance(base='the best of a comparison'), progress(total=3), **about)
    loaded = create(f'local-dir:{tmp_path / "best"}')
    assert same(loaded, model, 5)
    assert tuple(loaded.pretrained_cfg['input_size']) == (5, 32, 32)
    assert noted_scale(loaded.pretrained_cfg['notes']) == 2.5
    text = (tmp_path / 'best' / 'README.md').read_text()
    assert ('pip install timm`' in text) is (what == 'plain')
    ours = ('timm-harmonic predict local-dir:best images/', '@article{Ulicny22', 'harmonic-networks')
    assert all((words in text) is (what != 'plain') for words in ours)
    assert 'divided by 2.5, then mean 0.1, 0.1, 0.1, 0.1, 0.1, standard deviation 0.2' in text
    assert images['scale'] == 2.5  # the caller's


def test_options_by_hand_and_class_names(run, tmp_path):
    _, models = run
    torch.save(models[0].state_dict(), tmp_path / 'weights.pth')
    (tmp_path / 'classes.txt').write_text('a\nb\nc\nd\ne\n')
    arguments = [str(tmp_path / 'weights.pth'), '--model', 'harm_resnet18', '--out', str(tmp_path / 'out')]
    options = ['--model-kwargs', 'layers=[1,1,1,1]', 'channels=[8,16,16,16]', 'levels=[None,None,3,2]', 'stem_pool=avg']
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
        (('page.pth', '--model', NAME), 'is a web page'),
        (('half.pth', '--model', NAME), 'truncated or damaged'),
        (('nan.pth', '--model', NAME), 'not finite'),
        (('run/model_best.pth.tar', '--model', 'harm_resnet34'), 'was trained as harm_resnet18'),
        (('damaged/weights.pth', '--model', NAME), 'args.yaml is damaged'),
        (('list/weights.pth', '--model', NAME), 'holds a list, not options'),
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
    with pytest.raises(InputError, match='outputs of the folder and the checkpoint differ'):
        convert(released, NAME, tmp_path / 'out')
    assert list(tmp_path.iterdir()) == [released]


def test_folders_are_not_overwritten(folder, released):
    for out in (folder, released):
        with pytest.raises(InputError, match='is not an empty folder'):
            convert(released, NAME, out)
    shutil.rmtree(folder)
    folder.mkdir()
    assert convert(released, NAME, folder)


def test_snippets_of_the_card(hub, folder, tmp_path, monkeypatch, capsys):
    hub.add(f'timm-harmonic/{NAME}.ulicny_in1k', {path.name: path.read_bytes() for path in folder.iterdir()})
    monkeypatch.chdir(tmp_path)
    PIL.Image.new('RGB', (300, 260), 'teal').save('image.jpg')
    run_snippets((folder / 'README.md').read_text())
    assert capsys.readouterr().out.count('torch.Size') == 4


def run_snippets(text):
    scope = {}
    blocks = [block.partition('```')[0] for block in text.split('```python\n')[1:]]
    assert len(blocks) == 4
    for block in blocks:
        exec(block, scope)
    assert not any(hasattr(module, 'fuse') for module in scope['plain'].modules())
    return scope


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
    with pytest.raises(InputError, match='checkpoint_path is not an option of a network'):
        convert(copy / 'model_best.pth.tar', 'harm_resnet18', tmp_path / 'again', model_kwargs=kwargs)


def test_runs_with_slips(run, tmp_path):
    """Damaged options, and a pool that timm does not know."""
    path, _ = run
    copy = tmp_path / 'copy'
    shutil.copytree(path, copy)
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
    with pytest.raises(InputError, match=r"harm_resnet18 cannot be created with .*global_pool='zzz'"):
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


def test_ids_of_the_card(released, tmp_path):
    """What would not be one word in the front matter, or no place on the Hub."""
    for options, words in (
        (dict(license='My licence: mine'), "license 'My licence: mine' is not an id"),
        (dict(dataset='a\n- b'), 'is not an id of the Hugging Face Hub'),
        (dict(repo_id='a/b/c'), 'Repo id must be'),
    ):
        with pytest.raises(InputError, match=words):
            convert(released, NAME, tmp_path / 'out', **options)
    assert list(tmp_path.iterdir()) == [released]


def test_only_known_files(released, tmp_path):
    model = create(pretrained_cfg_overlay=dict(file=str(released)))
    source, steps = Provenance(base='a test'), progress(total=3)
    for add in (
        lambda folder: (folder / '.env').write_text('HF_TOKEN=x'),
        lambda folder: (folder / 'summary.csv').symlink_to(released),
    ):
        with pytest.raises(InputError, match=r"not fit for the Hub: files \['(\.env|summary\.csv)'\]"):
            write_folder(model, tmp_path / 'out', source, steps, add=add)
    write_folder(model, tmp_path / 'out', source, steps)
    assert {path.name for path in (tmp_path / 'out').iterdir()} <= set(FILES)


def test_a_full_disk(released, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(InputError, match='cannot be written'):
            convert(released, NAME, tmp_path / 'out')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == [released]


def test_networks_of_a_command(released, folder, run, tmp_path):
    """By a name with a checkpoint, by a folder with and without local-dir:, and by a folder with other weights."""
    expected = create(f'local-dir:{folder}')
    for name, checkpoint in ((NAME, released), (str(folder), None), (f'local-dir:{folder}', None)):
        source, model = load_network(name, checkpoint)
        assert same(model, expected)
        assert not model.training
        assert (source.file, source.base) == ((FILE, '') if checkpoint else ('', f'local-dir:{folder}'))
    path, models = run
    for use_ema in (False, True):
        source, model = load_network('harm_resnet18', path / 'model_best.pth.tar', use_ema=use_ema)
        assert same(model, models[use_ema], 4)
        assert (source.run['img_size'], source.averaged) == (96, use_ema)
    torch.save(dict(state_dict=expected.state_dict()), tmp_path / 'other.pth')
    assert same(load_network(str(folder), tmp_path / 'other.pth')[1], expected)


def test_networks_of_timm(hub):
    base = timm.create_model('mobilenetv3_small_050', num_classes=1000).eval()
    hub.add('timm/mobilenetv3_small_050.lamb_in1k', {'model.safetensors': safetensors.torch.save(base.state_dict())})
    source, model = load_network('mobilenetv3_small_050', pretrained=True)
    assert same(model, base)
    assert source.base == "mobilenetv3_small_050.lamb_in1k (timm's weights)"
    with pytest.raises(InputError, match='have 1000 classes, not 3'):
        load_network('mobilenetv3_small_050', pretrained=True, model_kwargs=dict(num_classes=3))
    with pytest.warns(UserWarning, match='resnet18 has random weights: pass --pretrained'):
        source, model = load_network('resnet18', model_kwargs=dict(num_classes=3), random_weights=True)
    assert source.base == 'resnet18 with random weights'
    assert model.num_classes == 3


def test_networks_that_cannot_be_loaded(hub, tmp_path):
    """Everything that a user can cause is an error of ours."""
    small = dict(layers=(1, 1, 1, 1), channels=(8, 8, 8, 8))
    torch.save(timm.create_model('harm_resnet18', **small).state_dict(), tmp_path / 'harmonic.pth')
    torch.save(timm.create_model('resnet18', **small).state_dict(), tmp_path / 'plain.pth')
    (tmp_path / 'empty').mkdir()
    harmonic, plain = tmp_path / 'harmonic.pth', tmp_path / 'plain.pth'
    larger = dict(channels=small['channels'])
    for arguments, kind, words in (
        (('resnet18',), InputError, 'resnet18 needs weights: pass --checkpoint FILE or --pretrained'),
        (('nonsense',), InputError, 'nonsense. is neither a folder'),
        (('nonsense', None, True), InputError, 'nonsense cannot be created: RuntimeError: Unknown model'),
        (('resnet18', None, True), InputError, 'resnet18 cannot be created: .*Not ?Found'),
        (('hf-hub:no/where',), InputError, 'hf-hub:no/where cannot be created'),
        ((str(tmp_path / 'empty'),), InputError, 'cannot be created: FileNotFoundError'),
        (('resnet18', tmp_path / 'nowhere.pth'), CheckpointError, 'no checkpoint at'),
        (('resnet18', tmp_path / 'empty'), CheckpointError, 'no checkpoint at .*Is a directory'),
        (('resnet18', harmonic, False, small), CheckpointError, r'wrong shape: conv1\.weight \(64, 3, 49, 1\)'),
        (('resnet34', plain, False, larger), CheckpointError, 'nothing was loaded.* missing: layer1'),
        (('resnet18', plain, False, dict(small, levls=3)), InputError, 'cannot be created with .*levls=3'),
    ):
        with pytest.raises(kind, match=words):
            load_network(*arguments)
