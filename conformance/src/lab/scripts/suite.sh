
# Runs the cells of the suite that $hypervisor, $transport, $device and $ring select, the last three from the kernel's
# command line, and tells the result packed, as base64, a line at a time.
tell suite begins "$transport" "$device" "$ring"
polyvirt check --hypervisor "$hypervisor" --transport "$transport" --device "$device" --ring "$ring" \
    --quiet --format json >/report 2>/said &
suite=$!
# A guest that says nothing is taken for one that hangs.
while sleep 30; do tell suite runs; done &
wait $suite
status=$?
kill $!
head -n 5 /said | while read -r line; do tell suite said "$line"; done
# A console passes on a byte at a time.
gzip </report | base64 -w 1500 | while read -r line; do tell report part "$line"; done
dmesg | grep -E 'segfault|WARNING: CPU|BUG:|Oops' | head -n 5 | while read -r line; do tell guest complaint "$line"; done
tell suite ended $status
tell guest end
poweroff -f
