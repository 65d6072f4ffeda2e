"""Trajectory policies: which network runs at which step of a pipeline."""

from diffaccel.samplers.policy.attach import Handle, attach, attached
from diffaccel.samplers.policy.plan import FULL, Grid, Plan, Policy
from diffaccel.samplers.policy.spent import Report

__all__ = ["FULL", "Grid", "Handle", "Plan", "Policy", "Report", "attach", "attached"]
