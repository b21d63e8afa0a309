/*
 * The system calls of one resize and nothing else, for scripts/bench to compare pyvfio with.
 *
 * usage: bare_resize GROUP_NODE REPETITIONS MEMORY MIB...
 *
 * MEMORY is anonymous, memfd, hugetlb (a memfd of huge pages of 2 MiB) or file (a memfd that keeps its length).
 *
 * For each length and each way to map, a line for each repetition: MIB, the way, and how many nanoseconds it took to
 * have 2 MiB more behind the memory and the device reach them, and to populate them in between.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/vfio.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif
#ifndef MFD_HUGE_2MB
#define MFD_HUGE_2MB (21U << 26)
#endif

#define MIB (1ULL << 20)
#define STEP (2 * MIB)
#define IOVA (2 * MIB)

enum way { REMAP, EXTEND, GRANULE };
static const char *const names[] = { "remap", "extend", "granule" };

enum kind { ANONYMOUS, MEMFD, HUGETLB, OWN_FILE };
static const char *const kinds[] = { "anonymous", "memfd", "hugetlb", "file" };

static int container;
static enum kind kind;
static int file = -1; /* what the memory is of, unless it is anonymous */

static void check(int good, const char *what)
{
	if (!good) {
		fprintf(stderr, "%s: %s\n", what, strerror(errno));
		exit(1);
	}
}

static int64_t now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1000000000LL + time.tv_nsec;
}

static void map(char *memory, uint64_t start, uint64_t size)
{
	struct vfio_iommu_type1_dma_map argument = {
		.argsz = sizeof(argument),
		.flags = VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE,
		.vaddr = (uintptr_t)memory + start,
		.iova = IOVA + start,
		.size = size,
	};

	check(ioctl(container, VFIO_IOMMU_MAP_DMA, &argument) == 0, "VFIO_IOMMU_MAP_DMA");
}

static void unmap(uint64_t start, uint64_t size)
{
	struct vfio_iommu_type1_dma_unmap argument = { .argsz = sizeof(argument), .iova = IOVA + start, .size = size };

	check(ioctl(container, VFIO_IOMMU_UNMAP_DMA, &argument) == 0 && argument.size == size, "VFIO_IOMMU_UNMAP_DMA");
}

static void activate(char *memory, uint64_t start, uint64_t size)
{
	if (kind != ANONYMOUS)
		check(fallocate(file, 0, start, size) == 0, "fallocate");
	check(mprotect(memory + start, size, PROT_READ | PROT_WRITE) == 0, "mprotect");
}

static void populate(char *memory, uint64_t start, uint64_t size)
{
	check(madvise(memory + start, size, MADV_POPULATE_WRITE) == 0, "madvise(MADV_POPULATE_WRITE)");
}

/* As a block has it: large pages where they can be, and no child inherits it. */
static void settle(char *memory, uint64_t size)
{
	madvise(memory, size, MADV_HUGEPAGE);
	check(madvise(memory, size, MADV_DONTFORK) == 0, "madvise(MADV_DONTFORK)");
}

static void make_inaccessible(char *memory, uint64_t start, uint64_t size)
{
	int flags = MAP_FIXED | (kind == ANONYMOUS ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED | MAP_NORESERVE);
	off_t offset = kind == ANONYMOUS ? 0 : start;

	check(mmap(memory + start, size, PROT_NONE, flags, file, offset) != MAP_FAILED, "mmap");
}

static char *reserve(uint64_t size)
{
	char *memory = mmap(NULL, size + STEP, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	check(memory != MAP_FAILED, "mmap");
	memory += -(uintptr_t)memory % STEP;
	if (kind != ANONYMOUS) {
		file = memfd_create("bare", MFD_CLOEXEC | (kind == HUGETLB ? MFD_HUGETLB | MFD_HUGE_2MB : 0));
		check(file >= 0, "memfd_create");
		make_inaccessible(memory, 0, size);
	}
	settle(memory, size);
	return memory;
}

static void grow(char *memory, uint64_t size, enum way way, int64_t *total, int64_t *prefault)
{
	int64_t start = now(), populating;

	activate(memory, size, STEP);
	populating = now();
	populate(memory, size, STEP);
	*prefault = now() - populating;
	if (way == REMAP) {
		unmap(0, size);
		map(memory, 0, size + STEP);
	} else {
		map(memory, size, STEP);
	}
	*total = now() - start - *prefault;
}

static void shrink(char *memory, uint64_t size, enum way way)
{
	if (way == REMAP) {
		unmap(0, size + STEP);
		map(memory, 0, size);
	} else {
		unmap(size, STEP);
	}
	make_inaccessible(memory, size, STEP);
	settle(memory + size, STEP);
	if (kind == OWN_FILE)
		check(fallocate(file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, size, STEP) == 0, "fallocate");
	else if (kind != ANONYMOUS)
		check(ftruncate(file, size) == 0, "ftruncate");
}

static void measure(uint64_t size, enum way way, int repetitions)
{
	char *memory = reserve(size + STEP);
	uint64_t piece = way == GRANULE ? STEP : size;
	int64_t total, prefault;

	activate(memory, 0, size);
	populate(memory, 0, size);
	for (uint64_t start = 0; start < size; start += piece)
		map(memory, start, piece);
	for (int i = 0; i < repetitions; i++) {
		grow(memory, size, way, &total, &prefault);
		printf("%llu %s %lld %lld\n", (unsigned long long)(size / MIB), names[way], (long long)total,
		       (long long)prefault);
		shrink(memory, size, way);
	}
	unmap(0, size);
	munmap(memory, size + STEP);
	if (file >= 0)
		close(file);
	file = -1;
}

int main(int count, char **words)
{
	struct vfio_group_status status = { .argsz = sizeof(status) };
	int group;

	if (count < 5)
		return 2;
	while (strcmp(words[3], kinds[kind]))
		if (++kind > OWN_FILE)
			return 2;
	container = open("/dev/vfio/vfio", O_RDWR);
	check(container >= 0, "/dev/vfio/vfio");
	group = open(words[1], O_RDWR);
	check(group >= 0, words[1]);
	check(ioctl(group, VFIO_GROUP_GET_STATUS, &status) == 0, "VFIO_GROUP_GET_STATUS");
	check(ioctl(group, VFIO_GROUP_SET_CONTAINER, &container) == 0, "VFIO_GROUP_SET_CONTAINER");
	check(ioctl(container, VFIO_SET_IOMMU, VFIO_TYPE1v2_IOMMU) == 0, "VFIO_SET_IOMMU");
	for (int i = 4; i < count; i++)
		for (enum way way = REMAP; way <= GRANULE; way++)
			measure(strtoull(words[i], NULL, 10) * MIB, way, atoi(words[2]));
	return 0;
}
