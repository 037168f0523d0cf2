#!/bin/busybox sh
# The first process of a PV domain of the lab: our own driver uses the disk that domain 0 serves. $name and $how come from
# the kernel's command line.
export PATH=/bin LD_LIBRARY_PATH=/lib
/bin/busybox --install -s /bin
mkdir -p /proc /sys /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev 2>/dev/null

tell() { echo "LAB $*"; }

tell "$name" kernel "$(uname -r)"
for module in /modules/*xen*.ko; do
    insmod "$module" || tell guest complaint "$name: insmod ${module##*/} failed"
done
# Pages that it grants at a time.
echo 16384 >/sys/module/xen_gntalloc/parameters/limit
mount -t xenfs xenfs /proc/xen
polyvirt xen-guest $how 2>&1 | while read -r line; do tell "$name" "$line"; done
tell "$name" done
poweroff -f
