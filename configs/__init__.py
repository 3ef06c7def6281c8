"""What a run is told: every setting (schema), how a YAML file becomes a config (load), and the files; and, in
`configs/run`, what a run leaves behind."""
