# A source of entropy, through the kernel's own driver.

find_rng() {
    for virtio in /sys/bus/virtio/devices/*; do
        if [ "$(readlink "$virtio/driver" | sed 's/.*\///')" = virtio_rng ]; then
            virtio=${virtio##*/}
            return 0
        fi
    done
    return 1
}

# 4 KiB: their SHA-256, and how many of the 256 values of a byte are in them.
draw() {
    source=$(tr ' ' '\n' </sys/class/misc/hw_random/rng_available | grep virtio | head -n 1)
    echo "$source" >/sys/class/misc/hw_random/rng_current
    dd if=/dev/hwrng of=/drawn bs=1024 count=4 iflag=fullblock 2>/dev/null || return 1
    sum=$(sha256sum /drawn | cut -d' ' -f1)
    echo "$sum $(od -An -v -tx1 /drawn | tr -s ' ' '\n' | grep . | sort -u | wc -l)"
}

try_rng() {
    if ! wait_for find_rng; then
        tell "$subject" failed found "no device whose driver is virtio_rng"
        return
    fi
    tell "$subject" found "$(cat "/sys/bus/virtio/devices/$virtio/features")"
    if drawn=$(draw); then tell "$subject" entropy "$drawn"; else tell "$subject" failed entropy "/dev/hwrng cannot be read"; fi
    if rebind virtio_rng && drawn=$(draw); then
        tell "$subject" rebind "$drawn"
    else
        tell "$subject" failed rebind "the driver did not take the device again, or /dev/hwrng cannot be read"
    fi
}
