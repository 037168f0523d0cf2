#!/bin/busybox sh
# The first process of a guest of the lab: loads the modules, tries each device, powers off.
# What it tells, the host reads from the console: LAB SUBJECT EVENT DETAILS…, one event a line.
export PATH=/bin
/bin/busybox mkdir -p /proc /sys /dev /mnt
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev 2>/dev/null

tell() { echo "LAB $*"; }

# Runs "$@" until it succeeds: buses may announce their devices late.
wait_for() {
    turn=0
    until "$@"; do
        [ $turn = 300 ] && return 1
        sleep 0.1
        turn=$((turn + 1))
    done
}

# The driver $1 lets go of the device $virtio, which resets it, and takes it again.
rebind() {
    driver=/sys/bus/virtio/drivers/$1
    echo "$virtio" >"$driver/unbind"
    [ -e "/sys/bus/virtio/devices/$virtio/driver" ] && return 1
    tell "$subject" unbound "$(cat "/sys/bus/virtio/devices/$virtio/status")"
    echo "$virtio" >"$driver/bind"
    [ -e "/sys/bus/virtio/devices/$virtio/driver" ]
}

tell guest kernel "$(uname -r)"
# What the kernel's command line has for the module $1, which is loaded as modprobe would.
options() { tr ' ' '\n' </proc/cmdline | sed -n "s/^$1\.//p"; }
for module in /modules/*.ko; do
    [ -e "$module" ] || continue
    name=${module##*/*-}
    # shellcheck disable=SC2046 # several words, or none
    insmod "$module" $(options "${name%.ko}") || tell guest complaint "insmod ${module##*/} failed"
done
for script in /scripts/*.sh; do . "$script"; done
# A line for each device: what it is, which one, and what is to be done with it.
while read -r kind variant details; do
    subject=$kind-$variant
    # shellcheck disable=SC2086 # several words
    "try_$kind" $details </dev/null
done </devices

# What the kernel itself complained of: I/O errors, confused drivers, warnings.
dmesg | grep -E 'I/O error|is not a head|[Vv]irtio.*(rror|fail|nvalid)|WARNING: CPU|BUG:|Oops|blocked for more' |
    head -n 5 | while read -r line; do tell guest complaint "$line"; done
tell guest end
poweroff -f
