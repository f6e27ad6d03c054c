# Leaves out nodes that are not fit, and starts the job again without them. The scripts for stages of several tasks call
# this where it is defined: FLEXPERT_SETUP='. /path/venv/bin/activate; . /path/slurm/check_nodes.sh', or
# launcher.check_nodes=true. It uses `run` and `job` of the script, and is called with the stage and its words.
check_nodes() {
    local fit unfit before again=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
    fit=$(srun --ntasks=$((2 * SLURM_JOB_NUM_NODES)) --ntasks-per-node=2 --distribution=cyclic --overcommit \
        --kill-on-bad-exit=0 --wait="${SLURM_WAIT:-300}" --export=ALL \
        "${run[@]}" python -P -m flexpert.launch.health "$@")
    unfit=$(scontrol show hostnames | grep -vxF "$fit" | paste -sd,) # those that have not said their names
    [[ ! $unfit ]] && echo "fit: $SLURM_JOB_NODELIST" && return
    echo "not fit: $unfit"
    if [[ ! $fit ]] && ((SLURM_JOB_NUM_NODES > 1)); then job end 4 "$@"; exit; fi # it is not the nodes
    job end 75 "$@"
    (($? == 75)) || exit 4
    trap '' TERM # requeueing ends this script, too; and only of a job that waits can the excluded nodes be changed
    before=$(scontrol show job "$again" | sed -n 's/.*ExcNodeList=\([^( ]*\).*/\1/p')
    for _ in {1..8}; do scontrol requeue "$again" && break || sleep 15; done
    for _ in {1..20}; do
        scontrol update jobid="$again" excnodelist="${before:+$before,}$unfit" && break
        sleep 1
    done
    exit 4
}
