"""hpsearch: from a PyTorch model and its data to the best ensemble, in MLflow."""

from hpsearch.task import Report, Splits, Task, Trial

__version__ = "0.1.0"
__all__ = ["Report", "Splits", "Task", "Trial", "__version__"]
