"""Work off the cluster: pack, index, export, caption; tools/sandbox has a real S3 server for this machine."""
