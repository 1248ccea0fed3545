"""Several devices for one video: the layout, the groups of processes, and what each scheme does to a model."""

from kinetoscope.parallel.config import ParallelConfig
from kinetoscope.parallel.groups import Groups

__all__ = ["Groups", "ParallelConfig"]
