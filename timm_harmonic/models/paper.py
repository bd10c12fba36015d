"""The paper's results on ImageNet-1k, which configs, cards and the documentation use. We re-measured none.

paper.csv has a network of arXiv:2001.06570 in each row; errors in percent on the validation set, one crop at 224, or at
224 / 320; gmacs, in billions at 224, were counted on the authors' networks; `page` is their folder with it.
"""

import csv
from pathlib import Path
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

REPOSITORY = 'https://github.com/matej-ulicny/harmonic-networks'


_TABLE = Path(__file__).with_name('paper.csv').read_text(encoding='utf-8').splitlines()
PAPER: dict[str, dict[str, str]] = {row['model']: row for row in csv.DictReader(_TABLE)}


def notes_of(row: dict[str, str]) -> tuple[str, ...]:
    """Describes a row for a config's notes."""
    top1, top5 = (row[key].replace(' / ', ' at 224, ') + ' at 320' * ('/' in row[key]) for key in ('top1', 'top5'))
    errors = f'paper: top-1 error {top1} %, top-5 error {top5} % ({REPOSITORY}/tree/master/{row["page"]})'
    return tuple(filter(None, (errors, row['remark'], 'not re-measured')))


def paper_cfg(first_conv: str, classifier: str, **kwargs: Any) -> dict[str, Any]:
    """timm's pretrained config of the paper's networks, with `kwargs` added or replaced."""
    common: dict[str, Any] = dict(
        num_classes=1000,
        input_size=(3, 224, 224),
        pool_size=(7, 7),
        crop_pct=0.875,
        interpolation='bilinear',
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        first_conv=first_conv,
        classifier=classifier,
        license='bsd-3-clause',
        origin_url=REPOSITORY,
        paper_name='Harmonic Convolutional Networks based on Discrete Cosine Transform',
        paper_ids='arXiv:2001.06570',
    )
    return {**common, **kwargs}
