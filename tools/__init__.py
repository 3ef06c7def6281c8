"""Work off the cluster: pack, stage, index, inspect, export and caption; a demo, benchmarks, and a sandbox
with a real S3 server and a real Slurm cluster on this machine."""
