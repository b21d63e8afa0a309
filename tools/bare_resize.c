/*
 * The system calls of a grow and a shrink, and nothing else, for scripts/bench to compare pyvfio with.
 *
 * usage: bare_resize NODE BDF REPETITIONS MEMORY MIB...
 *
 * NODE is that of a group, for type1, or that of a device, for iommufd.
 * MEMORY is anonymous, memfd, hugetlb (a memfd of huge pages of 2 MiB) or file (a memfd that keeps its length).
 *
 * For each length and each way to map, a line for each repetition: MIB, the way, and how many nanoseconds it took to
 * have 2 MiB more behind the memory and the device reach them, to populate them in between, and to unmap them and give
 * the memory back again.
 */
#define _GNU_SOURCE
#include "bare_space.h"

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

enum way { REMAP, EXTEND, GRANULE, CUT_PAGES, CUT_REPLACE };
static const char *const names[] = { "remap", "extend", "granule", "cut-pages", "cut-replace" };

enum kind { ANONYMOUS, MEMFD, HUGETLB, OWN_FILE };
static const char *const kinds[] = { "anonymous", "memfd", "hugetlb", "file" };

static enum kind kind;
static int file = -1; /* what the memory is of, unless it is anonymous */
static int by_file = 1; /* whether IOMMU_IOAS_MAP_FILE exists: from Linux 6.13 on */

static int64_t now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1000000000LL + time.tv_nsec;
}

/* By the file where the kernel can, and by the address otherwise. */
static void map(char *memory, uint64_t start, uint64_t size)
{
	struct bare_map_file argument = {
		.size = sizeof(argument),
		.flags = FIXED_READ_WRITE,
		.ioas = ioas,
		.fd = file,
		.start = start,
		.length = size,
		.iova = IOVA + start,
	};

	if (ioas && kind != ANONYMOUS && by_file) {
		if (ioctl(space, IOMMUFD(15), &argument) == 0)
			return;
		check(errno == ENOTTY, "IOMMU_IOAS_MAP_FILE");
		by_file = 0;
	}
	map_memory(memory + start, IOVA + start, size);
}

static void unmap(uint64_t start, uint64_t size)
{
	unmap_memory(IOVA + start, size);
}

/* The call of type1, which an iommufd answers too, for the space that was chosen last. */
static void cut_pages(uint64_t start, uint64_t size)
{
	struct bare_vfio_ioas argument = { .size = sizeof(argument), .ioas = ioas, .operation = SET };

	check(ioctl(space, IOMMUFD(8), &argument) == 0, "IOMMU_VFIO_IOAS");
	unmap_type1(IOVA + start, size);
}

/* Copy the bytes in front of `end` into a new space, and move the device there. */
static void cut_replace(uint64_t end)
{
	struct bare_copy argument = {
		.size = sizeof(argument),
		.flags = FIXED_READ_WRITE,
		.target = new_ioas(1),
		.source = ioas,
		.length = end,
		.target_iova = IOVA,
		.source_iova = IOVA,
	};

	check(ioctl(space, IOMMUFD(3), &argument) == 0, "IOMMU_IOAS_COPY");
	attach(argument.target);
	destroy(ioas);
	ioas = argument.target;
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
	switch (way) {
	case REMAP:
		unmap(0, size + STEP);
		map(memory, 0, size);
		break;
	case CUT_PAGES:
		cut_pages(size, STEP);
		break;
	case CUT_REPLACE:
		cut_replace(size);
		break;
	default:
		unmap(size, STEP);
	}
	make_inaccessible(memory, size, STEP);
	settle(memory + size, STEP);
	if (kind == OWN_FILE)
		check(fallocate(file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, size, STEP) == 0, "fallocate");
	else if (kind != ANONYMOUS)
		check(ftruncate(file, size) == 0, "ftruncate");
}

/* A cut leaves the head of a mapping: it is made in one of two steps, of which the first stays. */
static int64_t cut(char *memory, uint64_t size, enum way way)
{
	int64_t start, shrinking;

	activate(memory, size, 2 * STEP);
	populate(memory, size, 2 * STEP);
	map(memory, size, 2 * STEP);
	start = now();
	shrink(memory, size + STEP, way);
	shrinking = now() - start;
	shrink(memory, size, EXTEND);
	return shrinking;
}

static void measure(uint64_t size, enum way way, int repetitions)
{
	char *memory = reserve(size + 2 * STEP);
	uint64_t piece = way == GRANULE ? STEP : size;
	int64_t total, prefault, start, shrinking;

	activate(memory, 0, size);
	populate(memory, 0, size);
	for (uint64_t first = 0; first < size; first += piece)
		map(memory, first, piece);
	for (int i = 0; i < repetitions; i++) {
		grow(memory, size, way, &total, &prefault);
		start = now();
		shrink(memory, size, way < CUT_PAGES ? way : EXTEND);
		shrinking = now() - start;
		if (way >= CUT_PAGES)
			shrinking = cut(memory, size, way);
		printf("%llu %s %lld %lld %lld\n", (unsigned long long)(size / MIB), names[way], (long long)total,
		       (long long)prefault, (long long)shrinking);
	}
	unmap(0, size);
	munmap(memory, size + 2 * STEP);
	if (file >= 0)
		close(file);
	file = -1;
}

/* A space whose mappings can be cut by pages is made so before anything is mapped. */
static void prepare(enum way way)
{
	uint32_t former = ioas;

	if (way < CUT_PAGES)
		return;
	ioas = new_ioas(way != CUT_PAGES);
	attach(ioas);
	destroy(former);
}

int main(int count, char **words)
{
	enum way last;

	if (count < 6)
		return 2;
	while (strcmp(words[4], kinds[kind]))
		if (++kind > OWN_FILE)
			return 2;
	open_space(words[1], words[2]);
	last = ioas ? CUT_REPLACE : GRANULE;
	for (enum way way = REMAP; way <= last; way++) {
		prepare(way);
		for (int i = 5; i < count; i++)
			measure(strtoull(words[i], NULL, 10) * MIB, way, atoi(words[3]));
	}
	return 0;
}
