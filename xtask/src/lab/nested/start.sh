# In the host under test: the server, then QEMU with KVM and the guest, then wait until its agent is there.
# $1: how long to wait, in seconds; $2: QEMU's -cpu; $3: how many CPUs. $PRELOAD: a library that QEMU is to load first.
mkdir -p /run/vtrace /tmp/out
[ -p /tmp/guest.in ] || mkfifo /tmp/guest.in /tmp/guest.out

case $(uname -r) in
6.1[4-9].*)
    # QEMU's TCG leaves the last exception's type in EXITINTINFO, without its valid bit. svm.c of these kernels looks at the
    # type alone and ends a guest (KVM internal error, suberror 3) that had one right before it writes to a device's memory,
    # as it notifies ours. So the ports come over QEMU's own device, in its older form: that has I/O ports.
    words=$(vtrace setup --root /tmp/virt --dom guest1 --cpus "$3" --qemu --qemu-version 11.1 --transport socket)
    words="$words -global virtio-serial-pci.disable-modern=on"
    ;;
*)
    words="-chardev socket,id=vtrace,path=/run/vtrace/guest1.sock -device vhost-user-test-device-pci,chardev=vtrace,virtio-id=3"
    words="$words,num_vqs=$((2 * $3 + 4)),vq_size=128,config_size=12"
    ;;
esac
pidof vtrace >/dev/null || vtrace server --dir /run/vtrace --root /tmp/virt --dom guest1 2>/tmp/out/server.log &
until [ -S /run/vtrace/control.sock ]; do sleep 0.1; done

eval "set -- $1 $2 $3 $words"
wait_s=$1 cpu=$2 cpus=$3
shift 3
/qemu/lib/ld-linux-x86-64.so.2 --library-path /qemu/lib ${PRELOAD:+--preload "$PRELOAD"} /qemu/qemu-system-x86_64 -L /qemu/share \
    -nodefaults -no-user-config -display none -no-reboot \
    -accel kvm -cpu "$cpu" -M q35,memory-backend=memory -smp "$cpus" -m 384M \
    -object memory-backend-memfd,id=memory,size=384M,share=on \
    -kernel /guest/vmlinuz -initrd /guest/initramfs \
    -append "console=ttyS0 quiet panic=-1" \
    -serial file:/tmp/out/guest.log -chardev pipe,id=shell,path=/tmp/guest -serial chardev:shell \
    "$@" >/tmp/out/qemu.log 2>&1 &
cat /tmp/guest.out >/tmp/out/guest.answers &

until vtrace list --dir /run/vtrace | grep -q 'agent ready'; do
    wait_s=$((wait_s - 1))
    if [ "$wait_s" = 0 ] || ! kill -0 $! 2>/dev/null; then
        echo "the guest's agent does not come"
        vtrace list --dir /run/vtrace
        cat /tmp/out/qemu.log /tmp/out/server.log
        tail -n 30 /tmp/out/guest.log
        exit 1
    fi
    sleep 1
done
vtrace list --dir /run/vtrace
