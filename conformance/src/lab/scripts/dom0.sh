#!/bin/busybox sh
# The first process of domain 0 of Xen: starts the toolstack, is the device model of the guest of the lab, lets it run.
# The disk comes from the machine's own, and goes back there when the guest is gone.
bin=/usr/lib/xen-4.17/bin
export PATH=/bin:$bin LD_LIBRARY_PATH=/lib
/bin/busybox --install -s /bin
mkdir -p /proc /sys /dev /run/xen /run/xenstored /run/lock /var/lib/xen /var/lib/xenstored /var/log/xen/console /tmp
ln -s ../run /var/run
ln -s ../run/lock /var/lock
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev 2>/dev/null
mkdir -p /dev/pts
mount -t devpts devpts /dev/pts

tell() { echo "LAB $*"; }

# Runs "$@" until it succeeds.
wait_for() {
    turn=0
    until "$@" >/dev/null 2>&1; do
        [ $turn = 300 ] && return 1
        sleep 0.1
        turn=$((turn + 1))
    done
}

give_up() {
    tell dom0 failed "$@"
    poweroff -f
}

# Passes on what the guest says, but that it has ended: there is more to be done then.
follow() {
    while IFS= read -r line; do
        case $line in *'LAB guest end'*) return ;; esac
        echo "$line"
    done
}

ready_or_gone() { grep -q ready /served || [ ! -e "/proc/$server" ]; }

for module in /modules/*.ko; do
    insmod "$module" || tell dom0 failed "insmod ${module##*/}"
done
mount -t xenfs xenfs /proc/xen
cd /sys/hypervisor/version && tell dom0 xen "$(cat major).$(cat minor)$(cat extra)" && cd /
xenstored --pid-file /run/xen/xenstored.pid
wait_for xenstore-exists / || give_up xenstored does not answer
xen-init-dom0 >/dev/null
xenconsoled --log=guest --pid-file=/run/xen/xenconsoled.pid

wait_for [ -b /dev/nvme0n1 ] || give_up the disk is not there
dd if=/dev/nvme0n1 of=/disk.img bs=1M 2>/dev/null
xl create -pq /guest/domain.cfg || give_up xl create
id=$(xl domid lab)
tell dom0 created "$id"
polyvirt serve blk --image /disk.img --no-sandbox --xen-domain "$id" >/served 2>&1 &
server=$!
wait_for ready_or_gone
tell dom0 "$(cat /served)"
xl unpause lab
console=/var/log/xen/console/guest-lab.log
wait_for [ -e $console ]
mkfifo /followed
tail -f -n +1 $console >/followed &
follow </followed &
follower=$!
# It ends with the domain.
wait $server
tell dom0 served $?
dd if=/disk.img of=/dev/nvme0n1 bs=1M conv=fsync 2>/dev/null || give_up the disk cannot be written
dmesg | grep -E 'segfault|WARNING: CPU|BUG:|Oops' | head -n 5 | while read -r line; do tell dom0 complaint "$line"; done
# The last of what it said may not have come yet.
if wait_for grep -q 'LAB guest end' $console; then
    wait $follower
    tell guest end
fi
poweroff -f
