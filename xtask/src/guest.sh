#!/bin/sh
# The first process of the guest (guest.rs): mounts what a host has, stands in a cgroup of its own as a service does, and runs what follows.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mkdir /dev/pts /dev/shm
mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /dev/pts
ln -s /proc/self/fd /dev/fd
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mkdir -p /sys/fs/cgroup/system/tests
echo 0 > /sys/fs/cgroup/system/tests/cgroup.procs
ip link set lo up
hostname guest
ulimit -n 4096
