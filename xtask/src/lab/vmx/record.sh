# In Bochs: for each of $rates (thousandths of the host's TSC: at first, and later) a guest, recorded while its TSC is moved
# and its rate changed.
mount -t tracefs tracefs /sys/kernel/tracing
mkdir -p /tmp/out
tar -x -C / -f /dev/sda
# Bochs 3.0 wants the descriptor of posted interrupts to begin a page.
rmmod kvm_intel
insmod /lib/modules/kvm_intel.ko enable_apicv=0
khz=$(dmesg | sed -n 's/.*tsc: Detected \([0-9]*\)\.\([0-9]*\) MHz.*/\1\2/p' | tail -n 1)
export PRELOAD=/qemu/set_rate.so SET_RATE=/tmp/rate
: >/tmp/out/said
tail -f /tmp/out/said >/dev/console &
{
    echo "host: TSC at $khz kHz"
    for pair in $rates; do
        rate=${pair%:*} later=${pair#*:}
        echo "== $rate, later $later thousandths, $(cut -d ' ' -f 1 /proc/uptime) s"
        sh /bin/start-guest 900 "host,tsc-frequency=$((khz * rate))" 1 || continue
        echo "guest is up, $(cut -d ' ' -f 1 /proc/uptime) s"
        (cd /tmp/out && vtrace record --dir /run/vtrace -o "rate$rate.dat" -b 16384 -e kvm -e sched \
            --dom guest1 -b 8192 -e sched -e irq -e timer -e syscalls -- sh /bin/during $((khz * later / 1000)))
        sh /bin/stop-guest
        sleep 2
    done
    echo "done, $(cut -d ' ' -f 1 /proc/uptime) s"
} >/tmp/out/said 2>&1
tar -c -C /tmp/out . >/dev/sdb
sync
poweroff -f
