"""Cache projectors trained by gradients through `project_kv` and `merged_attention`, starting from a fit.

projector = train_projector(sharer, receiver, fitted, Examples(texts), ..., options=TrainOptions(minutes=60))
"""

from c2c_kernels.training.examples import Asked
from c2c_kernels.training.material import Examples
from c2c_kernels.training.options import TrainOptions
from c2c_kernels.training.train import Progress, train_projector

__all__ = ["Asked", "Examples", "Progress", "TrainOptions", "train_projector"]
