/*
 * Threads that run only while nothing else wants the processor (SCHED_IDLE).
 *
 * A lock that such a thread holds must not wait for long. So a thread of this library watches them: one that did not
 * run although it could gets normal priority for one period. Taking back SCHED_IDLE needs CAP_SYS_NICE, or a limit of
 * 20 or more for RLIMIT_NICE; without these, threads keep their priority.
 *
 * That nothing waits for this processor does not mean that nothing waits. A processor takes over what waits for another
 * one when it has nothing to run, and otherwise only as its clock ticks, 4 ms apart at 250 Hz: a thread that fills the
 * idle time of one processor makes requests queue at the other. So these threads pause: for as long as it takes to look,
 * and longer where they had to wait for the processor themselves, which is then busy. A timer sends a thread a signal,
 * whose handler sleeps and starts the timer again; the timer stands still while the thread waits for something. A thread
 * that lists a version's folder starts it, so that a load pauses from the beginning; the thread that watches stops it
 * when it does not see the thread run, and starts it when it does.
 */
#define _GNU_SOURCE
#include "priority.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
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
/* For how many periods a thread pauses after it was seen to run, or said that it would. */
#define PAUSE_PERIODS 2
/* From one pause to the next, and how long it is at least; the kernel adds up to 50 us. */
#define PAUSE_EVERY_NANOSECONDS 500000
#define PAUSE_NANOSECONDS 50000
/* From one that was not needed to the next: to be woken must not look like running. */
#define REST_NANOSECONDS 2000000
/* How long it is where the thread had to wait for the processor, */
#define LONG_PAUSE_NANOSECONDS 1000000
/* for so long since the last one. Who has not run for as long needs none. */
#define NOTICED_NANOSECONDS 100000

/* A field of sigevent that glibc has no name for. */
#ifndef sigev_notify_thread_id
#define sigev_notify_thread_id _sigev_un._tid
#endif

static struct watched {
    /* 0: this place is free. */
    pid_t thread;
    /* Files of the kernel: whether the thread could run, and how long it has run. */
    int stat, schedstat;
    uint64_t ran;
    bool could_run;
    /* Whether it shall have SCHED_IDLE, and whether it has normal priority for now. */
    bool lowered, lent;
    /* Whether it has a timer, for how many periods that still runs, and whether it stands still while the thread waits. */
    bool has_timer;
    atomic_int pauses;
    atomic_bool waits;
    timer_t timer;
} places[THREADS];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static pthread_key_t place_of_thread;
static bool allowed, ready, watching;
/* A signal that the program does not use; 0: there is none. */
static int pause_signal;
static _Thread_local struct watched *self __attribute__((tls_model("initial-exec")));
/* How long it had run and waited when it last paused. */
static _Thread_local struct times {
    uint64_t ran, waited;
} last_pause __attribute__((tls_model("initial-exec")));

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

static uint64_t number(const char **text) {
    uint64_t value = 0;
    for (; **text >= '0' && **text <= '9'; ++*text) value = value * 10 + (uint64_t)(**text - '0');
    return value;
}

/* How long a thread has run, and has waited for a processor; the kernel writes them with a space between. */
static struct times times_of(int schedstat) {
    char content[128];
    const char *text = content;
    struct times times = {0};
    if (read_text(schedstat, content, sizeof content) <= 0) return times;
    times.ran = number(&text);
    if (*text == ' ') text++;
    times.waited = number(&text);
    return times;
}

uint64_t nanoseconds_of(clockid_t clock) {
    struct timespec time;
    clock_gettime(clock, &time);
    return (uint64_t)time.tv_sec * 1000000000 + (uint64_t)time.tv_nsec;
}

/* Of this thread; the kernel's file is behind while a thread runs. */
static uint64_t has_run(void) { return nanoseconds_of(CLOCK_THREAD_CPUTIME_ID); }

/* Starts a thread's timer, or stops it. */
static void set_timer(const struct watched *it, long nanoseconds) {
    const struct itimerspec times = {.it_value.tv_nsec = nanoseconds};
    timer_settime(it->timer, 0, &times, NULL);
}

/* Sleeps, if this thread has run since it last did; returns the time to the next pause. */
static long pause_if_needed(void) {
    struct times now = {.ran = has_run()};
    if (now.ran - last_pause.ran < NOTICED_NANOSECONDS) return REST_NANOSECONDS;
    now.waited = times_of(self->schedstat).waited;
    bool busy = now.waited - last_pause.waited >= NOTICED_NANOSECONDS;
    const struct timespec time = {0, busy ? LONG_PAUSE_NANOSECONDS : PAUSE_NANOSECONDS};
    nanosleep(&time, NULL);
    last_pause = now;
    return PAUSE_EVERY_NANOSECONDS;
}

/* The handler of that signal. One may still come when the timer has been stopped. */
static void pause_now(int number) {
    int error = errno;
    (void)number;
    if (self != NULL && self->pauses > 0 && !self->waits) set_timer(self, pause_if_needed());
    errno = error;
}

void stop_pauses(void) {
    if (self == NULL || !self->has_timer) return;
    self->waits = true;
    set_timer(self, 0);
}

void start_pauses(void) {
    if (self == NULL || !self->has_timer) return;
    self->pauses = PAUSE_PERIODS;
    self->waits = false;
    set_timer(self, PAUSE_EVERY_NANOSECONDS);
}

void wait_for(uint64_t nanoseconds) {
    struct timespec left = {(time_t)(nanoseconds / 1000000000), (long)(nanoseconds % 1000000000)};
    stop_pauses();
    while (nanosleep(&left, &left) != 0 && errno == EINTR) {}
    start_pauses();
}

/* After a period in which a thread was seen to run, or not. */
static void set_pauses(struct watched *it, bool runs) {
    int before = it->pauses;
    int after = runs ? PAUSE_PERIODS : before - 1;
    /* Unless it says now that it will. */
    if (!it->has_timer || after < 0 || !atomic_compare_exchange_strong(&it->pauses, &before, after)) return;
    if (after == 0) set_timer(it, 0);
    if (before == 0 && !it->waits) set_timer(it, PAUSE_EVERY_NANOSECONDS);
}

static void watch(struct watched *it) {
    uint64_t ran = times_of(it->schedstat).ran;
    bool could = could_run(it->stat);
    uint64_t more = ran - it->ran;
    bool starved = it->lowered && could && it->could_run && more < FAIR_NANOSECONDS;
    if (starved != it->lent) set_policy(it->thread, starved ? SCHED_OTHER : SCHED_IDLE);
    set_pauses(it, could || more >= FAIR_NANOSECONDS);
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
    self = NULL;
    pthread_mutex_lock(&lock);
    if (it->has_timer) timer_delete(it->timer);
    close(it->stat);
    close(it->schedstat);
    it->thread = 0;
    pthread_mutex_unlock(&lock);
}

/* After a fork, threads of the parent are not this process's, nor are their timers. */
static void forget_all(void) {
    run_normally();
    self = NULL;
    pthread_mutex_init(&lock, NULL);
    for (size_t i = 0; i < THREADS; i++) {
        if (places[i].thread == 0) continue;
        close(places[i].stat);
        close(places[i].schedstat);
        places[i].thread = 0;
    }
    watching = false;
}

/* Whether the process may take SCHED_IDLE back is tried on a thread that nothing needs. */
static void *try_policies(void *unused) {
    bool tried = set_policy(0, SCHED_IDLE) && set_policy(0, SCHED_OTHER);
    return tried ? &allowed : unused;
}

/* A real-time signal that has no handler yet, from the end that programs use last. */
static int take_signal(void) {
    const struct sigaction pausing = {.sa_handler = pause_now, .sa_flags = SA_RESTART};
    for (int number = SIGRTMAX; number >= SIGRTMIN; number--) {
        struct sigaction taken;
        if (sigaction(number, NULL, &taken) != 0 || taken.sa_handler != SIG_DFL) continue;
        return sigaction(number, &pausing, NULL) == 0 ? number : 0;
    }
    return 0;
}

static void prepare(void) {
    pthread_t thread;
    void *result = NULL;
    allowed = pthread_create(&thread, NULL, try_policies, NULL) == 0 && pthread_join(thread, &result) == 0 &&
              result != NULL;
    pause_signal = take_signal();
    ready = pthread_key_create(&place_of_thread, forget) == 0 && pthread_atfork(NULL, NULL, forget_all) == 0;
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

static void create_timer(struct watched *it) {
    struct sigevent event = {.sigev_notify = SIGEV_THREAD_ID, .sigev_signo = pause_signal};
    event.sigev_notify_thread_id = it->thread;
    it->has_timer = pause_signal != 0 && timer_create(CLOCK_MONOTONIC, &event, &it->timer) == 0;
}

static void take_place(struct watched *it, bool lowers, bool pauses) {
    pid_t thread = (pid_t)syscall(SYS_gettid);
    *it = (struct watched){.stat = task_file(thread, "stat"), .schedstat = task_file(thread, "schedstat")};
    if (it->stat < 0 || it->schedstat < 0 || pthread_setspecific(place_of_thread, it) != 0) {
        close(it->stat);
        close(it->schedstat);
        return;
    }
    it->thread = thread;
    it->lowered = lowers && allowed && sched_getscheduler(0) == SCHED_OTHER && set_policy(0, SCHED_IDLE);
    self = it;
    if (pauses) create_timer(it);
}

void run_when_idle(bool lowers, bool pauses) {
    pthread_once(&once, prepare);
    if (!ready || self != NULL || !(lowers || pauses)) return;
    pthread_mutex_lock(&lock);
    if (!watching) start_watching();
    for (size_t i = 0; watching && i < THREADS; i++)
        if (places[i].thread == 0) {
            take_place(&places[i], lowers, pauses);
            break;
        }
    pthread_mutex_unlock(&lock);
}

bool run_normally(void) { return self != NULL && self->lowered && set_policy(0, SCHED_OTHER); }

void run_when_idle_again(void) { set_policy(0, SCHED_IDLE); }
