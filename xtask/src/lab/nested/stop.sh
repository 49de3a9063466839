#!/bin/busybox sh
# In the host under test: powers the guest off and waits until its QEMU is gone.
printf '1 %s\n' "$(echo poweroff -f | base64)" >/tmp/guest.in
rounds=100
while pidof qemu-system-x86_64 ld-linux-x86-64.so.2 >/dev/null; do
    rounds=$((rounds - 1))
    [ $rounds -gt 0 ] || { killall ld-linux-x86-64.so.2 qemu-system-x86_64; break; }
    sleep 0.1
done
