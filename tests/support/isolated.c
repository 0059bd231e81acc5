/*
 * Does what a model server does when it loads a version, and prints what it saw: `isolated FOLDER SECONDS`.
 *
 * FOLDER is a version's folder. For so many SECONDS a thread that loads waits for SCHED_IDLE before it says that it has
 * not got it: on a busy machine it may just then be lent normal priority. Lines are "NAME VALUE".
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define THREADS 256

extern int mallctl(const char *name, void *old, size_t *old_size, void *new, size_t new_size) __attribute__((weak));

static const char *folder;
static long patience;
static struct waiter {
    pthread_mutex_t lock;
    pthread_cond_t condition;
    bool woken;
} waiters[THREADS];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static atomic_int idle, bound, peers;
static atomic_bool done;
static char *volatile parameters;
static const char *table;
static size_t table_size;
static unsigned long table_sum;

static int processors(void) {
    cpu_set_t set;
    sched_getaffinity(0, sizeof set, &set);
    return CPU_COUNT(&set);
}

static int settled_policy(void) {
    int policy = sched_getscheduler(0);
    for (long tries = patience * 100; policy != SCHED_IDLE && tries > 0; tries--) {
        usleep(10000);
        policy = sched_getscheduler(0);
    }
    return policy;
}

static int entries(const char *path) {
    int count = 0;
    DIR *directory = opendir(path);
    while (readdir(directory) != NULL) count++;
    closedir(directory);
    return count;
}

/* Waits until it is woken, as the threads of Eigen's pool do before they end. */
static void *work(void *argument) {
    struct waiter *waiter = argument;
    atomic_fetch_add(&idle, sched_getscheduler(0) == SCHED_IDLE);
    atomic_fetch_add(&bound, processors() == 1);
    pthread_mutex_lock(&waiter->lock);
    while (!waiter->woken) pthread_cond_wait(&waiter->condition, &waiter->lock);
    pthread_mutex_unlock(&waiter->lock);
    return NULL;
}

static void wake(struct waiter *waiter) {
    pthread_mutex_lock(&waiter->lock);
    waiter->woken = true;
    pthread_mutex_unlock(&waiter->lock);
    pthread_cond_signal(&waiter->condition);
}

static void *other(void *unused) {
    printf("other_policy %d\nother_processors %d\n", sched_getscheduler(0), processors());
    return unused;
}

static long nanoseconds_run(void) {
    struct timespec time;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
    return time.tv_sec * 1000000000 + time.tv_nsec;
}

/* How often the thread has given the processor away. */
static long given_away(void) {
    struct rusage usage;
    getrusage(RUSAGE_THREAD, &usage);
    return usage.ru_nvcsw;
}

/* How often the thread gives the processor away while it does nothing but compute. */
static long gives_away(long nanoseconds) {
    long before = given_away();
    for (long end = nanoseconds_run() + nanoseconds; nanoseconds_run() < end;) {}
    return given_away() - before;
}

static void walk(void) {
    pthread_t threads[THREADS];
    printf("entries %d\n", entries(folder));
    printf("pauses_at_once %d\n", gives_away(5000000) >= 4);
    for (int i = 0; i < THREADS; i++) {
        waiters[i] = (struct waiter){PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, false};
        if (pthread_create(&threads[i], NULL, work, &waiters[i]) != 0) abort();
    }
    long before = given_away();
    for (int i = 0; i < THREADS; i++) wake(&waiters[i]);
    long waits = given_away() - before;
    /* Together, it is next to none. On a busy machine, a wait may be over before the thread sleeps. */
    printf("wakes_apart %d\n", waits >= THREADS / 2);
    for (int i = 0; i < THREADS; i++) pthread_join(threads[i], NULL);
}

static void arena(void) {
    unsigned number;
    size_t size = sizeof number, allocated, allocated_size = sizeof allocated;
    unsigned long long epoch = 1;
    char name[64];
    if (mallctl == NULL) return;
    mallctl("thread.arena", &number, &size, NULL, 0);
    parameters = malloc(8 << 20);
    memset(parameters, 1, 8 << 20);
    mallctl("epoch", NULL, NULL, &epoch, sizeof epoch);
    snprintf(name, sizeof name, "stats.arenas.%u.large.allocated", number);
    if (mallctl(name, &allocated, &allocated_size, NULL, 0) != 0) abort();
    size = sizeof number;
    printf("arena %u\nallocated %zu\n", number, allocated);
    if (mallctl("opt.narenas", &number, &size, NULL, 0) != 0) abort();
    printf("automatic_arenas %u\n", number);
}

/* Maps a table, as a version that is loaded does. */
static void map(void) {
    char path[4096];
    struct stat status;
    snprintf(path, sizeof path, "%s/table.data", folder);
    int file = open(path, O_RDONLY);
    fstat(file, &status);
    table_size = (size_t)status.st_size;
    table = mmap(NULL, table_size, PROT_READ, MAP_PRIVATE, file, 0);
    if (table == MAP_FAILED) abort();
    close(file);
    struct rusage before, after;
    getrusage(RUSAGE_THREAD, &before);
    for (size_t i = 0; i < table_size; i += 4096) table_sum += table[i];
    getrusage(RUSAGE_THREAD, &after);
    /* Without, it is one for 64 KiB. */
    long faults = after.ru_minflt + after.ru_majflt - before.ru_minflt - before.ru_majflt;
    printf("touched %d\n", faults < 4);
}

/* Unmaps memory: `argument` is NULL for the version's table. */
static void *unmap(void *argument) {
    unsigned char resident;
    void *start = argument == NULL ? (void *)table : argument;
    if (munmap(start, table_size) != 0) abort();
    const char *name = argument == NULL ? "unloader" : "unmapper";
    printf("%s_policy %d\n", name, argument == NULL ? settled_policy() : sched_getscheduler(0));
    printf("%s_gone %d\n", name, mincore(start, 4096, &resident) != 0);
    return NULL;
}

static void *sleep_briefly(void *unused) {
    usleep(30000);
    return unused;
}

/* Does nothing but compute, then waits for a thread, and then does nothing. */
static void compute(void) {
    pthread_t thread;
    printf("pauses %d\n", gives_away(100000000) >= 50);
    pthread_create(&thread, NULL, sleep_briefly, NULL);
    long before = given_away();
    pthread_join(thread, NULL);
    printf("joins_undisturbed %d\n", given_away() - before < 10);
    bool quiet = false;
    for (int tries = 0; !quiet && tries < 10000; tries++) quiet = poll(NULL, 0, 100) == 0;
    printf("rests %d\n", quiet);
}

static void *load(void *unused) {
    pthread_t thread;
    walk();
    compute();
    walk();
    pthread_create(&thread, NULL, other, NULL);
    pthread_join(thread, NULL);
    printf("loader_policy %d\nloader_processors %d\n", settled_policy(), processors());
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) _exit(sched_getscheduler(0));
    int status;
    waitpid(child, &status, 0);
    printf("child_policy %d\n", WEXITSTATUS(status));
    arena();
    map();
    return unused;
}

static void *spin(void *unused) {
    atomic_fetch_add(&peers, 1);
    while (!atomic_load(&done)) {}
    return unused;
}

/* Holds a lock while it works, with every processor busy. */
static void *load_with_a_lock(void *unused) {
    entries(folder);
    pthread_mutex_lock(&lock);
    long wanted = 2 * sysconf(_SC_NPROCESSORS_ONLN);
    while (atomic_load(&peers) < wanted) usleep(1000);
    while (nanoseconds_run() < 200000000) {}
    pthread_mutex_unlock(&lock);
    atomic_store(&done, true);
    return unused;
}

int main(int count, char **arguments) {
    pthread_t loader, starved, spinning;
    if (count != 3) return 2;
    folder = arguments[1];
    patience = strtol(arguments[2], NULL, 10);
    printf("main_entries %d\n", entries(folder));
    pthread_create(&loader, NULL, load, NULL);
    pthread_join(loader, NULL);
    void *other_memory = mmap(NULL, table_size, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    for (int i = 0; i < 2; i++) {
        pthread_create(&loader, NULL, unmap, i == 0 ? other_memory : NULL);
        pthread_join(loader, NULL);
    }
    printf("table_sum %lu\n", table_sum);
    unsigned number = 0;
    size_t size = sizeof number;
    if (mallctl != NULL) mallctl("thread.arena", &number, &size, NULL, 0);
    printf("main_arena %u\nidle %d\nbound %d\nmain_policy %d\n", number, idle, bound, sched_getscheduler(0));
    pthread_create(&starved, NULL, load_with_a_lock, NULL);
    for (long i = 2 * sysconf(_SC_NPROCESSORS_ONLN); i > 0; i--) pthread_create(&spinning, NULL, spin, NULL);
    pthread_join(starved, NULL);
    pthread_mutex_lock(&lock);
    printf("ended 1\n");
    return 0;
}
