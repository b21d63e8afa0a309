/*
 * The hot paths of a driver in C and nothing else, for scripts/bench to compare pyvfio with.
 *
 * usage: bare_calls NODE BDF REPETITIONS
 *
 * NODE is that of a group, for type1, or that of a device, for iommufd.
 *
 * Prints a line for each repetition of each row: its name, and the nanoseconds of one operation. The rows are those of
 * tools/path_cost.py that have a part in C.
 */
#define _GNU_SOURCE
#include "bare_space.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096ULL
#define IOVA 0x10000ULL
#define MOST 16384
#define TEMPORARY 64
#define LIVENESS 4 /* of QEMU's edu: holds what was written to it, inverted */
#define PCI_COMMAND 4
#define PCI_COMMAND_MEMORY 2

struct mapped {
	uint64_t vaddr, iova;
};

static int repetitions;
static char *memory;
static struct mapped table[MOST];
static volatile uint64_t sink;

static int64_t now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1000000000LL + time.tv_nsec;
}

static void map(uint64_t page)
{
	map_memory(memory + page * PAGE, IOVA + page * PAGE, PAGE);
}

static void unmap(uint64_t page, uint64_t count)
{
	unmap_memory(IOVA + page * PAGE, count * PAGE);
}

static uint64_t translate(uint64_t vaddr, size_t count)
{
	size_t first = 0, end = count;

	while (end - first > 1) {
		size_t middle = (first + end) / 2;

		if (table[middle].vaddr <= vaddr)
			first = middle;
		else
			end = middle;
	}
	return table[first].iova + vaddr - table[first].vaddr;
}

/* One row: the body, often enough that the clock does not count, and repeated; what `apart` takes is subtracted. */
#define ROW(name, times, apart, body)                                                                  \
	for (int repetition = 0; repetition < repetitions; repetition++) {                             \
		int64_t start = now(), between, end;                                                   \
                                                                                                       \
		for (int i = 0; i < (times); i++)                                                      \
			apart;                                                                         \
		between = now();                                                                       \
		for (int i = 0; i < (times); i++) {                                                    \
			apart;                                                                         \
			body;                                                                          \
		}                                                                                      \
		end = now();                                                                           \
		printf("%s %.3f\n", name, (double)(end - between - (between - start)) / (times));      \
	}

static void measure_mappings(void)
{
	static const size_t counts[] = { 16, 1000, MOST };
	char name[32];
	size_t held = 0;

	ROW("map", 50, , map(MOST); unmap(MOST, 1));
	ROW("temporary", 4 * TEMPORARY, , map(i % TEMPORARY); if (i % TEMPORARY == TEMPORARY - 1) unmap(0, TEMPORARY));
	for (size_t which = 0; which < sizeof(counts) / sizeof(*counts); which++) {
		size_t count = counts[which];

		for (; held < count; held++) {
			map(held);
			table[held] = (struct mapped){ (uintptr_t)memory + held * PAGE, IOVA + held * PAGE };
		}
		snprintf(name, sizeof(name), "map_%zu", count);
		ROW(name, 50, , map(MOST); unmap(MOST, 1));
		snprintf(name, sizeof(name), "translate_%zu", count);
		ROW(name, 1000, , sink = translate((uintptr_t)memory + count / 2 * PAGE + 8, count));
	}
	ROW("translate_all", MOST, , sink = translate((uintptr_t)memory + i * PAGE, MOST));
	unmap(0, MOST);
}

static uint64_t region_offset(unsigned int index, uint64_t *size)
{
	struct vfio_region_info info = { .argsz = sizeof(info), .index = index };

	check(ioctl(device, VFIO_DEVICE_GET_REGION_INFO, &info) == 0, "VFIO_DEVICE_GET_REGION_INFO");
	*size = info.size;
	return info.offset;
}

static void measure_device(void)
{
	uint64_t size, config = region_offset(VFIO_PCI_CONFIG_REGION_INDEX, &size);
	uint64_t offset = region_offset(VFIO_PCI_BAR0_REGION_INDEX, &size);
	volatile uint32_t *bar;
	uint32_t value;
	uint16_t command;

	check(pread(device, &command, 2, config + PCI_COMMAND) == 2, "pread");
	command |= PCI_COMMAND_MEMORY;
	check(pwrite(device, &command, 2, config + PCI_COMMAND) == 2, "pwrite");
	bar = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, device, offset);
	check(bar != MAP_FAILED, "mmap");
	ROW("load", 500, , value = bar[LIVENESS / 4]; sink = value);
	ROW("store", 500, , bar[LIVENESS / 4] = 1);
	ROW("config", 200, , check(pread(device, &value, 4, config) == 4, "pread"));
	munmap((void *)bar, size);
}

static void measure_interrupt(void)
{
	int fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
	struct pollfd wanted = { .fd = fd, .events = POLLIN };
	uint64_t count;

	check(fd >= 0, "eventfd");
	ROW("interrupt", 100, eventfd_write(fd, 1),
	    check(poll(&wanted, 1, 0) == 1 && read(fd, &count, sizeof(count)) == sizeof(count), "poll, read"));
	close(fd);
}

int main(int count, char **words)
{
	if (count != 4)
		return 2;
	repetitions = atoi(words[3]);
	open_space(words[1], words[2]);
	memory = mmap(NULL, (MOST + 1) * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	check(memory != MAP_FAILED, "mmap");
	memset(memory, 1, (MOST + 1) * PAGE);
	measure_mappings();
	measure_device();
	measure_interrupt();
	return 0;
}
