"""Small tasks that need no download but packages: those to choose options on, and those to evaluate the choice on."""

from .base import Task
from .design import DESIGN
from .evaluation import EVALUATION

__all__ = ['DESIGN', 'EVALUATION', 'Task']
