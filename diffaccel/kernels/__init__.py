"""Edits that recompute only what changed: regions, kept features, and hooks that run Diffusers' networks on them."""

from diffaccel.kernels.config import SparseEditConfig as SparseEditConfig
from diffaccel.kernels.engine import Handle as Handle
from diffaccel.kernels.engine import apply_sparse_edit as apply_sparse_edit
from diffaccel.kernels.pipeline import SparseEditPipeline as SparseEditPipeline
from diffaccel.kernels.region import Region as Region
from diffaccel.kernels.region import difference_mask as difference_mask
from diffaccel.kernels.region import read_mask as read_mask
from diffaccel.kernels.report import EditReport as EditReport
