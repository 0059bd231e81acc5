/*
 * Keeps the loading of a version apart from requests, in a model server that is not changed.
 *
 * Preload it (LD_PRELOAD) into tensorflow_model_server, beside jemalloc or without. SPIKELESS_ISOLATE=0 switches it
 * off; SPIKELESS_ISOLATE_WITHOUT leaves parts of it out, for measuring: "hide,pool,idle,pause,touch,unmap,arena". A
 * thread that lists a version's folder (one with a saved_model.pb) loads versions. From then on:
 *
 * - It does not see the folder's sub-folders. TensorFlow Serving sizes the folder twice a load (GetModelDiskSize), and
 *   starts and ends a pool of 256 threads for each folder that it sees. The estimate of a version's memory lacks what
 *   is in sub-folders; it matters only where the server has a limit.
 * - The pools that are left, one for each walk, cost requests nothing: their threads get stacks that are kept, run
 *   only while nothing else wants the processor, all on one processor, and start, wake and end one after the other.
 * - It runs only while nothing else wants the processor, but never waits for it long, and pauses after each half
 *   millisecond, so that its processor can take over requests that wait for another (priority.c). What it starts has
 *   normal priority.
 * - It allocates from an arena of its own, and so do its pools: parameters and what else a version consists of lie
 *   apart from the memory of requests, and allocating it takes no lock that a request waits for. Needs jemalloc.
 *
 * What it maps it touches, piece by piece, as far as that is in the page cache: else the first requests on a version
 * would enter its pages into the page table, one fault for each row that they look up.
 *
 * What it maps is unmapped piece by piece, by a thread that also runs only while nothing else wants the processor: else
 * the unloading of half a gigabyte keeps a processor for 10 ms.
 *
 * A pool's threads are known by their place: those that a thread starts after it has listed such a folder, and before
 * it waits for one to end. Of the functions of the C library that are replaced here a request calls one,
 * pthread_cond_signal, which then looks at one flag of its thread more. The others are called when files are listed or
 * mapped and when threads start and end.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "priority.h"

#define VERSION_FILE "saved_model.pb"
#define POOL_THREADS 256
/* Of each thread of a pool, with its guard page. They ask for the size of files and need about 10 KiB; only pages that
   are used take memory. */
#define STACK_BYTES (256 << 10)
/* After each start of a pool's thread its starter waits so many times as long as the start took, which tells how busy the
   processors are; at least and at most so long. The threads wake and end at the same pace. A load takes 0.8 s longer for
   two pools, and some seconds when the processors are busy. */
#define POOL_PACE 8
#define POOL_PACE_LEAST_NANOSECONDS 800000
#define POOL_PACE_MOST_NANOSECONDS 8000000

/* A version's files that are at least so large are touched and unmapped in pieces of that size, */
#define PIECE_BYTES (4 << 20)
/* with so much time between them: 0.15 s for 2 GiB. */
#define PIECE_PACE_NANOSECONDS 300000
/* A fault maps the pages around it that are in the page cache as well: what the kernel calls fault_around_bytes. */
#define AROUND_BYTES (64 << 10)
/* A file that needs the disk for so many faults is not in the page cache. */
#define DISK_FAULTS 64
#define MAPPINGS 1024

/* The next definition of a function that is replaced here: that of the C library, or of a library preloaded later.
   It may be asked for before `start`, by the constructor of another library. */
#define NEXT(name) ((__typeof__(&name))next(#name, &next_##name))

static void *next(const char *name, void *_Atomic *known) {
    void *function = atomic_load_explicit(known, memory_order_acquire);
    if (function == NULL) {
        function = dlsym(RTLD_NEXT, name);
        if (function == NULL) abort();
        atomic_store_explicit(known, function, memory_order_release);
    }
    return function;
}

static void *_Atomic next_opendir, *_Atomic next_readdir, *_Atomic next_readdir64, *_Atomic next_closedir,
    *_Atomic next_pthread_create, *_Atomic next_pthread_join, *_Atomic next_pthread_cond_signal;

/* jemalloc's, where it is loaded. */
extern int mallctl(const char *name, void *old, size_t *old_size, void *new, size_t new_size) __attribute__((weak));

static bool active;
static size_t page;

/* What is done, in the order of the list above; all of it unless SPIKELESS_ISOLATE_WITHOUT names it. */
static struct {
    bool hide, pool, idle, pause, arena, touch, unmap;
} does;

static bool is_left_out(const char *part) {
    const char *list = getenv("SPIKELESS_ISOLATE_WITHOUT");
    size_t length = strlen(part);
    for (const char *name = list; name != NULL && *name != 0; name += strcspn(name, ","), name += *name == ',')
        if (strcspn(name, ",") == length && strncmp(name, part, length) == 0) return true;
    return false;
}

__attribute__((constructor)) static void start(void) {
    const char *wanted = getenv("SPIKELESS_ISOLATE");
    active = wanted == NULL || strcmp(wanted, "0") != 0;
    page = (size_t)sysconf(_SC_PAGESIZE);
    does.hide = !is_left_out("hide");
    does.pool = !is_left_out("pool");
    does.idle = !is_left_out("idle");
    does.pause = !is_left_out("pause");
    does.arena = !is_left_out("arena");
    does.touch = !is_left_out("touch");
    does.unmap = !is_left_out("unmap");
}

/* What this thread is doing. */
static _Thread_local struct {
    bool loads;
    /* The version's folder that it is listing. */
    DIR *listed;
    /* How many threads of a pool it may start now. */
    int pool;
    /* Its processors, while it starts a pool on one of them. */
    cpu_set_t processors;
    bool bound;
    /* When it began to. */
    uint64_t began;
    /* Whether whom it wakes is a thread of a pool. */
    bool wakes_pool;
} self __attribute__((tls_model("initial-exec")));

/* An arena for loads ------------------------------------------------------------------------------------------- */

static pthread_once_t arena_once = PTHREAD_ONCE_INIT;
static unsigned arena;
static bool has_arena;

static void create_arena(void) {
    size_t size = sizeof arena;
    has_arena = mallctl != NULL && mallctl("arenas.create", &arena, &size, NULL, 0) == 0;
}

static void use_arena(void) {
    if (!does.arena) return;
    pthread_once(&arena_once, create_arena);
    if (has_arena) mallctl("thread.arena", NULL, NULL, &arena, sizeof arena);
}

/* This thread loads or unloads versions from now on. */
static void keep_apart(void) {
    if (!self.loads) {
        self.loads = true;
        use_arena();
        run_when_idle(does.idle, does.pause);
    }
    start_pauses();
}

/* Pools of threads --------------------------------------------------------------------------------------------- */

static struct worker {
    void *(*function)(void *);
    void *argument;
    atomic_bool taken;
} workers[POOL_THREADS];
static char *stacks;
static pthread_once_t stacks_once = PTHREAD_ONCE_INIT;
/* How far apart the threads of the last pool started. */
static _Atomic uint64_t apart;

static void create_stacks(void) {
    char *start = mmap(NULL, (size_t)POOL_THREADS * STACK_BYTES, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
    if (start == MAP_FAILED) return;
    for (size_t i = 0; i < POOL_THREADS; i++)
        if (mprotect(start + i * STACK_BYTES, page, PROT_NONE) != 0) return;
    stacks = start;
}

static uint64_t now(void) { return nanoseconds_of(CLOCK_MONOTONIC); }

/* A thread of a pool. */
static void *work(void *argument) {
    struct worker *worker = argument;
    struct sched_param none = {0};
    sched_setscheduler(0, SCHED_IDLE, &none);
    if (mallctl != NULL) {
        /* It allocates next to nothing: without a cache, 256 of them take 15 MiB less. */
        bool cache = false;
        mallctl("thread.tcache.enabled", NULL, NULL, &cache, sizeof cache);
        use_arena();
    }
    self.wakes_pool = true;
    return worker->function(worker->argument);
}

static struct worker *take_worker(void) {
    pthread_once(&stacks_once, create_stacks);
    if (stacks == NULL) return NULL;
    for (size_t i = 0; i < POOL_THREADS; i++) {
        bool taken = false;
        if (atomic_compare_exchange_strong(&workers[i].taken, &taken, true)) return &workers[i];
    }
    return NULL;
}

static int create_worker(pthread_t *thread, void *(*function)(void *), void *argument) {
    struct worker *worker = take_worker();
    if (worker == NULL) return NEXT(pthread_create)(thread, NULL, function, argument);
    worker->function = function;
    worker->argument = argument;
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstack(&attributes, stacks + (size_t)(worker - workers) * STACK_BYTES + page, STACK_BYTES - page);
    int error = NEXT(pthread_create)(thread, &attributes, work, worker);
    pthread_attr_destroy(&attributes);
    if (error != 0) atomic_store(&worker->taken, false);
    return error;
}

/* A thread inherits its processors: start the pool where its starter is. */
static void bind(void) {
    cpu_set_t one;
    int processor = sched_getcpu();
    if (processor < 0 || sched_getaffinity(0, sizeof self.processors, &self.processors) != 0) return;
    CPU_ZERO(&one);
    CPU_SET(processor, &one);
    self.bound = sched_setaffinity(0, sizeof one, &one) == 0;
}

static void unbind(void) {
    if (self.bound) sched_setaffinity(0, sizeof self.processors, &self.processors);
    self.bound = false;
}

/* What this thread starts and wakes from now on is of no pool. */
static void leave_pool(void) {
    self.pool = 0;
    self.wakes_pool = false;
    unbind();
}

int pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*function)(void *), void *argument) {
    if (self.pool == 0) {
        bool raised = run_normally();
        int error = NEXT(pthread_create)(thread, attributes, function, argument);
        if (raised) run_when_idle_again();
        return error;
    }
    uint64_t begin = now();
    if (self.pool == POOL_THREADS) {
        bind();
        self.began = begin;
    }
    int error = create_worker(thread, function, argument);
    uint64_t pace = POOL_PACE * (now() - begin);
    if (pace < POOL_PACE_LEAST_NANOSECONDS) pace = POOL_PACE_LEAST_NANOSECONDS;
    if (pace > POOL_PACE_MOST_NANOSECONDS) pace = POOL_PACE_MOST_NANOSECONDS;
    wait_for(pace);
    if (--self.pool == 0) {
        unbind();
        atomic_store(&apart, (now() - self.began) / POOL_THREADS);
        self.wakes_pool = true;
    }
    return error;
}

/* Eigen's pool ends when all of its threads wait for work. Who ends it wakes each of them, and without this they would
   wake together, look for work in 256 queues, wait again, and be woken together by the last of them: twice, a processor
   runs nothing but them for several milliseconds. Apart, each wakes once, sees that all the others wait, and ends. */
int pthread_cond_signal(pthread_cond_t *condition) {
    if (self.wakes_pool) wait_for(atomic_load(&apart));
    return NEXT(pthread_cond_signal)(condition);
}

int pthread_join(pthread_t thread, void **result) {
    leave_pool();
    stop_pauses();
    int error = NEXT(pthread_join)(thread, result);
    start_pauses();
    /* glibc keeps a thread's description, whose address is its name, at the end of its stack. */
    uintptr_t offset = (uintptr_t)thread - (uintptr_t)stacks;
    if (error == 0 && stacks != NULL && offset < (size_t)POOL_THREADS * STACK_BYTES)
        atomic_store(&workers[offset / STACK_BYTES].taken, false);
    return error;
}

/* Files that a version maps -------------------------------------------------------------------------------------- */

/* Those that a loading thread mapped; the start of a free place is 0. Further ones are unmapped as ever. */
static struct mapping {
    atomic_uintptr_t start;
    size_t size;
} mappings[MAPPINGS];

static void remember_mapping(void *start, size_t size) {
    for (size_t i = 0; i < MAPPINGS; i++) {
        uintptr_t none = 0;
        if (!atomic_compare_exchange_strong(&mappings[i].start, &none, 1)) continue;
        mappings[i].size = size;
        atomic_store(&mappings[i].start, (uintptr_t)start);
        return;
    }
}

static bool forget_mapping(void *start, size_t size) {
    for (size_t i = 0; i < MAPPINGS; i++) {
        uintptr_t expected = (uintptr_t)start;
        if (atomic_load(&mappings[i].start) != expected || mappings[i].size != size) continue;
        return atomic_compare_exchange_strong(&mappings[i].start, &expected, 0);
    }
    return false;
}

static long disk_faults(void) {
    struct rusage usage;
    return getrusage(RUSAGE_THREAD, &usage) == 0 ? usage.ru_majflt : 0;
}

/* Enters a file's pages into the page table. Takes the lock of this mapping alone, and only for one fault at a time. */
static void touch(const volatile char *start, size_t size, int file, off_t offset) {
    struct stat status;
    long before = disk_faults();
    /* Beyond the end of the file there is nothing to touch. */
    if (fstat(file, &status) != 0 || status.st_size - offset < (off_t)size) return;
    for (size_t done = 0; done < size; done += AROUND_BYTES) {
        if (done % PIECE_BYTES == 0) {
            if (disk_faults() - before >= DISK_FAULTS) return;
            wait_for(PIECE_PACE_NANOSECONDS);
        }
        (void)start[done];
    }
}

/* Without `next`: an allocator calls these before a process can look up functions. */
void *mmap(void *address, size_t size, int protection, int flags, int file, off_t offset) {
    void *start = (void *)syscall(SYS_mmap, address, size, protection, flags, file, offset);
    if (self.loads && file >= 0 && start != MAP_FAILED && protection == PROT_READ && size >= PIECE_BYTES) {
        if (does.unmap) remember_mapping(start, size);
        if (does.touch) touch(start, size, file, offset);
    }
    return start;
}

void *mmap64(void *address, size_t size, int protection, int flags, int file, off64_t offset)
    __attribute__((alias("mmap")));

/* Who unmaps what a load mapped unloads versions. The pages are let go piece by piece, before the mapping is. */
int munmap(void *start, size_t size) {
    if (size >= PIECE_BYTES && forget_mapping(start, size)) {
        keep_apart();
        for (size_t done = 0; done < size; done += PIECE_BYTES) {
            madvise((char *)start + done, size - done < PIECE_BYTES ? size - done : PIECE_BYTES, MADV_DONTNEED);
            wait_for(PIECE_PACE_NANOSECONDS);
        }
    }
    return (int)syscall(SYS_munmap, start, size);
}

/* Listing a version's folder ----------------------------------------------------------------------------------- */

DIR *opendir(const char *path) {
    DIR *directory = NEXT(opendir)(path);
    leave_pool();
    /* The first thread of a process loads nothing but its program. */
    if (directory == NULL || !active || syscall(SYS_gettid) == getpid()) return directory;
    if (faccessat(dirfd(directory), VERSION_FILE, F_OK, 0) != 0) return directory;
    self.listed = directory;
    keep_apart();
    return directory;
}

static bool is_hidden(DIR *directory, unsigned char type, const char *name) {
    struct stat status;
    if (!does.hide || directory != self.listed) return false;
    if (strcmp(name, ".") == 0 || strcmp(name, "..") == 0) return false;
    if (type != DT_UNKNOWN && type != DT_LNK) return type == DT_DIR;
    return fstatat(dirfd(directory), name, &status, 0) == 0 && S_ISDIR(status.st_mode);
}

struct dirent *readdir(DIR *directory) {
    struct dirent *entry;
    do entry = NEXT(readdir)(directory);
    while (entry != NULL && is_hidden(directory, entry->d_type, entry->d_name));
    return entry;
}

struct dirent64 *readdir64(DIR *directory) {
    struct dirent64 *entry;
    do entry = NEXT(readdir64)(directory);
    while (entry != NULL && is_hidden(directory, entry->d_type, entry->d_name));
    return entry;
}

int closedir(DIR *directory) {
    if (directory == self.listed) {
        self.listed = NULL;
        self.pool = does.pool ? POOL_THREADS : 0;
    }
    return NEXT(closedir)(directory);
}
