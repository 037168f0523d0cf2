# A disk, through the kernel's own driver.

# The block device whose first line is that of the variant $1.
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
    tell "$subject" filesystem "$before" "$after"
}

try_blk() {
    kib=$1 cached=$2 direct=$3 last=$4
    if ! wait_for find_disk "$variant"; then
        tell "$subject" failed found "no disk $variant among: $(cd /sys/block && echo *)"
        return
    fi
    block=/sys/block/${device##*/}
    virtio=$(basename "$(readlink -f "$block/device")")
    tell "$subject" found "$(cat "$block/device/features")" "$(cat "$block/size")" "$(ls "$block/mq" | wc -l)"
    forget
    tell "$subject" read "$(whole)"
    already=$(flushes)
    if write_pattern; then
        tell "$subject" write "$(($(flushes) - already))" "$(cat "$block/queue/write_cache")"
    else
        tell "$subject" failed write "dd failed"
    fi
    file_system || tell "$subject" failed filesystem "mke2fs, mount or umount failed"
    if rebind virtio_blk; then
        for block in "/sys/bus/virtio/devices/$virtio/block"/*; do device=/dev/${block##*/}; done
        forget
        tell "$subject" rebind "$(whole)"
    else
        tell "$subject" failed rebind "the driver did not take the device again"
    fi
}
