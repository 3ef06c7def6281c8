# One attempt of a chain. It needs bash and Slurm's commands; all Python runs in steps, so in the container where there is one.
# Set above: run, code, python, tasks (per node), min_nodes, resubmit, mail, no_answer, srun_args. Arguments: the chain's first job (none: this one), and the job before this one.
me=$SLURM_JOB_ID chain=${1:-$SLURM_JOB_ID} before=${2:-} next='' asked=''
jobs=$run/slurm/jobs script=$run/slurm/job.sh failed=$run/slurm/jobs/failed
node=$SLURMD_NODENAME path=$PATH

say() { echo "$(date +%T) $*"; }

# sbatch takes options from variables, too: SBATCH_ARRAY_INX, SBATCH_OUTPUT. (SLURM_ARRAY_JOB_ID may also be left of a job that called it.)
if [ -n "$SLURM_ARRAY_JOB_ID" ] && scontrol --oneliner show job "$me" | grep -q ' ArrayTaskId='; then
  say "this job is one of an array, and a chain is one job at a time: SBATCH_ARRAY_INX is set in the shell, or --array was given. Type: env -u SBATCH_ARRAY_INX sbatch $script"
  exit 2
fi
mkdir -p "$jobs"
log=$run/slurm/$me.log
if [ ! /dev/fd/1 -ef "$log" ]; then
  say "goes on in $log, where \`launch status\` reads"
  exec >>"$log" 2>&1
fi

# What Slurm knows of a job goes into a file: it forgets it minutes after the job's end.
note() {
  local found
  found=$(scontrol --oneliner show job "$1" 2>/dev/null) ||
    found=$(sacct --noheader --allocations --parsable2 --jobs="$1" --format=State,ExitCode,NodeList 2>/dev/null |
      awk -F'|' '{print "JobState=" $1 " ExitCode=" $2 " NodeList=" $3}')
  if [ -n "$found" ]; then echo "$found" >"$jobs/.$1" && mv -f "$jobs/.$1" "$jobs/$1"; fi
}

state() { sed -n 's/.*JobState=\([A-Z_]*\).*/\1/p' "$jobs/$1" 2>/dev/null; }

# Jobs of this chain that wait for this one to end. One is enough: all others are cancelled. A submission whose answer was lost may have been taken.
successor() {
  local id after command waiting=()
  while read -r id after command; do
    if [[ $after =~ afternotok:$me([^0-9]|$) && $command == "$script"* ]]; then waiting+=("$id"); fi
  done < <(squeue --noheader --states=PENDING --format='%i %E %o' 2>/dev/null)
  if ((${#waiting[@]} > 1)); then scancel "${waiting[@]:1}"; fi
  echo "${waiting[0]:-}"
}

# The next attempt is queued before anything can go wrong in this one. It starts if this one ends in any way but success.
queue_next() {
  local pause said=$jobs/$me.refused
  next=$(cat "$jobs/$me.next" 2>/dev/null)  # this job has been requeued
  if [ -n "$next" ] && squeue --noheader --job="$next" --states=PENDING 2>/dev/null | grep -q .; then return; fi
  for pause in 0 1 5 20 60; do
    sleep "$pause"
    # Without this job's variables, which would become options of the next one. Of what is printed the last line counts: sites wrap sbatch.
    next=$(
      for name in "${!SLURM_@}"; do [[ $name == SLURM_CONF* ]] || unset "$name"; done
      sbatch --parsable --dependency="afternotok:$me" --kill-on-invalid-dep=yes "$script" "$chain" "$me" 2>"$said" | tail -n 1
    )
    cat "$said"
    next=${next%%;*} next=${next##* }
    if [ "$pause" != 0 ] || [[ ! $next =~ ^[0-9]+$ ]]; then next=$(successor); fi
    if [ -n "$next" ]; then
      echo "$next" >"$jobs/$me.next"
      rm -f "$said"
      return
    fi
    grep -qiE "$no_answer" "$said" || break
  done
  say "cannot queue the next attempt from $node, as said above"
  return 1
}

usable_nodes() {
  sinfo --noheader --Node --partition="$SLURM_JOB_PARTITION" --states=idle,mixed,allocated,completing --format=%N | wc -l
}

# $1: nodes that the next job leaves out, besides those that it was submitted without; $2: seconds that it waits.
hold_next() {
  local own
  own=$(scontrol --oneliner show job "$next" | sed -n 's/.* ExcNodeList=\([^ ]*\) .*/\1/p')
  own=${own#(null)}
  scontrol update JobId="$next" ExcNodeList="$own${own:+${1:+,}}$1" StartTime="now+$2"
}

# Asks launch.attempt before and after the attempt; $2...: the job before and the nodes, or the exit code of the ranks.
judge() {
  local what=$1
  shift
  read -r verdict attempt exclude delay < <(
    "${step[@]}" --overlap --nodes=1 --nodelist="$node" --ntasks=1 --ntasks-per-node=1 "$python" -m launch.attempt "$what" "$run" "$chain" "$me" "$(usable_nodes)" "$@" | tail -n 1
  ) || verdict=failed
  if [ "$verdict" = stop ]; then
    end_chain
  elif [ "$verdict" = go ] && [ -n "$next" ] && [ "$exclude $delay" != "- 0" ]; then
    hold_next "${exclude#-}" "$delay"
  fi
}

end_chain() {
  if [ -n "$next" ]; then scancel "$next"; fi
  if [ -n "$mail" ]; then scontrol update JobId="$me" MailType=END,FAIL MailUser="$mail"; fi
  resubmit=none
}

# After jobs that ended before they were attempts ($failed: JOB NODE). The next one leaves their nodes out, the last ones first, as long as
# enough others remain. Three nodes are enough to end the chain, or three jobs where there is no other node.
heed_failed_starts() {
  local starts nodes spare delay=0
  starts=$(wc -l <"$failed")
  mapfile -t nodes < <(tac "$failed" | awk '!seen[$2]++ { print $2 }')
  spare=$(($(usable_nodes) - min_nodes))
  if ((spare < 0)); then spare=0; fi
  if ((starts > 1)); then delay=$((60 * starts)); fi
  if [ -n "$next" ] && ! hold_next "$(IFS=,; echo "${nodes[*]:0:spare}")" "$delay"; then spare=0; fi
  if ((${#nodes[@]} > 2 || (starts > 2 && ${#nodes[@]} > spare))); then
    say "$starts jobs in a row could not begin, on ${nodes[*]}: their logs, beside this one, say why. The chain ends; \`launch submit\` begins another one"
    rm -f "$failed"
    end_chain
    exit 1
  fi
}

# At an exit before the attempt has begun; `setup` may be what exits, and may have changed the PATH.
could_not_begin() {
  PATH=$path
  if [ -n "$asked" ]; then
    say "asked to end before the ranks have started"
    if [ -f "$failed" ]; then sed -i "/^$me /d" "$failed"; fi
  else
    say "could not begin on $node: slurm.setup or python -m launch.attempt failed, as said above"
    heed_failed_starts
  fi
  exit 1
}

# A signal to the job reaches the ranks by itself; here it is only looked at what it means, while Slurm still knows.
trap 'asked=yes; note "$me"; if [ "$(state "$me")" = CANCELLED ]; then end_chain; fi' TERM

say "job $me of chain $chain${before:+, after job $before}, on $SLURM_JOB_NODELIST"
if [ -n "$before" ] && [ "$before" != "$me" ]; then note "$before"; fi
if [ "$resubmit" = chain ]; then
  if queue_next; then
    scontrol update JobId="$me" Requeue=0
  else
    resubmit=requeue
    say "this job requeues itself instead. If it is always so here: slurm.resubmit=requeue"
  fi
fi

# This job counts as one that could not begin until it has: nobody else can tell if it is killed. launch.attempt takes those before it into the ledger.
if [ -s "$failed" ]; then heed_failed_starts; fi
echo "$me $node" >>"$failed"
trap could_not_begin EXIT

@SETUP@
export PYTHONPATH=$code${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
step=(srun --export=ALL --kill-on-bad-exit=1 --wait=0 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} "${srun_args[@]}")

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
judge begin "${before:--}" "${nodes[@]}"
if [ -n "$asked" ] || [ "$verdict" = failed ]; then exit 1; fi
trap - EXIT
rm -f "$failed" "$jobs/$me"
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
    if [ -n "$next" ] && [ "$verdict" = go ] && [ "$code" != 0 ]; then  # somebody may have cancelled it
      queue_next || say "the chain ends here: \`launch submit\` goes on"
    fi ;;
esac
if [ "$code" != 0 ] && [ "$resubmit" = requeue ] && [ "$(state "$me")" != CANCELLED ]; then
  say "requeues itself"
  for pause in 0 5 20 60 120; do
    sleep "$pause"
    if scontrol requeue "$me"; then
      sleep 60  # until Slurm ends this one
      exit "$code"
    fi
  done
  say "cannot requeue itself, as said above: \`launch submit\` goes on"
fi
exit "$code"
