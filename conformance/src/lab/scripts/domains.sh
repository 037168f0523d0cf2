#!/bin/busybox sh
# The first process of domain 0 of Xen: serves a disk to one PV domain, destroys it while it writes, looks whether anything
# of it is left, and serves the next one.
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
        [ $turn = 600 ] && return 1
        sleep 0.1
        turn=$((turn + 1))
    done
}

give_up() {
    tell guest complaint "$*"
    head -n 5 /served | while read -r line; do tell served "$line"; done
    poweroff -f
}

gone() { ! xl domid lab; }
sum() { sha256sum /disk.img | cut -d' ' -f1; }

# A domain $1, whose command line has $2 besides, and its disk.
create() {
    sed "s/WORDS/name=$1 $2/" /guest/domain.cfg >/run/domain.cfg
    xl create -pq /run/domain.cfg || give_up xl create "$1"
    id=$(xl domid lab)
    tell dom0 created "$1 $id"
    echo "$id" >&3
    wait_for grep -q "ready at domain $id" /served || give_up "domain $id is not served"
    xl unpause lab
    console=/var/log/xen/console/guest-lab.log
}

# What domain $1 said up to its event $2, and what the server has of the domain, which is gone.
left() {
    wait_for grep -q "LAB $1 $2" $console || give_up "$1 never tells that it is $2"
    cat $console
    rm $console
    wait_for grep -q "domain $id is gone" /served || give_up "the end of domain $id is not noticed"
    mappings=$(grep -c /dev/xen/gntdev /proc/$server/maps)
    ports=$(grep -c evtchn:polyvirt /proc/interrupts)
    # A domain of which a page is mapped stays, without a name.
    domains=$(xl list | grep -vc -e Name -e Domain-0)
    tell "$1" left "$mappings $ports $domains"
    tell "$1" disk "$(sum)"
}

tell guest kernel "$(uname -r)"
for module in /modules/*xen*.ko; do
    insmod "$module" || tell guest complaint "insmod ${module##*/} failed"
done
mount -t xenfs xenfs /proc/xen
cd /sys/hypervisor/version && tell dom0 xen "$(cat major).$(cat minor)$(cat extra)" && cd /
xenstored --pid-file /run/xen/xenstored.pid
wait_for xenstore-exists / || give_up xenstored does not answer
xen-init-dom0 >/dev/null
xenconsoled --log=guest --pid-file=/run/xen/xenconsoled.pid

mkfifo /ids
# For reading as well: this does not wait for the server, so no signal of a child that ends can interrupt it.
exec 3<>/ids
polyvirt serve blk --image /disk.img --no-sandbox --xenbus </ids >/served 2>&1 3>&- &
server=$!
create first how=--hold
wait_for grep -q 'LAB first busy' $console || give_up first does not write
# What it holds while it is used, so that the count afterwards means something.
tell first holds "$(grep -c /dev/xen/gntdev /proc/$server/maps) $(grep -c evtchn:polyvirt /proc/interrupts)"
xl destroy lab
wait_for gone
left first busy
create second how=
wait_for gone || give_up second does not end
left second 'done'
exec 3>&-
wait $server
tell dom0 served $?
dmesg | grep -E 'segfault|WARNING: CPU|BUG:|Oops' | head -n 5 | while read -r line; do tell guest complaint "$line"; done
tell guest end
poweroff -f
