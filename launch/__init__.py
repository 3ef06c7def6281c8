"""The command line, local processes, and the worker that every rank runs."""
