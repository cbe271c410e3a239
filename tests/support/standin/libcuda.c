/* A stand-in for libcuda.so.1: the driver's virtual memory calls over host memory.
 *
 * It enforces the rules of the real driver, so that a sequence of calls that passes here breaks
 * none of them: sizes and addresses in multiples of the granularity, offset 0, whole mappings
 * unmapped, nothing mapped twice, no access before cuMemSetAccess, no cuMemAddressFree while
 * mapped, memory that lives until its last handle is released, its last mapping gone and its last
 * descriptor closed, limits on memory and mappings, a current context for every call. New memory
 * holds garbage (0xA5). Work "in flight" on a range makes unmapping it an error until an event
 * recorded later was waited for. Values of handles and events that went are used again, at once.
 *
 * What is exported can be imported by another process that has a stand-in, as memory that both see:
 * it moves to a file of its own then. An import has a handle of its own, whose value says nothing.
 *
 * What it shows is the correctness of sequences; it says nothing of speed, of kernels that fault,
 * or of rules that NVIDIA does not document. The standin_… functions are the tests' controls.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <dirent.h>
#include <fcntl.h>
#include <unistd.h>

enum {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    INVALID_DEVICE = 101,
    INVALID_CONTEXT = 201,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    ILLEGAL_ADDRESS = 700,
    NOT_SUPPORTED = 801,
    UNKNOWN = 999,
};
enum { MAX_ITEMS = 1 << 16, MAX_DEPTH = 16, NUM_EVENTS = 1 << 12, GARBAGE = 0xA5 };
enum { LEAST_PRIORITY = 0, GREATEST_PRIORITY = -5 };
static const char HANDLE_FILE[] = "standin-handle";

typedef uint64_t Address;
typedef struct { int type, id; } Location;
typedef struct {
    int type, requested_handle_types;
    Location location;
    void *win32_metadata;
    unsigned char flags[8];
} Properties;
typedef struct { Location location; int flags; } Access;

typedef struct { Address start; size_t size; } Reservation;
typedef struct {
    size_t size;
    off_t offset;
    int fd; /* a file of its own, since it was exported; -1: the one of all others */
    ino_t inode; /* of that */
    int num_handles, num_mappings, exportable;
} Memory;
typedef struct { ino_t inode; size_t size; } Orphan; /* nobody's, but for descriptors */
typedef struct { char bytes[16]; } Uuid;
typedef struct { Address start; size_t size; unsigned memory; int accessible; } Mapping;
typedef struct { Address start; size_t size; uint64_t moment; } Work;
typedef struct { int alive, recorded; uint64_t moment; } Event;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int initialised, memfd = -1;
static size_t granularity = 2 << 20;
static size_t memory_limit = (size_t)1 << 30, memory_used;
static size_t mapping_limit = MAX_ITEMS;
static off_t next_offset;
static Reservation reservations[MAX_ITEMS];
static Memory memories[MAX_ITEMS]; /* size 0 where there is none */
static unsigned handles[MAX_ITEMS]; /* index + 1 is the handle: which memory, plus 1; 0 for none */
static Orphan orphans[MAX_ITEMS];
static Mapping mappings[MAX_ITEMS];
static Work works[MAX_ITEMS];
static Event events[NUM_EVENTS];
static size_t num_reservations, num_memories, num_mappings, num_works, num_streams, num_orphans;
static int are_handles_refused;
static int num_retained;
static uint64_t now, num_calls;
static int64_t calls_to_failure = -1;
static int failure_status = UNKNOWN;
static char context_tag; /* its address is the primary context */
static __thread void *context_stack[MAX_DEPTH];
static __thread int context_depth;

/* -- the tests' controls ------------------------------------------------------------------ */

void standin_reset(size_t new_granularity, size_t new_memory_limit, size_t new_mapping_limit) {
    pthread_mutex_lock(&lock);
    for (size_t i = 0; i < num_reservations; i++)
        munmap((void *)reservations[i].start, reservations[i].size);
    for (size_t i = 0; i < num_memories; i++)
        if (memories[i].size && memories[i].fd >= 0)
            close(memories[i].fd);
    if (memfd >= 0)
        close(memfd);
    memfd = memfd_create("standin", MFD_CLOEXEC);
    granularity = new_granularity;
    memory_limit = new_memory_limit;
    mapping_limit = new_mapping_limit < MAX_ITEMS ? new_mapping_limit : MAX_ITEMS;
    num_reservations = num_memories = num_mappings = num_works = num_streams = num_orphans = 0;
    are_handles_refused = 0;
    memset(events, 0, sizeof events);
    memset(handles, 0, sizeof handles);
    memory_used = 0;
    next_offset = 0;
    num_retained = 0;
    num_calls = 0;
    calls_to_failure = -1;
    pthread_mutex_unlock(&lock);
}

/* The k-th call from now (1 is the next) fails with `status`; 0 takes the order back. Calls that
 * only ask, or switch contexts, do not count. */
void standin_fail_at(int64_t k, int status) {
    calls_to_failure = k > 0 ? k : -1;
    failure_status = status;
}

int standin_failure_pending(void) { return calls_to_failure > 0; }
uint64_t standin_calls(void) { return num_calls; }
/* Whether a file is open in this process. */
static int is_open(ino_t inode) {
    DIR *listing = opendir("/proc/self/fd");
    int found = 0;
    for (struct dirent *entry; !found && listing && (entry = readdir(listing));) {
        struct stat status;
        found = !fstatat(dirfd(listing), entry->d_name, &status, 0) && status.st_ino == inode;
    }
    closedir(listing);
    return found;
}

/* What is allocated: memory that only a descriptor is left of, too. */
size_t standin_memory_used(void) {
    size_t kept = 0, sum = memory_used;
    for (size_t i = 0; i < num_orphans; i++)
        if (is_open(orphans[i].inode)) {
            sum += orphans[i].size;
            orphans[kept++] = orphans[i];
        }
    num_orphans = kept;
    return sum;
}

/* Files that it keeps open itself, which the real driver has none of. */
size_t standin_num_files(void) {
    size_t count = 0;
    for (size_t i = 0; i < num_memories; i++)
        count += memories[i].size && memories[i].fd >= 0;
    return count;
}

/* From here on memory that could be exported is refused, as on systems that have no such. */
void standin_refuse_exportable(void) { are_handles_refused = 1; }

size_t standin_num_mappings(void) { return num_mappings; }
size_t standin_num_reservations(void) { return num_reservations; }
size_t standin_num_streams(void) { return num_streams; }
int standin_num_retained(void) { return num_retained; }

size_t standin_num_events(void) {
    size_t count = 0;
    for (int i = 0; i < NUM_EVENTS; i++)
        count += events[i].alive;
    return count;
}

/* From here on a kernel is touching the range, until an event recorded later is waited for. */
void standin_begin_work(Address start, size_t size) {
    pthread_mutex_lock(&lock);
    works[num_works++] = (Work){start, size, ++now};
    pthread_mutex_unlock(&lock);
}

static void finish_work(uint64_t moment) {
    size_t kept = 0;
    for (size_t i = 0; i < num_works; i++)
        if (works[i].moment > moment)
            works[kept++] = works[i];
    num_works = kept;
}

void standin_end_work(void) {
    pthread_mutex_lock(&lock);
    finish_work(now);
    pthread_mutex_unlock(&lock);
}

/* -- the frame around every call ---------------------------------------------------------- */

static int enter(void) {
    pthread_mutex_lock(&lock);
    num_calls++;
    if (!initialised)
        return NOT_INITIALIZED;
    if (!context_depth || !num_retained)
        return INVALID_CONTEXT;
    if (calls_to_failure > 0 && --calls_to_failure == 0) {
        calls_to_failure = -1;
        return failure_status;
    }
    return SUCCESS;
}

static int leave(int status) {
    pthread_mutex_unlock(&lock);
    return status;
}

#define ENTER()                   \
    do {                          \
        int entered = enter();    \
        if (entered)              \
            return leave(entered); \
    } while (0)
#define REQUIRE(condition, status) \
    do {                           \
        if (!(condition))          \
            return leave(status);  \
    } while (0)

static int is_multiple(uint64_t value) { return value && value % granularity == 0; }

static int overlap(Address a, size_t a_size, Address b, size_t b_size) {
    return a < b + b_size && b < a + a_size;
}

static Reservation *reservation_around(Address start, size_t size) {
    for (size_t i = 0; i < num_reservations; i++) {
        Reservation *r = &reservations[i];
        if (r->start <= start && start + size <= r->start + r->size)
            return r;
    }
    return NULL;
}

static Mapping *mapping_over(Address start, size_t size) {
    for (size_t i = 0; i < num_mappings; i++)
        if (overlap(start, size, mappings[i].start, mappings[i].size))
            return &mappings[i];
    return NULL;
}

static Memory *memory_of(uint64_t handle) {
    return handle && handle <= MAX_ITEMS && handles[handle - 1] ? &memories[handles[handle - 1] - 1]
                                                                : NULL;
}

/* The lowest value that is free; 0 if there is none. */
static uint64_t new_handle(Memory *memory) {
    for (size_t i = 0; i < MAX_ITEMS; i++)
        if (!handles[i]) {
            handles[i] = (unsigned)(memory - memories) + 1;
            memory->num_handles++;
            return i + 1;
        }
    return 0;
}

static int file_of(const Memory *memory) { return memory->fd < 0 ? memfd : memory->fd; }

static void punch(const Memory *memory) {
    fallocate(memfd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, memory->offset, memory->size);
}

static void drop_if_dead(Memory *memory) {
    if (memory->num_handles || memory->num_mappings)
        return;
    if (memory->fd < 0) {
        punch(memory);
    } else {
        close(memory->fd);
        if (num_orphans < MAX_ITEMS)
            orphans[num_orphans++] = (Orphan){memory->inode, memory->size};
    }
    memory_used -= memory->size;
    memory->size = 0;
}

static int show(const Mapping *mapping) {
    const Memory *memory = &memories[mapping->memory];
    int protection = PROT_READ | PROT_WRITE, flags = MAP_SHARED | MAP_FIXED;
    void *view = mmap((void *)mapping->start, mapping->size, protection, flags, file_of(memory),
                      memory->offset);
    return view == MAP_FAILED ? UNKNOWN : SUCCESS;
}

/* Give memory a file of its own, which another process can be shown and nothing else with it. */
static int move_out(Memory *memory) {
    int fd = memfd_create(HANDLE_FILE, MFD_CLOEXEC);
    struct stat status;
    loff_t from = memory->offset, to = 0;
    if (fd < 0 || ftruncate(fd, memory->size) || fstat(fd, &status))
        return OUT_OF_MEMORY;
    for (size_t left = memory->size; left;) {
        ssize_t copied = copy_file_range(memfd, &from, fd, &to, left, 0);
        if (copied <= 0)
            return UNKNOWN;
        left -= copied;
    }
    punch(memory);
    memory->fd = fd;
    memory->offset = 0;
    memory->inode = status.st_ino;
    for (size_t i = 0; i < num_mappings; i++)
        if (&memories[mappings[i].memory] == memory && mappings[i].accessible && show(&mappings[i]))
            return UNKNOWN;
    return SUCCESS;
}

static int deny(Address start, size_t size) {
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
    return mmap((void *)start, size, PROT_NONE, flags, -1, 0) == MAP_FAILED ? UNKNOWN : SUCCESS;
}

/* -- initialisation, devices, contexts ---------------------------------------------------- */

static int cuInit(unsigned flags) {
    (void)flags;
    if (memfd < 0)
        memfd = memfd_create("standin", MFD_CLOEXEC);
    initialised = 1;
    return SUCCESS;
}

static int cuDeviceGetCount(int *count) {
    *count = 1;
    return initialised ? SUCCESS : NOT_INITIALIZED;
}

static int cuDeviceGet(int *device, int ordinal) {
    *device = ordinal;
    return ordinal == 0 ? SUCCESS : INVALID_DEVICE;
}

static int cuDeviceGetAttribute(int *value, int attribute, int device) {
    (void)attribute;
    *value = 1;
    return device == 0 ? SUCCESS : INVALID_DEVICE;
}

static int cuDeviceGetUuid(Uuid *uuid, int device) {
    memset(uuid, 0, sizeof *uuid);
    uuid->bytes[15] = 7;
    return device == 0 ? SUCCESS : INVALID_DEVICE;
}

static int cuDevicePrimaryCtxRetain(void **context, int device) {
    if (device != 0)
        return INVALID_DEVICE;
    num_retained++;
    *context = &context_tag;
    return SUCCESS;
}

static int cuDevicePrimaryCtxRelease(int device) {
    if (device != 0 || !num_retained)
        return INVALID_CONTEXT;
    num_retained--;
    return SUCCESS;
}

static int cuCtxGetCurrent(void **context) {
    *context = context_depth ? context_stack[context_depth - 1] : NULL;
    return SUCCESS;
}

static int cuCtxPushCurrent(void *context) {
    if (context != &context_tag || context_depth == MAX_DEPTH)
        return INVALID_CONTEXT;
    context_stack[context_depth++] = context;
    return SUCCESS;
}

static int cuCtxPopCurrent(void **context) {
    if (!context_depth)
        return INVALID_CONTEXT;
    *context = context_stack[--context_depth];
    return SUCCESS;
}

/* -- virtual memory ----------------------------------------------------------------------- */

static int cuMemGetAllocationGranularity(size_t *value, const Properties *properties, int option) {
    (void)option;
    *value = granularity;
    return properties->type == 1 && properties->location.type == 1 ? SUCCESS : INVALID_VALUE;
}

static int cuMemAddressReserve(
    Address *start, size_t size, size_t alignment, Address wanted, uint64_t flags
) {
    ENTER();
    REQUIRE(is_multiple(size) && !wanted && !flags, INVALID_VALUE);
    REQUIRE(!(alignment & (alignment - 1)), INVALID_VALUE);
    REQUIRE(num_reservations < MAX_ITEMS, OUT_OF_MEMORY);
    if (alignment < granularity)
        alignment = granularity;
    int flags_of_mmap = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void *base = mmap(NULL, size + alignment, PROT_NONE, flags_of_mmap, -1, 0);
    REQUIRE(base != MAP_FAILED, OUT_OF_MEMORY);
    size_t head = -(Address)base % alignment;
    if (head)
        munmap(base, head);
    munmap((char *)base + head + size, alignment - head);
    *start = (Address)base + head;
    reservations[num_reservations++] = (Reservation){*start, size};
    return leave(SUCCESS);
}

static int cuMemAddressFree(Address start, size_t size) {
    ENTER();
    Reservation *r = reservation_around(start, size);
    REQUIRE(r && r->start == start && r->size == size, INVALID_VALUE);
    REQUIRE(!mapping_over(start, size), INVALID_VALUE);
    munmap((void *)start, size);
    *r = reservations[--num_reservations];
    return leave(SUCCESS);
}

static int cuMemCreate(
    uint64_t *handle, size_t size, const Properties *properties, uint64_t flags
) {
    ENTER();
    REQUIRE(is_multiple(size) && !flags, INVALID_VALUE);
    REQUIRE(properties->type == 1 && properties->location.type == 1, INVALID_VALUE);
    REQUIRE(properties->location.id == 0, INVALID_DEVICE);
    REQUIRE(!properties->requested_handle_types || !are_handles_refused, NOT_SUPPORTED);
    REQUIRE(standin_memory_used() + size <= memory_limit && num_memories < MAX_ITEMS, OUT_OF_MEMORY);
    off_t offset = next_offset;
    REQUIRE(fallocate(memfd, 0, offset, size) == 0, OUT_OF_MEMORY);
    void *view = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, memfd, offset);
    REQUIRE(view != MAP_FAILED, OUT_OF_MEMORY);
    memset(view, GARBAGE, size);
    munmap(view, size);
    next_offset += size;
    memory_used += size;
    memories[num_memories] =
        (Memory){.size = size, .offset = offset, .fd = -1,
                 .exportable = properties->requested_handle_types};
    *handle = new_handle(&memories[num_memories++]);
    return leave(*handle ? SUCCESS : OUT_OF_MEMORY);
}

static int cuMemRelease(uint64_t handle) {
    ENTER();
    Memory *memory = memory_of(handle);
    REQUIRE(memory, INVALID_VALUE);
    handles[handle - 1] = 0;
    memory->num_handles--;
    drop_if_dead(memory);
    return leave(SUCCESS);
}

static int cuMemExportToShareableHandle(int *fd, uint64_t handle, int type, uint64_t flags) {
    ENTER();
    Memory *memory = memory_of(handle);
    REQUIRE(memory && type == 1 && (memory->exportable & type) && !flags, INVALID_VALUE);
    REQUIRE(!are_handles_refused, NOT_SUPPORTED);
    REQUIRE(memory->fd >= 0 || move_out(memory) == SUCCESS, UNKNOWN);
    *fd = fcntl(memory->fd, F_DUPFD_CLOEXEC, 0);
    REQUIRE(*fd >= 0, OUT_OF_MEMORY);
    return leave(SUCCESS);
}

static int cuMemImportFromShareableHandle(uint64_t *handle, void *fd, int type) {
    ENTER();
    REQUIRE(type == 1, INVALID_VALUE);
    char link[64], name[64] = "";
    snprintf(link, sizeof link, "/proc/self/fd/%d", (int)(intptr_t)fd);
    REQUIRE(readlink(link, name, sizeof name - 1) > 0 && strstr(name, HANDLE_FILE), INVALID_VALUE);
    struct stat status;
    REQUIRE(!fstat((int)(intptr_t)fd, &status) && is_multiple(status.st_size), INVALID_VALUE);
    Memory *memory = NULL;
    for (size_t i = 0; i < num_memories && !memory; i++)
        if (memories[i].size && memories[i].fd >= 0 && memories[i].inode == status.st_ino)
            memory = &memories[i];
    if (!memory) { /* another process's, or what only the descriptor was left of */
        REQUIRE(num_memories < MAX_ITEMS, OUT_OF_MEMORY);
        int own = fcntl((int)(intptr_t)fd, F_DUPFD_CLOEXEC, 0);
        REQUIRE(own >= 0, OUT_OF_MEMORY);
        memory = &memories[num_memories++];
        *memory = (Memory){.size = status.st_size, .fd = own, .inode = status.st_ino,
                           .exportable = type};
        memory_used += memory->size;
        for (size_t i = 0; i < num_orphans; i++)
            if (orphans[i].inode == status.st_ino)
                orphans[i] = orphans[--num_orphans];
    }
    *handle = new_handle(memory);
    return leave(*handle ? SUCCESS : OUT_OF_MEMORY);
}

static int cuMemMap(Address start, size_t size, size_t offset, uint64_t handle, uint64_t flags) {
    ENTER();
    Memory *memory = memory_of(handle);
    REQUIRE(memory, INVALID_HANDLE);
    REQUIRE(is_multiple(start) && size == memory->size && !offset && !flags, INVALID_VALUE);
    REQUIRE(reservation_around(start, size) && !mapping_over(start, size), INVALID_VALUE);
    REQUIRE(num_mappings < MAX_ITEMS, OUT_OF_MEMORY);
    mappings[num_mappings++] = (Mapping){start, size, memory - memories, 0};
    memory->num_mappings++;
    return leave(SUCCESS);
}

static int cuMemSetAccess(Address start, size_t size, const Access *access, size_t count) {
    ENTER();
    REQUIRE(is_multiple(start) && is_multiple(size) && count == 1, INVALID_VALUE);
    REQUIRE(access->location.type == 1 && access->location.id == 0, INVALID_DEVICE);
    REQUIRE(access->flags == 3, INVALID_VALUE);
    /* Real cards meet their limit on mappings here and not in cuMemMap. */
    REQUIRE(num_mappings <= mapping_limit, OUT_OF_MEMORY);
    size_t covered = 0;
    for (size_t i = 0; i < num_mappings; i++) {
        Mapping *m = &mappings[i];
        if (!overlap(start, size, m->start, m->size))
            continue;
        REQUIRE(start <= m->start && m->start + m->size <= start + size, INVALID_VALUE);
        covered += m->size;
    }
    REQUIRE(covered == size, INVALID_VALUE);
    for (size_t i = 0; i < num_mappings; i++) {
        Mapping *m = &mappings[i];
        if (!overlap(start, size, m->start, m->size) || m->accessible)
            continue;
        REQUIRE(show(m) == SUCCESS, UNKNOWN);
        m->accessible = 1;
    }
    return leave(SUCCESS);
}

static int cuMemUnmap(Address start, size_t size) {
    ENTER();
    Mapping *m = mapping_over(start, size);
    REQUIRE(m && m->start == start && m->size == size, INVALID_VALUE);
    for (size_t i = 0; i < num_works; i++)
        REQUIRE(!overlap(start, size, works[i].start, works[i].size), ILLEGAL_ADDRESS);
    REQUIRE(deny(start, size) == SUCCESS, UNKNOWN);
    Memory *memory = &memories[m->memory];
    *m = mappings[--num_mappings];
    memory->num_mappings--;
    drop_if_dead(memory);
    return leave(SUCCESS);
}

/* -- streams and events: work is instantaneous except for standin_begin_work --------------- */

static int cuCtxGetStreamPriorityRange(int *least, int *greatest) {
    *least = LEAST_PRIORITY;
    *greatest = GREATEST_PRIORITY;
    return context_depth ? SUCCESS : INVALID_CONTEXT;
}

static int cuStreamCreateWithPriority(void **stream, unsigned flags, int priority) {
    ENTER();
    /* The driver takes any priority; what clears memory wants the greatest, and to wait for none. */
    REQUIRE(flags == 1 && priority == GREATEST_PRIORITY, INVALID_VALUE);
    num_streams++;
    *stream = &num_streams;
    return leave(SUCCESS);
}

static int cuStreamDestroy(void *stream) {
    ENTER();
    REQUIRE(stream == &num_streams && num_streams, INVALID_HANDLE);
    num_streams--;
    return leave(SUCCESS);
}

static int cuStreamSynchronize(void *stream) {
    ENTER();
    REQUIRE(stream == &num_streams && num_streams, INVALID_HANDLE);
    return leave(SUCCESS);
}

static int cuMemsetD8Async(Address start, unsigned char value, size_t size, void *stream) {
    ENTER();
    REQUIRE(stream == &num_streams && num_streams, INVALID_HANDLE);
    Mapping *m = mapping_over(start, size);
    REQUIRE(m && m->start == start && m->size == size, INVALID_VALUE);
    REQUIRE(m->accessible, ILLEGAL_ADDRESS);
    memset((void *)start, value, size);
    return leave(SUCCESS);
}

static int is_event(Event *event) {
    return event >= events && event < events + NUM_EVENTS && event->alive;
}

static int cuEventCreate(void **event, unsigned flags) {
    (void)flags;
    ENTER();
    for (int i = 0; i < NUM_EVENTS; i++)
        if (!events[i].alive) {
            events[i] = (Event){1, 0, 0};
            *event = &events[i];
            return leave(SUCCESS);
        }
    return leave(OUT_OF_MEMORY);
}

static int cuEventRecord(void *event, void *stream) {
    (void)stream;
    ENTER();
    Event *e = event;
    REQUIRE(is_event(e), INVALID_HANDLE);
    e->recorded = 1;
    e->moment = now;
    return leave(SUCCESS);
}

static int cuEventSynchronize(void *event) {
    ENTER();
    Event *e = event;
    REQUIRE(is_event(e), INVALID_HANDLE);
    if (e->recorded)
        finish_work(e->moment);
    return leave(SUCCESS);
}

static int cuEventDestroy(void *event) {
    ENTER();
    Event *e = event;
    REQUIRE(is_event(e), INVALID_HANDLE);
    e->alive = 0;
    return leave(SUCCESS);
}

/* -- errors, and the door through which the bindings find everything ----------------------- */

static int cuGetErrorString(int error, const char **text) {
    switch (error) {
    case SUCCESS: *text = "no error"; break;
    case INVALID_VALUE: *text = "a rule of the stand-in was broken"; break;
    case OUT_OF_MEMORY: *text = "out of memory"; break;
    case INVALID_CONTEXT: *text = "no context is current"; break;
    case INVALID_HANDLE: *text = "no such handle"; break;
    case NOT_SUPPORTED: *text = "not supported here"; break;
    case ILLEGAL_ADDRESS: *text = "memory in use, or not accessible"; break;
    default: *text = "a stand-in error";
    }
    return SUCCESS;
}

#define ENTRY(name) {#name, name}
static const struct { const char *name; void *function; } entries[] = {
    ENTRY(cuInit), ENTRY(cuGetErrorString),
    ENTRY(cuDeviceGetCount), ENTRY(cuDeviceGet), ENTRY(cuDeviceGetAttribute),
    ENTRY(cuDeviceGetUuid),
    ENTRY(cuDevicePrimaryCtxRetain), ENTRY(cuDevicePrimaryCtxRelease),
    ENTRY(cuCtxGetCurrent), ENTRY(cuCtxPushCurrent), ENTRY(cuCtxPopCurrent),
    ENTRY(cuMemGetAllocationGranularity), ENTRY(cuMemAddressReserve), ENTRY(cuMemAddressFree),
    ENTRY(cuMemCreate), ENTRY(cuMemRelease), ENTRY(cuMemMap), ENTRY(cuMemSetAccess),
    ENTRY(cuMemExportToShareableHandle), ENTRY(cuMemImportFromShareableHandle),
    ENTRY(cuMemUnmap), ENTRY(cuMemsetD8Async),
    ENTRY(cuCtxGetStreamPriorityRange), ENTRY(cuStreamCreateWithPriority),
    ENTRY(cuStreamSynchronize), ENTRY(cuStreamDestroy),
    ENTRY(cuEventCreate), ENTRY(cuEventRecord), ENTRY(cuEventSynchronize), ENTRY(cuEventDestroy),
};

int cuGetProcAddress_v2(
    const char *name, void **function, int version, uint64_t flags, int *found
) {
    (void)version, (void)flags;
    *function = NULL;
    for (size_t i = 0; i < sizeof entries / sizeof *entries; i++)
        if (!strcmp(entries[i].name, name))
            *function = entries[i].function;
    if (found)
        *found = *function ? 0 : 1; /* CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND */
    return *function ? SUCCESS : NOT_FOUND;
}
