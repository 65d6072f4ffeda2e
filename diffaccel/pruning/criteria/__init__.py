"""Criteria: which units a network misses least. Each returns a score for every unit, higher = keep."""

from diffaccel.pruning.criteria.activation import activation as activation
from diffaccel.pruning.criteria.evenly_spaced import evenly_spaced as evenly_spaced
from diffaccel.pruning.criteria.flap import flap as flap
from diffaccel.pruning.criteria.flap import means as means
from diffaccel.pruning.criteria.magnitude import magnitude as magnitude
from diffaccel.pruning.criteria.named import CALIBRATED as CALIBRATED
from diffaccel.pruning.criteria.named import CRITERIA as CRITERIA
from diffaccel.pruning.criteria.named import score as score
from diffaccel.pruning.criteria.random import random as random
from diffaccel.pruning.criteria.scores import Scores as Scores
from diffaccel.pruning.criteria.taylor import taylor as taylor
