"""What a run is: one YAML file, one typed schema.

`schema.py` is the list of every setting there is; `load.py` merges defaults <- YAML <- `key.sub=value` and reports
all faults at once. Imports nothing of the other packages. Start reading at `schema.py`.
"""
