"""What a run leaves behind in its folder, and everybody reads.

    path in the folder    written by                  when
    config.next.yaml      launch train, submit        before an attempt starts (proposal.py)
    config.yaml           rank 0                      when the attempt has accepted it
    leases/attempt-N      whoever starts the attempt  before its ranks; deleted by the next one (lease.py)
    events/*.jsonl        every process, its own      whenever something happens (events.py, ledger.py)
    quarantine/*.jsonl    every rank, its own         when a sample cannot be used (quarantine.py)
    audit/*.jsonl         every rank, its own         before a step is taken, with `data.audit`
    base/                 rank 0                      at the first start, before training changes anything
    checkpoints/step-N    every rank, a file each     in the background; rank 0 names the folder
    tensorboard/          rank 0                      with the points of the curves
    trackers/             rank 0, its own             with the points of the curves (`monitor.trackers`)
    logs/attempt-N/       every rank, its own         what it prints, and what a crash or a hang leaves
    code/, pretrained/    launch submit               its jobs' code; the model, if it came from a hub
    slurm/                launch submit, job.sh       scripts, what Slurm says of jobs; `stop`: launch stop

Two processes never append to one file. How an attempt ended is written by whoever finds out: the one that
started it, or the next one.
"""
