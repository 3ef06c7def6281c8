"""Jobs: script and submission, what a rank knows of its job, signals, the chain of attempts, the watchdog."""
