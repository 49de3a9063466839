#!/bin/busybox sh
# Process 1 of a guest: mounts, modules, /run.sh, the agent, then a shell for the host on the second serial port.
# Kernel command line: vtrace.agent=off starts no agent.
/bin/busybox mkdir -p /proc /sys /dev /tmp /etc /root
/bin/busybox --install -s /bin
export PATH=/bin HOME=/root
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp
cd /tmp

[ ! -f /lib/modules/order ] || while read -r module; do
    insmod "/lib/modules/$module.ko" || echo "init: cannot load $module"
done </lib/modules/order

[ ! -f /run.sh ] || sh /run.sh
grep -q 'vtrace\.agent=off' /proc/cmdline || start-agent

# One request is a line `ID COMMAND-IN-BASE64`; its answer is `@@answer ID STATUS SIZE` and SIZE bytes.
# What the command prints goes through a file: nothing that it leaves running can hold up or mix into an answer.
exec 3<>/dev/ttyS1
stty raw -echo clocal <&3
printf '@@ready %s\n' "$(uname -r)" >&3
while read -r id command <&3; do
    rm -f /tmp/.said
    echo "$command" | base64 -d >/tmp/.command
    sh /tmp/.command </dev/null >/tmp/.said 2>&1
    status=$?
    size=$(stat -c %s /tmp/.said)
    printf '@@answer %s %s %s\n' "$id" "$status" "$size" >&3
    head -c "$size" /tmp/.said >&3
done
echo "init: the host's shell is gone"
poweroff -f
