"""Small tasks that need no download but packages: those to choose options on, and those to evaluate the choice on."""

from .base import Task
from .design import DESIGN
from .evaluation import EVALUATION

TASKS = DESIGN  # what benchmarks.small_data runs

__all__ = ['DESIGN', 'EVALUATION', 'TASKS', 'Task']
