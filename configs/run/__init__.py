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
    logs/attempt-N/       every rank, its own         what it prints, and what a crash or a hang leaves
    code/, slurm/         launch submit, job.sh       the snapshot of the code; scripts, Slurm's words

A file has one writer at a time. Readers (`launch status`, the chain, the next attempt) only read.
"""
