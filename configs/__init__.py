"""Settings: what there is to set (schema), how a YAML file becomes a RunConfig (load), and the folder of a
run (rundir)."""
