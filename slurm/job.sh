# One attempt of a chain. It needs bash and Slurm's commands; all Python runs in steps, so in the container where there is one.
# Set above: run, code, python, tasks (per node), resubmit, mail, srun_args. Arguments: the chain's first job (none: this one), and the job before this one.
me=$SLURM_JOB_ID chain=${1:-$SLURM_JOB_ID} before=${2:-} next='' asked=''
jobs=$run/slurm/jobs script=$run/slurm/job.sh
mkdir -p "$jobs"

say() { echo "$(date +%T) $*"; }

# What Slurm knows of a job goes into a file: it forgets it minutes after the job's end.
note() {
  local found
  found=$(scontrol --oneliner show job "$1" 2>/dev/null) ||
    found=$(sacct --noheader --allocations --parsable2 --jobs="$1" --format=State,ExitCode,NodeList 2>/dev/null |
      awk -F'|' '{print "JobState=" $1 " ExitCode=" $2 " NodeList=" $3}')
  if [ -n "$found" ]; then echo "$found" >"$jobs/.$1" && mv -f "$jobs/.$1" "$jobs/$1"; fi
}

state() { sed -n 's/.*JobState=\([A-Z_]*\).*/\1/p' "$jobs/$1" 2>/dev/null; }

# The next attempt is queued before anything can go wrong in this one. It starts if this one ends in any way but success.
queue_next() {
  local pause
  next=$(cat "$jobs/$me.next" 2>/dev/null)  # this job has been requeued
  if [ -n "$next" ] && squeue --noheader --job="$next" --states=PENDING 2>/dev/null | grep -q .; then return; fi
  for pause in 1 5 20 0; do
    # Without this job's variables, which would become options of the next one.
    next=$(
      for name in "${!SLURM_@}"; do [ "$name" = SLURM_CONF ] || unset "$name"; done
      sbatch --parsable --dependency="afternotok:$me" --kill-on-invalid-dep=yes "$script" "$chain" "$me"
    ) && next=${next%%;*} && echo "$next" >"$jobs/$me.next" && return
    sleep "$pause"
  done
  next=
  say "cannot queue the next attempt from $(hostname): does this cluster allow sbatch on compute nodes? Otherwise set slurm.resubmit=requeue"
  return 1
}

# Asks launch.attempt before and after the attempt; $2...: the job before and the nodes, or the exit code of the ranks.
judge() {
  local what=$1 usable own
  shift
  usable=$(sinfo --noheader --Node --partition="$SLURM_JOB_PARTITION" --states=idle,mixed,allocated,completing --format=%N | wc -l)
  read -r verdict attempt exclude delay < <(
    "${step[@]}" --overlap --nodes=1 --ntasks=1 --ntasks-per-node=1 "$python" -m launch.attempt "$what" "$run" "$chain" "$me" "$usable" "$@" | tail -n 1
  ) || verdict=failed
  if [ "$verdict" = stop ]; then
    end_chain
  elif [ "$verdict" = go ] && [ -n "$next" ] && [ "$exclude $delay" != "- 0" ]; then
    own=$(scontrol --oneliner show job "$next" | sed -n 's/.* ExcNodeList=\([^ ]*\) .*/\1/p')
    own=${own#(null)} exclude=${exclude#-}
    scontrol update JobId="$next" ExcNodeList="$own${own:+${exclude:+,}}$exclude" StartTime="now+$delay"
  fi
}

end_chain() {
  if [ -n "$next" ]; then scancel "$next"; fi
  if [ -n "$mail" ]; then scontrol update JobId="$me" MailType=END,FAIL MailUser="$mail"; fi
  resubmit=none
}

# A signal to the job reaches the ranks by itself; here it is only looked at what it means, while Slurm still knows.
trap 'asked=yes; note "$me"; if [ "$(state "$me")" = CANCELLED ]; then end_chain; fi' TERM

say "job $me of chain $chain${before:+, after job $before}, on $SLURM_JOB_NODELIST"
if [ -n "$before" ] && [ "$before" != "$me" ]; then note "$before"; fi
if [ "$resubmit" = chain ]; then
  if queue_next; then scontrol update JobId="$me" Requeue=0; else resubmit=requeue; fi
fi

# Attempts that do not even begin are counted here: nobody else can.
failed=$(($(cat "$jobs/failed" 2>/dev/null || echo 0) + 1))
echo "$failed" >"$jobs/failed"
if ((failed > 1)) && [ -n "$next" ]; then scontrol update JobId="$next" StartTime="now+$((60 * failed))"; fi
if ((failed > 3)); then
  say "$((failed - 1)) jobs in a row could not begin: their logs, beside this one, say why. The chain ends; \`launch submit\` begins another one"
  rm -f "$jobs/failed"
  end_chain
  exit 1
fi

@SETUP@
export PYTHONPATH=$code${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
step=(srun --kill-on-bad-exit=1 --wait=0 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} "${srun_args[@]}")

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
judge begin "${before:--}" "${nodes[@]}"
if [ -n "$asked" ]; then
  say "asked to end before the ranks have started"
  exit 1
elif [ "$verdict" = failed ]; then
  say "python -m launch.attempt failed on $(hostname), as said above"
  exit 1
fi
rm -f "$jobs/failed" "$jobs/$me"
[ "$verdict" = go ] || exit 1

say "attempt $attempt begins"
logs=$run/logs/attempt-$(printf %06d "$attempt")
mkdir -p "$logs"
"${step[@]}" --ntasks=$((SLURM_JOB_NUM_NODES * tasks)) --ntasks-per-node="$tasks" --output="${logs//%/%%}/rank-%5t.log" "$python" -m launch.worker "$run" "$attempt" &
ranks=$!
while wait "$ranks"; kill -0 "$ranks" 2>/dev/null; do :; done  # a trap ends `wait`, too
wait "$ranks"
code=$?
note "$me"
say "the ranks ended with code $code"
case $(state "$me") in
  CANCELLED) end_chain ;;
  RUNNING | '')
    judge end "$code"
    if [ -n "$next" ] && [ "$verdict" = go ] && [ "$code" != 0 ]; then queue_next; fi ;;  # somebody may have cancelled it
esac
if [ "$code" != 0 ] && [ "$resubmit" = requeue ] && [ "$(state "$me")" != CANCELLED ]; then
  say "requeues itself"
  scontrol requeue "$me"
  sleep 60
fi
exit "$code"
