"""Write a folder for timm and the Hugging Face Hub from a checkpoint.

Writes model.safetensors, config.json and a model card from an authors' file, a checkpoint of timm's train.py,
or a state dict of your own. args.yaml and summary.csv beside the checkpoint tell how it was trained; they are
copied. For a state dict of your own training loop, say how the loop prepared images (--mean and the like).
The folder is loaded again, and must give the same outputs as the checkpoint on random images. Example:

  timm-harmonic convert output/train/RUN/model_best.pth.tar --model harm_resnet50 --out folder
"""

import argparse
import json
from pathlib import Path

from . import PREPARATION, add_shared, preparation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('checkpoint', type=Path, metavar='CHECKPOINT', help='the file: .pth, .pth.tar or .safetensors')
    add('--model', required=True, metavar='NAME', help='architecture, see `timm-harmonic list`')
    add('--out', type=Path, required=True, metavar='DIR', help='folder to write, new or empty')
    add_shared(parser, '--use-ema', '--model-kwargs', *PREPARATION, '--class-names', '--repo')
    add('--dataset', default='', metavar='ID', help='training data on the Hub, for the card')
    add('--license', default='', metavar='ID', help="of the weights (default: the authors' for theirs, else none)")


def run(args: argparse.Namespace) -> None:
    from timm_harmonic.export.folder import convert

    card = dict(repo_id=args.repo, class_names=args.class_names, license=args.license, dataset=args.dataset)
    network = dict(use_ema=args.use_ema, model_kwargs=args.model_kwargs, data_config=preparation(args))
    files = convert(args.checkpoint, args.model, args.out, **network, **card)
    cfg = json.loads((args.out / 'config.json').read_text(encoding='utf-8'))['pretrained_cfg']
    print(f'{args.out} gives the outputs of {args.checkpoint}:')
    for path in files:
        print(f'  {path.name:<19} {path.stat().st_size:>13,} bytes')
    size, notes = ' x '.join(map(str, cfg['input_size'][1:])), ', '.join(cfg.get('notes') or [])
    print(f'Images: {size}, crop {cfg["crop_pct"]}, mean {cfg["mean"]}, std {cfg["std"]} {notes}'.rstrip())
    if any(path.name == 'train_hparams.yaml' for path in files):
        print("train_hparams.yaml holds the run's options and its paths: read it before you upload it.")
    print(f'To upload it: hf upload {args.repo or "ORG/NAME"} {args.out}')
