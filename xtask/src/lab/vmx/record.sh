# In Bochs: for each of $rates (thousandths of the host's TSC) a guest, recorded while its TSC is moved.
mount -t tracefs tracefs /sys/kernel/tracing
mkdir -p /tmp/out
tar -x -C / -f /dev/sda
khz=$(dmesg | sed -n 's/.*tsc: Detected \([0-9]*\)\.\([0-9]*\) MHz.*/\1\2/p' | tail -n 1)
{
    echo "host: TSC at $khz kHz"
    for rate in $rates; do
        echo "== $rate thousandths, $(cut -d ' ' -f 1 /proc/uptime) s"
        sh /bin/start-guest 900 "host,tsc-frequency=$((khz * rate))" 1 || continue
        echo "guest is up, $(cut -d ' ' -f 1 /proc/uptime) s"
        (cd /tmp/out && vtrace record --dir /run/vtrace -o "rate$rate.dat" -b 16384 -e kvm -e sched \
            --dom guest1 -b 8192 -e sched -e irq -e timer -e syscalls -- in-guest moves)
        sh /bin/stop-guest
        sleep 2
    done
} >/tmp/out/said 2>&1
cat /tmp/out/said
tail -n 3 /tmp/out/*.log
tar -c -C /tmp/out . >/dev/sdb
sync
poweroff -f
