"""Where and how a run is started. May import `configs` only, never torch; starts the other packages by module name.

Start at `cli.py`, the `millstream` command.
"""
