
# Runs the cells of the suite that $hypervisor, $transport, $device and $ring select, the last three from the kernel's
# command line, and tells the result as base64, a line at a time.
tell suite begins "$transport" "$device" "$ring"
turn=0
polyvirt check --hypervisor "$hypervisor" --transport "$transport" --device "$device" --ring "$ring" \
    --quiet --format json >/report 2>/said &
while [ -e /proc/$! ] && ! grep -q 'State:.*Z' /proc/$!/status 2>/dev/null; do
    sleep 1
    turn=$((turn + 1))
    # A guest that says nothing is taken for one that hangs.
    [ $((turn % 30)) = 0 ] && tell suite runs
done
wait $!
status=$?
head -n 5 /said | while read -r line; do tell suite said "$line"; done
# What it is indented by says nothing.
sed 's/^ *//' /report | base64 -w 1500 | while read -r line; do tell report part "$line"; done
dmesg | grep -E 'segfault|WARNING: CPU|BUG:|Oops' | head -n 5 | while read -r line; do tell guest complaint "$line"; done
tell suite ended $status
tell guest end
poweroff -f
