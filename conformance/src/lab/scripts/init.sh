#!/bin/busybox sh
# The first process of a guest of the lab: loads the modules, runs the script, powers off.
# What it tells, the host reads from the console: LAB SUBJECT EVENT DETAILS…, one event a line.
export PATH=/bin
/bin/busybox mkdir -p /proc /sys /dev /tmp /mnt
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev 2>/dev/null

tell() { echo "LAB $*"; }

tell guest kernel "$(uname -r)"
for module in /modules/*.ko; do
    [ -e "$module" ] && { insmod "$module" || tell guest complaint "insmod ${module##*/} failed"; }
done
. /script.sh

# What the kernel itself complained of: I/O errors, confused drivers, warnings.
dmesg | grep -E 'I/O error|is not a head|[Vv]irtio.*(rror|fail|nvalid)|WARNING: CPU|BUG:|Oops|blocked for more' | head -n 5 |
    while read -r line; do tell guest complaint "$line"; done
tell guest end
poweroff -f
