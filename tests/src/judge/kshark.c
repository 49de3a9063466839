// SPDX-License-Identifier: MIT
// Loads trace files as KernelShark does and says what it finds.
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include "libkshark.h"
#include "libkshark-tepdata.h"

int main(int argc, char **argv)
{
	struct kshark_context *context = NULL;
	struct kshark_host_guest_map *maps = NULL;

	if (!kshark_instance(&context))
		return 1;
	for (int i = 1; i < argc; i++) {
		struct kshark_entry **rows = NULL;
		int stream = kshark_open(context, argv[i]);
		if (stream < 0)
			return 2;
		ssize_t count = kshark_load_entries(context, stream, &rows);
		if (count < 1)
			return 3;
		if (getenv("KSHARK_ENTRIES"))
			for (ssize_t row = 0; row < count; row++)
				printf("entry %d %d %" PRId64 "\n", stream, rows[row]->cpu, rows[row]->ts);
		printf("stream %d %zd %" PRId64 " %" PRId64 "\n", stream, count, rows[0]->ts, rows[count - 1]->ts);
	}
	int count = kshark_tracecmd_get_hostguest_mapping(&maps);
	for (int i = 0; i < count; i++) {
		printf("map %d %d %s", maps[i].host_id, maps[i].guest_id, maps[i].guest_name);
		for (int cpu = 0; cpu < maps[i].vcpu_count; cpu++)
			printf(" %d", maps[i].cpu_pid[cpu]);
		printf("\n");
	}
	return 0;
}
