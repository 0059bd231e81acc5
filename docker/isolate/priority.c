/*
 * Threads that run only while nothing else wants the processor (SCHED_IDLE).
 *
 * A lock that such a thread holds must not wait for long. So a thread of this library watches them: one that did not
 * run although it could gets normal priority for one period. Taking back SCHED_IDLE needs CAP_SYS_NICE, or a limit of
 * 20 or more for RLIMIT_NICE; without these, threads keep their priority.
 */
#define _GNU_SOURCE
#include "priority.h"

#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* At most so many threads; further ones keep their priority. */
#define THREADS 64
/* The period of watching, and how long a thread that could run must have run in it. */
#define PERIOD_NANOSECONDS 20000000
#define FAIR_NANOSECONDS 1000000

static struct watched {
    /* 0: this place is free. */
    pid_t thread;
    /* Files of the kernel: whether the thread could run, and how long it has run. */
    int stat, schedstat;
    uint64_t ran;
    bool could_run, lent;
} places[THREADS];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static pthread_key_t place_of_thread;
static bool allowed, watching;
static _Thread_local bool idle __attribute__((tls_model("initial-exec")));

static bool set_policy(pid_t thread, int policy) {
    struct sched_param none = {0};
    return sched_setscheduler(thread, policy, &none) == 0;
}

static ssize_t read_text(int file, char *text, size_t size) {
    ssize_t length = pread(file, text, size - 1, 0);
    text[length < 0 ? 0 : length] = 0;
    return length;
}

/* The kernel writes a thread's state after its name, which is in brackets. */
static bool could_run(int stat) {
    char text[512];
    if (read_text(stat, text, sizeof text) <= 0) return false;
    const char *name_end = strrchr(text, ')');
    return name_end != NULL && strncmp(name_end, ") R", 3) == 0;
}

static uint64_t nanoseconds_run(int schedstat) {
    char text[128];
    return read_text(schedstat, text, sizeof text) <= 0 ? 0 : strtoull(text, NULL, 10);
}

static void watch(struct watched *it) {
    uint64_t ran = nanoseconds_run(it->schedstat);
    bool could = could_run(it->stat);
    bool starved = could && it->could_run && ran - it->ran < FAIR_NANOSECONDS;
    if (starved != it->lent) set_policy(it->thread, starved ? SCHED_OTHER : SCHED_IDLE);
    it->lent = starved;
    it->could_run = could;
    it->ran = ran;
}

static void *watch_all(void *unused) {
    const struct timespec period = {0, PERIOD_NANOSECONDS};
    prctl(PR_SET_NAME, "isolate-watch");
    while (true) {
        nanosleep(&period, NULL);
        pthread_mutex_lock(&lock);
        for (size_t i = 0; i < THREADS; i++)
            if (places[i].thread != 0) watch(&places[i]);
        pthread_mutex_unlock(&lock);
    }
    return unused;
}

static void forget(void *place) {
    struct watched *it = place;
    run_normally();
    idle = false;
    pthread_mutex_lock(&lock);
    close(it->stat);
    close(it->schedstat);
    it->thread = 0;
    pthread_mutex_unlock(&lock);
}

/* After a fork, threads of the parent are not this process's. */
static void forget_all(void) {
    pthread_mutex_init(&lock, NULL);
    for (size_t i = 0; i < THREADS; i++) {
        if (places[i].thread == 0) continue;
        close(places[i].stat);
        close(places[i].schedstat);
        places[i].thread = 0;
    }
    watching = false;
    run_normally();
    idle = false;
}

/* Whether the process may take SCHED_IDLE back is tried on a thread that nothing needs. */
static void *try_policies(void *unused) {
    bool tried = set_policy(0, SCHED_IDLE) && set_policy(0, SCHED_OTHER);
    return tried ? &allowed : unused;
}

static void prepare(void) {
    pthread_t thread;
    void *result = NULL;
    allowed = pthread_create(&thread, NULL, try_policies, NULL) == 0 && pthread_join(thread, &result) == 0 &&
              result != NULL && pthread_key_create(&place_of_thread, forget) == 0 &&
              pthread_atfork(NULL, NULL, forget_all) == 0;
}

/* Starts what watches, with normal priority and without signals, which are for the program's threads. */
static void start_watching(void) {
    pthread_t thread;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    watching = pthread_create(&thread, NULL, watch_all, NULL) == 0 && pthread_detach(thread) == 0;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static int task_file(pid_t thread, const char *name) {
    char path[64];
    snprintf(path, sizeof path, "/proc/self/task/%d/%s", (int)thread, name);
    return open(path, O_RDONLY | O_CLOEXEC);
}

static bool take_place(struct watched *it) {
    pid_t thread = (pid_t)syscall(SYS_gettid);
    *it = (struct watched){.stat = task_file(thread, "stat"), .schedstat = task_file(thread, "schedstat")};
    if (it->stat >= 0 && it->schedstat >= 0 && pthread_setspecific(place_of_thread, it) == 0) {
        it->thread = thread;
        return true;
    }
    close(it->stat);
    close(it->schedstat);
    return false;
}

void run_when_idle(void) {
    pthread_once(&once, prepare);
    if (!allowed || idle || sched_getscheduler(0) != SCHED_OTHER) return;
    pthread_mutex_lock(&lock);
    if (!watching) start_watching();
    for (size_t i = 0; watching && !idle && i < THREADS; i++)
        if (places[i].thread == 0) idle = take_place(&places[i]);
    pthread_mutex_unlock(&lock);
    if (idle) set_policy(0, SCHED_IDLE);
}

bool run_normally(void) { return idle && set_policy(0, SCHED_OTHER); }

void run_when_idle_again(void) { set_policy(0, SCHED_IDLE); }
