"""Drop-in Diffusers schedulers: noise schedule, time grid, solver and adapter, never mixed (see docs/concepts.md)."""
