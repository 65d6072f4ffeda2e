"""Where a trajectory begins: three optional replacements of the pure noise that pipelines draw.

Each makes a tensor for `latents=` of a stock pipeline and leaves pipeline, network and scheduler as they are. See
docs/starts.md for what was measured.
"""

from diffaccel.starts.oms import one_more_step
from diffaccel.starts.pruned import data_sparse_axes, pruned_gaussian
from diffaccel.starts.search import SelectedNoise, select_initial_noise

__all__ = ["SelectedNoise", "data_sparse_axes", "one_more_step", "pruned_gaussian", "select_initial_noise"]
