"""Jobs: what a signal means to a running rank."""
