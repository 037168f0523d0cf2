#!/bin/busybox sh
# The first process of domain 0 of Xen, which is to run the suite: starts what Xen needs. suite.sh follows.
bin=/usr/lib/xen-4.17/bin
export PATH=/bin:$bin LD_LIBRARY_PATH=/lib
/bin/busybox --install -s /bin
mkdir -p /proc /sys /dev /run/xen /run/xenstored /run/lock /var/lib/xen /var/lib/xenstored /tmp
ln -s ../run /var/run
ln -s ../run/lock /var/lock
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev 2>/dev/null

tell() { echo "LAB $*"; }

tell guest kernel "$(uname -r)"
for module in /modules/*xen*.ko; do
    insmod "$module" || tell guest complaint "insmod ${module##*/} failed"
done
# Pages that it grants at a time: the module's own limit is less than a case takes.
echo 16384 >/sys/module/xen_gntalloc/parameters/limit
mount -t xenfs xenfs /proc/xen
xenstored --pid-file /run/xen/xenstored.pid
turn=0
until xenstore-exists / || [ $turn = 300 ]; do
    sleep 0.1
    turn=$((turn + 1))
done
# It tells who waits for it once a half of a message is there; with any less he would run at once, and it not go on.
renice -n -20 -p "$(cat /run/xen/xenstored.pid)" >/dev/null
xen-init-dom0 >/dev/null
polyvirt xen-refusals 2>&1 | while read -r line; do tell refusal "$line"; done

# Memory that was used stays mapped: the page tables of a domain are Xen's to check, and to make and free them is slow.
export MALLOC_ARENA_MAX=1 MALLOC_MMAP_THRESHOLD_=1000000000 MALLOC_TRIM_THRESHOLD_=1000000000 MALLOC_TOP_PAD_=8000000
hypervisor=xen
