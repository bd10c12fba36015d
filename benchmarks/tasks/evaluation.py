"""Evaluation tasks, on which nothing is chosen: see small_data_plan.md. `requirements.txt` lists their packages."""

from . import captures, drawings
from .base import Task

EVALUATION = {
    'icons': Task('icons across sets of icons', drawings.icons, tuple(drawings.ICONS), 'zoom', (5,), flip=False),
    'letters': Task(
        'capitals across typefaces', drawings.letters, tuple(drawings.LETTERS), 'shift', (5, 10), flip=False
    ),
    'typefaces': Task('typefaces across letters', drawings.typefaces, drawings.TYPEFACES, 'shift', (5, 10), flip=False),
    'leaves': Task('silhouettes of leaves', drawings.leaves, drawings.LEAVES, 'zoom', (10,)),
    'surfaces': Task(
        'surfaces in colour, rotation and light', captures.surfaces, tuple(captures.SURFACES), 'zoom', (5, 10)
    ),
    'cells': Task('cells under microscopes', captures.cells, tuple(captures.CELLS), 'shift', (10, 20)),
    'brains': Task('slices of brains', captures.brains, tuple(captures.SLABS), 'shift', (5, 10)),
    'land': Task('land use, thirteen bands', captures.land_use, captures.LAND, 'shift', (10,)),
    'handwriting': Task(
        'handwritten digits', captures.handwriting, tuple('0123456789'), 'shift', (10, 20, 50), flip=False
    ),
    'drums': Task('spectrograms of percussion', captures.drums, tuple(captures.DRUMS), 'shift', (5,), flip=False),
}
