"""Early exit: time-dependent depth of the pipeline's own network."""

from diffaccel.samplers.policy.exits.depth import layers, shallow
from diffaccel.samplers.policy.exits.early_exit import early_exit
from diffaccel.samplers.policy.exits.fit import FittedExits, fit_exits
from diffaccel.samplers.policy.exits.linear import LinearExit
from diffaccel.samplers.policy.exits.predict import predict
from diffaccel.samplers.policy.exits.schedule import DepthSchedule

__all__ = ["DepthSchedule", "FittedExits", "LinearExit", "early_exit", "fit_exits", "layers", "predict", "shallow"]
