#!/bin/bash
# A Slurm cluster of one node on loopback: root, inside `unshare --net --uts --mount --pid --fork --mount-proc`.
# Usage: slurm_cluster.sh DIRECTORY [database]
set -e
D=$1
mkdir -p "$D"/{state,spool,log,munge}
chmod 755 "$D" # munge refuses a directory that others can write to
head -c 1024 /dev/urandom >"$D/munge/key"
chmod 400 "$D/munge/key"
# The host must have the name that slurm.conf has, and an address that is not loopback, or getaddrinfo finds none.
ip link set lo up
ip address add 192.0.2.1/32 dev lo
hostname localhost
accounting=AccountingStorageType=accounting_storage/none
gather=jobacct_gather/none
if [ "$2" = database ]; then
    accounting="AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=17819
AccountingStoragePass=$D/munge/socket
AccountingStoreFlags=job_comment"
    gather=jobacct_gather/linux
fi
cat >"$D/slurm.conf" <<X
ClusterName=tail
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$D/munge/socket,cred_expire=5
StateSaveLocation=$D/state
SlurmdSpoolDir=$D/spool
MailProg=/bin/true
SlurmctldLogFile=$D/log/slurmctld.log
SlurmdLogFile=$D/log/slurmd.log
SlurmctldPidFile=$D/slurmctld.pid
SlurmdPidFile=$D/slurmd.pid
SlurmctldPort=17817
SlurmdPort=17818
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
MinJobAge=${MIN_JOB_AGE:-300}
SlurmctldTimeout=30
SlurmdTimeout=60
SlurmdParameters=config_overrides
$accounting
JobAcctGatherType=$gather
NodeName=localhost NodeAddr=127.0.0.1 CPUs=4 RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes=localhost Default=YES MaxTime=INFINITE State=UP
X
export SLURM_CONF=$D/slurm.conf
munged --force --key-file="$D/munge/key" --socket="$D/munge/socket" --pid-file="$D/munge/pid" \
    --log-file="$D/munge/log" --seed-file="$D/munge/seed"
if [ "$2" = database ]; then
    M=$D/mariadb
    mkdir -p "$M"
    mariadb-install-db --no-defaults --datadir="$M/data" --user=root --auth-root-authentication-method=socket \
        --skip-test-db >"$M/install.log" 2>&1
    mariadbd --no-defaults --user=root --datadir="$M/data" --socket="$M/socket" --bind-address=127.0.0.1 --port=13306 \
        --pid-file="$M/pid" --innodb-buffer-pool-size=64M >"$M/log" 2>&1 &
    until mariadb -S "$M/socket" -e 'select 1' >/dev/null 2>&1; do sleep 0.2; done
    mariadb -S "$M/socket" -e "create database slurm_acct_db; create user slurm@'127.0.0.1' identified by 'x';
        create user slurm@localhost identified by 'x'; grant all on slurm_acct_db.* to slurm@'127.0.0.1';
        grant all on slurm_acct_db.* to slurm@localhost;"
    cat >"$D/slurmdbd.conf" <<X
AuthType=auth/munge
AuthInfo=socket=$D/munge/socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort=17819
SlurmUser=root
LogFile=$D/log/slurmdbd.log
PidFile=$D/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=13306
StorageUser=slurm
StoragePass=x
StorageLoc=slurm_acct_db
X
    chmod 600 "$D/slurmdbd.conf"
    slurmdbd -D >"$D/log/slurmdbd.out" 2>&1 &
    until sacctmgr -i add cluster tail >>"$D/log/sacctmgr.out" 2>&1; do sleep 0.5; done
fi
slurmctld -f "$D/slurm.conf"
slurmd -f "$D/slurm.conf" -N localhost
until sinfo -h -o %T 2>/dev/null | grep -q idle; do sleep 0.2; done
touch "$D/ready"
exec sleep infinity
