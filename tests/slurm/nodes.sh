#!/usr/bin/env bash
# A SLURM cluster of two emulated nodes of one core each, in the folder it is started in, until it is killed.
# tests/slurm/cluster.py starts it in mount, process and network namespaces of its own, so that it touches no file of
# the machine, takes nobody's ports, and ends with all its jobs when this script does.
set -euo pipefail
folder=$PWD

ip link set lo up
ip address add 10.0.0.1/32 dev lo # with 127.0.0.1 alone, getaddrinfo finds no name (AI_ADDRCONFIG)
printf '127.0.0.1 localhost n1 n2 %s\n' "$(hostname)" >hosts
mount --bind hosts /etc/hosts

head -c 128 /dev/urandom >munge.key
chmod 400 munge.key
munged --foreground --force --socket="$folder/munge.socket" --key-file="$folder/munge.key" \
    --log-file="$folder/munged.log" --pid-file="$folder/munged.pid" --seed-file="$folder/munged.seed" &
until [ -S munge.socket ]; do sleep 0.1; done

cat >slurm.conf <<CONF
ClusterName=test
SlurmctldHost=localhost
SlurmUser=root
# A job that is queued again waits until its old credential has expired.
AuthInfo=socket=$folder/munge.socket,cred_expire=5
StateSaveLocation=$folder/state
SlurmctldPidFile=$folder/slurmctld.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdPidFile=$folder/slurmd.%n.pid
SlurmdLogFile=$folder/slurmd.%n.log
SlurmdSpoolDir=$folder/spool.%n
# Signals of a job reach all processes of a task with this one, the loader's workers too.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,bf_interval=1
# What a site may have set, and the job must live with.
KillOnBadExit=1
KillWait=10
NodeName=n[1-2] NodeAddr=127.0.0.1 Port=17001-17002 CPUs=1
PartitionName=main Nodes=ALL Default=YES
CONF
mkdir state
export SLURM_CONF=$folder/slurm.conf
slurmctld -D &
slurmd -D -N n1 &
slurmd -D -N n2 &
wait
