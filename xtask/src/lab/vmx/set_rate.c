/*
 * Loaded into QEMU before its own libraries: changes the rate of a guest's TSC while the guest runs, which QEMU has no
 * command for. Before the vCPU next enters the guest, as KVM wants it.
 *
 * In:    a number of kHz in the file that SET_RATE names. Out: that file is gone once the TSC runs at that rate; it goes on from
 *        where it was, as after a migration.
 * Runs:  in the thread of the only vCPU. Full: does not apply. Trust: the lab's own scripts.
 */
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#define IA32_TSC 0x10

struct one_msr {
	struct kvm_msrs head;
	struct kvm_msr_entry tsc;
};

static void set_rate(int vcpu, const char *path)
{
	char text[32] = "";
	struct one_msr msr = { .head.nmsrs = 1, .tsc.index = IA32_TSC };
	int file = open(path, O_RDONLY | O_CLOEXEC);

	if (file < 0)
		return;
	if (read(file, text, sizeof(text) - 1) > 0 &&
	    (syscall(SYS_ioctl, vcpu, KVM_GET_MSRS, &msr) != 1 ||
	     syscall(SYS_ioctl, vcpu, KVM_SET_TSC_KHZ, atol(text)) ||
	     syscall(SYS_ioctl, vcpu, KVM_SET_MSRS, &msr) != 1))
		perror("set_rate");
	close(file);
	unlink(path);
}

int ioctl(int file, unsigned long request, void *argument)
{
	const char *path = getenv("SET_RATE");

	if (request == KVM_RUN && path)
		set_rate(file, path);
	return syscall(SYS_ioctl, file, request, argument);
}
