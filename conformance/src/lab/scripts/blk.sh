# Every disk that /disks names, through the kernel's own driver. The image begins with the disk's name.

# The block device whose first line is that of disk $1.
find_disk() {
    for block in /sys/block/vd*; do
        [ -e "$block" ] || continue
        device=/dev/${block##*/}
        [ "$(head -n 1 "$device" 2>/dev/null)" = "polyvirt lab disk $1" ] && return 0
    done
    return 1
}

forget() { # what the page cache still has of $device
    sync
    blockdev --flushbufs "$device"
    echo 3 >/proc/sys/vm/drop_caches
}

whole() { sha256sum "$device" | cut -d' ' -f1; }

write_pattern() { # the runs that the host looks for: aligned through the page cache, single sectors past it, the end
    dd if=/pattern of="$device" bs=64k seek=$((cached / 128)) count=4 conv=notrunc,fsync 2>/dev/null &&
        dd if=/pattern of="$device" bs=512 seek="$direct" count=32 oflag=direct conv=notrunc,fsync 2>/dev/null &&
        dd if=/pattern of="$device" bs=512 seek="$last" count=1 oflag=direct conv=notrunc,fsync 2>/dev/null
}

flushes() { awk '{ print $16 }' "/sys/block/${device##*/}/stat"; }

files() { (cd /mnt && find . -type f | sort | while read -r file; do sha256sum "$file"; done | sha256sum | cut -d' ' -f1); }

file_system() {
    mke2fs -F -b 1024 "$device" "$kib" >/dev/null 2>&1 || return 1
    mount -t ext4 "$device" /mnt || return 1
    mkdir -p /mnt/a/b/c
    cp /bin/busybox /mnt/a/busybox
    for number in 1 2 3 4; do cp /pattern "/mnt/a/b/c/$number"; done
    rm /mnt/a/b/c/2
    before=$(files)
    umount /mnt || return 1
    forget
    mount -t ext4 -o ro "$device" /mnt || return 1
    after=$(files)
    umount /mnt || return 1
    tell "$name" filesystem "$before" "$after"
}

rebind() { # the driver lets go of the device, which resets it, and takes it again
    virtio=$(basename "$(readlink -f "/sys/block/${device##*/}/device")")
    echo "$virtio" >/sys/bus/virtio/drivers/virtio_blk/unbind
    [ -e "/sys/bus/virtio/devices/$virtio/block" ] && return 1
    tell "$name" unbound "$(cat "/sys/bus/virtio/devices/$virtio/status")"
    echo "$virtio" >/sys/bus/virtio/drivers/virtio_blk/bind
    for block in "/sys/bus/virtio/devices/$virtio/block"/*; do device=/dev/${block##*/}; done
    [ -b "$device" ]
}

while read -r name kib cached direct last; do
    turn=0
    until find_disk "$name" || [ $turn = 300 ]; do
        sleep 0.1 # buses that announce their devices late
        turn=$((turn + 1))
    done
    if [ $turn = 300 ]; then
        tell "$name" failed found "no disk $name among: $(cd /sys/block && echo *)"
        continue
    fi
    block=/sys/block/${device##*/}
    tell "$name" found "$(cat "$block/size")" "$(cat "$block/device/features")"
    forget
    tell "$name" read "$(whole)"
    already=$(flushes)
    if write_pattern; then tell "$name" write "$(($(flushes) - already))" "$(cat "$block/queue/write_cache")"; else tell "$name" failed write "dd failed"; fi
    file_system || tell "$name" failed filesystem "mke2fs, mount or umount failed"
    if rebind; then
        forget
        tell "$name" rebind "$(whole)"
    else
        tell "$name" failed rebind "the driver did not take the device again"
    fi
done </disks
