"""Structured pruning of Diffusers networks: exact cuts, folders that `from_pretrained` opens."""

from diffaccel.pruning.budgets import allocate as allocate
from diffaccel.pruning.calibration import Calibration as Calibration
from diffaccel.pruning.calibration import random_calls as random_calls
from diffaccel.pruning.calibration import record as record
from diffaccel.pruning.checkpoint import load_model as load_model
from diffaccel.pruning.checkpoint import open_checkpoint as open_checkpoint
from diffaccel.pruning.controlnet import fit_controlnet as fit_controlnet
from diffaccel.pruning.criteria import score as score
from diffaccel.pruning.find import find_groups as find_groups
from diffaccel.pruning.gates import gate as gate
from diffaccel.pruning.groups import DEPTH as DEPTH
from diffaccel.pruning.groups import WIDTH as WIDTH
from diffaccel.pruning.groups import Group as Group
from diffaccel.pruning.groups import Groups as Groups
from diffaccel.pruning.groups import Site as Site
from diffaccel.pruning.inputs import example_inputs as example_inputs
from diffaccel.pruning.lora import remap_lora as remap_lora
from diffaccel.pruning.plan import PruningPlan as PruningPlan
from diffaccel.pruning.prune import Pruned as Pruned
from diffaccel.pruning.prune import propose as propose
from diffaccel.pruning.prune import prune as prune
from diffaccel.pruning.surgery import cut as cut
from diffaccel.pruning.surgery import mask as mask
from diffaccel.pruning.write import write_checkpoint as write_checkpoint
