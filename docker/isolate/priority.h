/* Threads that run only while nothing else wants the processor. */
#include <stdbool.h>
#include <stdint.h>
#include <time.h>

/* The calling thread is one from now on, if it can be watched. `lowers`: with the lowest priority, if the process may
   take that back. `pauses`: and it pauses while it runs, so that its processor looks for what waits for another. */
void run_when_idle(bool lowers, bool pauses);

/* What a clock shows. */
uint64_t nanoseconds_of(clockid_t clock);

/* The calling thread pauses from now on, until it is not seen to run. Neither does anything for threads without pauses. */
void start_pauses(void);

/* It does not, until it starts them again: it is going to wait for something. */
void stop_pauses(void);

/* Sleeps, without pauses and however many signals arrive. */
void wait_for(uint64_t nanoseconds);

/* Gives the calling thread normal priority while it starts another, which inherits it; returns whether it had to. */
bool run_normally(void);

/* Undoes it. */
void run_when_idle_again(void);
