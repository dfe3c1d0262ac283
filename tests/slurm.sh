#!/usr/bin/env bash
# A Slurm of two nodes on this machine, until this script is ended. It needs root, and of Debian:
#     apt-get install --no-install-recommends slurm-wlm munge iproute2
#     tests/slurm.sh FOLDER &  export SLURM_CONF=FOLDER/slurm.conf  and then sinfo, sbatch ...
# Each node is a network and a host name of its own; its 80 CPUs and 8 GPUs are made up.
set -euo pipefail
mkdir -p "${1:?usage: tests/slurm.sh FOLDER}"/state
cd "$1"
export SLURM_CONF=$PWD/slurm.conf
net=10.77.0 controller=$(hostname -s)

end() {
    scancel --full --user=root || true
    sleep 3
    jobs -p | xargs -r kill || true
    for node in 1 2; do ip netns delete "slurm-node$node"; done
    ip link delete slurm0
}
trap 'trap - EXIT; end 2>/dev/null || true' EXIT
trap exit INT TERM

for gpu in {0..7}; do [[ -e gpu$gpu ]] || mknod "gpu$gpu" c 1 3; done # as /dev/null
echo "Name=gpu File=$PWD/gpu[0-7]" > gres.conf
printf '%s\n' '127.0.0.1 localhost' "$net.1 node1" "$net.2 node2" "$net.254 $controller" > hosts
cat > slurm.conf <<END
ClusterName=test
SlurmctldHost=$controller($net.254)
SlurmUser=root
AuthInfo=socket=$PWD/munge.socket
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
StateSaveLocation=$PWD/state
SlurmctldPidFile=$PWD/slurmctld.pid
SlurmdPidFile=$PWD/%n.pid
SlurmdSpoolDir=$PWD/%n
ReturnToService=2
GresTypes=gpu
NodeName=node[1-2] NodeAddr=$net.[1-2] CPUs=80 Gres=gpu:8
PartitionName=all Nodes=ALL Default=YES
END

(umask 077 && head -c 1024 /dev/urandom > munge.key)
munged --foreground --force --key-file=munge.key --socket=munge.socket --pid-file=munge.pid \
    --seed-file=munge.seed --log-file=munge.log > munged.log 2>&1 &
until [[ -S munge.socket ]]; do sleep 0.1; done
ip link add slurm0 up type bridge
ip address add $net.254/24 dev slurm0
slurmctld -D -c > slurmctld.log 2>&1 &
for node in 1 2; do
    ip netns add "slurm-node$node" # not ip netns exec, which hides /sys/fs/cgroup
    ip link add "slurm$node" up master slurm0 type veth peer name eth0 netns "slurm-node$node"
    nsenter --net="/run/netns/slurm-node$node" unshare --uts --mount bash -c "ip link set lo up
        ip link set eth0 up; ip address add $net.$node/24 dev eth0
        hostname node$node; mount --bind hosts /etc/hosts; exec slurmd -D" > "node$node.log" 2>&1 &
done
wait
