#!/bin/busybox sh
# The first process of a host with KVM, an emulated machine. What it is to do with KVM follows in another script.
export PATH=/bin
/bin/busybox mkdir -p /proc /sys /dev /tmp
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev 2>/dev/null

tell() { echo "LAB $*"; }

for module in /modules/*.ko; do
    insmod "$module" || tell guest complaint "insmod ${module##*/} failed"
done
