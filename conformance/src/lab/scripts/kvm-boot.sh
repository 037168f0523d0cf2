
# Boots the guest of the lab with $transport and $packed of the kernel's command line. Its disks come from the machine's
# own, and go back there when the guest is gone.

# Passes on what the guest says, but that it has ended: there is more to be done then.
follow() {
    while IFS= read -r line; do
        case $line in
        *'LAB guest end'*) : >/ended ;;
        *) echo "$line" ;;
        esac
    done
}

tell host kvm "$(uname -r)"
turn=0
until [ -b /dev/nvme0n1 ] || [ $turn = 300 ]; do
    sleep 0.1
    turn=$((turn + 1))
done
set --
for disk in /dev/nvme*n1; do
    copy=/${disk##*/}.img
    dd if="$disk" of="$copy" bs=1M 2>/dev/null || tell guest complaint "$disk cannot be read"
    set -- "$@" --disk "$copy"
done
mkfifo /said
follow </said &
follower=$!
tell host boots "$transport" "$packed"
# A guest that says nothing is taken for one that hangs, and a kernel that boots quietly says nothing for long.
(
    turn=0
    while [ $turn -lt 100 ] && sleep 4; do
        tell host runs
        turn=$((turn + 1))
    done
) &
ticks=$!
# A driver that has the choice does not take the legacy interface by itself.
[ "$transport" = pci-legacy ] && legacy=virtio_pci.force_legacy=1
# shellcheck disable=SC2086 # no word where $packed is empty
polyvirt boot --hypervisor kvm --kernel /guest/kernel --initrd /guest/initramfs --mem 256 --transport "$transport" \
    $packed --append "rdinit=/init quiet panic=-1 $legacy" "$@" </dev/null >/said 2>&1
tell host served $?
kill $ticks
wait $follower
for disk in /dev/nvme*n1; do
    dd if="/${disk##*/}.img" of="$disk" bs=1M conv=fsync 2>/dev/null || tell guest complaint "$disk cannot be written"
done
dmesg | grep -E 'segfault|WARNING: CPU|BUG:|Oops' | head -n 5 | while read -r line; do tell guest complaint "$line"; done
[ -e /ended ] && tell guest end
poweroff -f
