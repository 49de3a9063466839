# In the host under test: the server, then QEMU with KVM and the guest, then wait until its agent is there.
# $1: how long to wait, in seconds; $2: QEMU's -cpu; $3: how many CPUs.
mkdir -p /run/vtrace /tmp/out
[ -p /tmp/guest.in ] || mkfifo /tmp/guest.in /tmp/guest.out
pidof vtrace >/dev/null || vtrace server --dir /run/vtrace --dom guest1 2>/tmp/out/server.log &
until [ -S /run/vtrace/guest1.sock ]; do sleep 0.1; done

/qemu/lib/ld-linux-x86-64.so.2 --library-path /qemu/lib /qemu/qemu-system-x86_64 -L /qemu/share \
    -nodefaults -no-user-config -display none -no-reboot \
    -accel kvm -cpu "$2" -M q35,memory-backend=memory -smp "$3" -m 384M \
    -object memory-backend-memfd,id=memory,size=384M,share=on \
    -kernel /guest/vmlinuz -initrd /guest/initramfs \
    -append "console=ttyS0 quiet panic=-1" \
    -serial file:/tmp/out/guest.log -chardev pipe,id=shell,path=/tmp/guest -serial chardev:shell \
    -chardev socket,id=vtrace,path=/run/vtrace/guest1.sock \
    -device vhost-user-test-device-pci,chardev=vtrace,virtio-id=3,num_vqs=$((2 * $3 + 4)),vq_size=128,config_size=12 \
    >/tmp/out/qemu.log 2>&1 &
cat /tmp/guest.out >/tmp/out/guest.answers &

left=$1
until vtrace list --dir /run/vtrace | grep -q 'agent ready'; do
    left=$((left - 1))
    if [ "$left" = 0 ] || ! kill -0 $! 2>/dev/null; then
        echo "the guest's agent does not come"
        vtrace list --dir /run/vtrace
        cat /tmp/out/qemu.log /tmp/out/server.log
        tail -n 30 /tmp/out/guest.log
        exit 1
    fi
    sleep 1
done
vtrace list --dir /run/vtrace
