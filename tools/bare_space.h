/*
 * The two address spaces of VFIO in C and nothing else, for bare_calls.c and bare_resize.c.
 *
 * A node below /dev/vfio/devices is opened on an iommufd, any other node is that of a group, for type1. The structures
 * of <linux/iommufd.h> are repeated here, because headers before Linux 6.6 lack some of them.
 */
#ifndef BARE_SPACE_H
#define BARE_SPACE_H

#include <errno.h>
#include <fcntl.h>
#include <linux/vfio.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>

#define IOMMUFD(number) _IO(';', 0x80 + (number))

struct bare_destroy {
	uint32_t size, id;
};
struct bare_alloc {
	uint32_t size, flags, id;
};
struct bare_map {
	uint32_t size, flags, ioas, reserved;
	uint64_t vaddr, length, iova;
};
struct bare_map_file {
	uint32_t size, flags, ioas;
	int32_t fd;
	uint64_t start, length, iova;
};
struct bare_copy {
	uint32_t size, flags, target, source;
	uint64_t length, target_iova, source_iova;
};
struct bare_unmap {
	uint32_t size, ioas;
	uint64_t iova, length;
};
struct bare_option {
	uint32_t size, option;
	uint16_t operation, reserved;
	uint32_t object;
	uint64_t value;
};
struct bare_vfio_ioas {
	uint32_t size, ioas;
	uint16_t operation, reserved;
};
struct bare_bind {
	uint32_t argsz, flags;
	int32_t iommufd;
	uint32_t device;
};
struct bare_attach {
	uint32_t argsz, flags, id;
};

#define FIXED_READ_WRITE 7 /* IOMMU_IOAS_MAP_FIXED_IOVA | _WRITEABLE | _READABLE */
#define HUGE_PAGES 1       /* IOMMU_OPTION_HUGE_PAGES */
#define SET 1              /* IOMMU_VFIO_IOAS_SET */

static int space = -1, device = -1; /* the container or the iommufd, and the device */
static uint32_t ioas;               /* the number of the address space on an iommufd; 0 on type1 */

static void check(int good, const char *what)
{
	if (!good) {
		fprintf(stderr, "%s: %s\n", what, strerror(errno));
		exit(1);
	}
}

static uint32_t new_ioas(int large_pages)
{
	struct bare_alloc made = { .size = sizeof(made) };
	struct bare_option option = { .size = sizeof(option), .option = HUGE_PAGES };

	check(ioctl(space, IOMMUFD(1), &made) == 0, "IOMMU_IOAS_ALLOC");
	option.object = made.id;
	if (!large_pages)
		check(ioctl(space, IOMMUFD(7), &option) == 0, "IOMMU_OPTION");
	return made.id;
}

static inline void destroy(uint32_t id)
{
	struct bare_destroy argument = { .size = sizeof(argument), .id = id };

	check(ioctl(space, IOMMUFD(0), &argument) == 0, "IOMMU_DESTROY");
}

/* Attach the device to a space, in place of the present one. */
static void attach(uint32_t id)
{
	struct bare_attach argument = { .argsz = sizeof(argument), .id = id };

	check(ioctl(device, _IO(';', 119), &argument) == 0, "VFIO_DEVICE_ATTACH_IOMMUFD_PT");
}

static void open_iommufd(const char *node)
{
	struct bare_bind argument = { .argsz = sizeof(argument) };

	space = open("/dev/iommu", O_RDWR | O_CLOEXEC);
	check(space >= 0, "/dev/iommu");
	device = open(node, O_RDWR | O_CLOEXEC);
	check(device >= 0, node);
	argument.iommufd = space;
	check(ioctl(device, _IO(';', 118), &argument) == 0, "VFIO_DEVICE_BIND_IOMMUFD");
	ioas = new_ioas(1);
	attach(ioas);
}

static void open_type1(const char *node, const char *bdf)
{
	struct vfio_group_status status = { .argsz = sizeof(status) };
	int group;

	space = open("/dev/vfio/vfio", O_RDWR | O_CLOEXEC);
	check(space >= 0, "/dev/vfio/vfio");
	group = open(node, O_RDWR | O_CLOEXEC);
	check(group >= 0, node);
	check(ioctl(group, VFIO_GROUP_GET_STATUS, &status) == 0, "VFIO_GROUP_GET_STATUS");
	check(ioctl(group, VFIO_GROUP_SET_CONTAINER, &space) == 0, "VFIO_GROUP_SET_CONTAINER");
	check(ioctl(space, VFIO_SET_IOMMU, VFIO_TYPE1v2_IOMMU) == 0, "VFIO_SET_IOMMU");
	device = ioctl(group, VFIO_GROUP_GET_DEVICE_FD, bdf);
	check(device >= 0, "VFIO_GROUP_GET_DEVICE_FD");
}

static void open_space(const char *node, const char *bdf)
{
	if (strstr(node, "/vfio/devices/"))
		open_iommufd(node);
	else
		open_type1(node, bdf);
}

static void map_memory(const void *memory, uint64_t iova, uint64_t size)
{
	struct vfio_iommu_type1_dma_map for_type1 = {
		.argsz = sizeof(for_type1),
		.flags = VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE,
		.vaddr = (uintptr_t)memory,
		.iova = iova,
		.size = size,
	};
	struct bare_map argument = {
		.size = sizeof(argument),
		.flags = FIXED_READ_WRITE,
		.ioas = ioas,
		.vaddr = (uintptr_t)memory,
		.length = size,
		.iova = iova,
	};

	if (ioas)
		check(ioctl(space, IOMMUFD(5), &argument) == 0, "IOMMU_IOAS_MAP");
	else
		check(ioctl(space, VFIO_IOMMU_MAP_DMA, &for_type1) == 0, "VFIO_IOMMU_MAP_DMA");
}

static void unmap_type1(uint64_t iova, uint64_t size)
{
	struct vfio_iommu_type1_dma_unmap argument = { .argsz = sizeof(argument), .iova = iova, .size = size };

	check(ioctl(space, VFIO_IOMMU_UNMAP_DMA, &argument) == 0 && argument.size == size, "VFIO_IOMMU_UNMAP_DMA");
}

static void unmap_memory(uint64_t iova, uint64_t size)
{
	struct bare_unmap argument = { .size = sizeof(argument), .ioas = ioas, .iova = iova, .length = size };

	if (ioas)
		check(ioctl(space, IOMMUFD(6), &argument) == 0 && argument.length == size, "IOMMU_IOAS_UNMAP");
	else
		unmap_type1(iova, size);
}

#endif
