#!/bin/busybox sh
# In the guest of the guest: something to trace, and five moves of the TSC while it is traced.
# wrmsr NUMBER VALUE: the driver's file is addressed by the register's number.
wrmsr() {
    value=$2 bytes= index=0
    while [ $index -lt 8 ]; do
        bytes="$bytes\\$(printf %03o $((value & 255)))" value=$((value >> 8)) index=$((index + 1))
    done
    printf "$bytes" | dd of=/dev/cpu/0/msr bs=8 count=1 seek=$(($1)) oflag=seek_bytes conv=notrunc 2>/dev/null ||
        echo "moves: cannot write MSR $1"
}
rdmsr() {
    dd if=/dev/cpu/0/msr bs=8 count=1 skip=$(($1)) iflag=skip_bytes 2>/dev/null | od -An -t d8 | tr -d ' '
}
work() {
    round=0
    while [ $round -lt 6 ]; do sleep 0.03; ls /proc/self >/dev/null; round=$((round + 1)); done
}

ADJUST=0x3b TSC=0x10
echo "moves: clocksource $(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)"
echo "moves: adjust $(rdmsr $ADJUST) tsc $(rdmsr $TSC)"
work
wrmsr $ADJUST 7000000
work
wrmsr $ADJUST 90000000
work
wrmsr $ADJUST 87000000
work
wrmsr $TSC $(($(rdmsr $TSC) + 500000000))
work
wrmsr $TSC $(($(rdmsr $TSC) + 1000000))
work
echo "moves: adjust $(rdmsr $ADJUST) tsc $(rdmsr $TSC)"
