"""Tables, plots and picture grids, as files."""
