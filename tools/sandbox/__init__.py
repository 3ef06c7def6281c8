"""What Earwitness needs to be tried on one machine: a real S3 server, a proxy that breaks its answers, a real
Slurm cluster, sounds with captions, and small Whispers."""
