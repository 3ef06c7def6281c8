"""Real services for this machine alone: an S3 server, a Slurm cluster."""
